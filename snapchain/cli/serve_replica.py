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
    stdio: Annotated[bool, typer.Option("--stdio", help="Talk to the sender over stdin and stdout.")],
    root: Annotated[
        Path | None,
        typer.Option("--root", readable=False, metavar="DIR", help="Serve only replicas in DIR, and DIR itself."),
    ] = None,
    allow: Annotated[
        str | None,
        typer.Option(
            "--allow",
            metavar="SET",
            help="Rights of the sender: a comma-separated set of send, fetch, cut, "
            "merge, handover, epochs and guests. By default "
            "all of them without --root, all but epochs and guests with it.",
        ),
    ] = None,
    append_only: Annotated[
        bool,
        typer.Option(
            "--append-only",
            help="Allow only adding layers and points, and reading. Nothing can be removed or replaced.",
        ),
    ] = False,
    group: Annotated[
        str | None,
        typer.Option(
            "--group", metavar="NAME", help="Let the members of this group read the replicas that the sender writes to."
        ),
    ] = None,
) -> None:
    """Serve a sender on another host. Its ssh starts this command; at a terminal it is of no use.

    Without --root the sender may name any directory that its login may write to. With --root, as the command= of a key
    in authorized_keys (second example), the key can only do what send (also --cut-replica), merge, migrate, log,
    inspect, restore and verify do to the replicas in DIR. So it can also read them. Links and '..' are resolved before
    a directory is checked. DIR must exist.

    Rights for --allow: send (new layers and points), fetch (restore), cut (--cut-replica), merge, handover (migrate),
    epochs (a sender's --epoch that skips numbers or ends a handover), guests (migrate of a running guest: as much as a
    login, since it starts programs). Either send or fetch also allows log and verify.

    Only its owner may read a replica. Where QEMU runs as another user, --group lets its group in. `chgrp GROUP DIR` and
    `chmod 750 DIR` for the directory of the replica do the same.
    """
    from snapchain.errors import InvalidInput
    from snapchain.ops.receive import serve_stdio

    if not stdio:
        raise InvalidInput("a sender speaks over the standard streams", hint="say --stdio")
    serve_stdio(root=root, allow=allow, append_only=append_only, group=group)
