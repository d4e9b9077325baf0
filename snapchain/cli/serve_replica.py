"""`snapchain serve-replica --stdio [--root DIR] [--allow SET]`: answer the ssh of a sender on the replica's host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snapchain.cli.app import verb
from snapchain.cli.preconnect import LEFT_BEHIND


@verb(
    name="serve-replica",
    examples="""
    ssh kvm2 snapchain serve-replica --stdio
    restrict,command="snapchain serve-replica --stdio --root /srv/replica" ssh-ed25519 AAAA...
    restrict,command="snapchain serve-replica --stdio --root /srv/replica --append-only" ssh-ed25519 AAAA...
    restrict,command="snapchain serve-replica --stdio --root /srv/replica --allow send,merge" ssh-ed25519 AAAA...
    """,
    when_interrupted=LEFT_BEHIND,
    hidden=True,
)
def serve_replica(
    *,
    stdio: Annotated[bool, typer.Option("--stdio", help="Speak with the sender over stdin and stdout.")],
    root: Annotated[
        Path | None,
        typer.Option(
            "--root", readable=False, metavar="DIR", help="Let it name no replica but DIR and what lies in it."
        ),
    ] = None,
    allow: Annotated[
        str | None,
        typer.Option(
            "--allow",
            metavar="SET",
            help="Let it do no more than this: a comma-separated set of send, fetch, cut, merge, handover and epochs. "
            "All of them without --root; all but epochs with it.",
        ),
    ] = None,
    append_only: Annotated[
        bool,
        typer.Option(
            "--append-only",
            help="Let it only add layers and points, and read. Nothing that is there can go, or be replaced.",
        ),
    ] = False,
    group: Annotated[
        str | None,
        typer.Option("--group", metavar="NAME", help="Let the members of this group read the replicas it writes to."),
    ] = None,
) -> None:
    """Take what a sender on another host sends. It is started by that sender's ssh, and is of no use at a terminal.

    Without --root the sender may name any directory that the user may write to who logs in. As the command= of a key in
    authorized_keys (second example), with --root, that key can do nothing here but what send (--cut-replica too),
    merge, migrate, log, inspect, restore and verify do to the replicas in DIR; so it can read them, too. Links and '..'
    are followed before a directory is judged. DIR must exist.

    Rights for --allow: send (new layers and points), fetch (restore), cut (--cut-replica), merge, handover (migrate),
    epochs (a sender's --epoch that skips numbers or ends a handover). Either send or fetch also allows log and verify.

    Only its owner may read a replica. QEMU often runs as another user: --group lets its group in, and so do
    `chgrp GROUP DIR` and `chmod 750 DIR` for the replica's directory.
    """
    from snapchain.errors import InvalidInput
    from snapchain.ops.receive import serve_stdio

    if not stdio:
        raise InvalidInput("a sender speaks over the standard streams", hint="say --stdio")
    serve_stdio(root=root, allow=allow, append_only=append_only, group=group)
