"""serve_replica: the other end of ssh://, started there by the sender's ssh, and by nobody else.

The sender names the replica's directory and is trusted as far as the user is who logged in: it could as well have run
anything else.  Where it could not, because sshd runs this command and no other (`command=` in authorized_keys), a root
confines it.  Everything else that it says is judged.
"""

from __future__ import annotations

from pathlib import Path

from snapchain.errors import NotFound
from snapchain.host.channel import stdio_channel
from snapchain.host.lanes import accept_lanes
from snapchain.replica.access import group_number
from snapchain.replica.permissions import parse_permissions
from snapchain.replica.receiver import receive

PATIENCE = 60.0
"""Seconds of silence after which a sender is given up: it says something every ten, and when its ssh has noticed a dead
link, after 75, and it comes again, this process must not hold the disk's lock any more."""


def serve_stdio(
    *, root: Path | None = None, allow: str | None = None, append_only: bool = False, group: str | None = None
) -> None:
    """Receive one stream from the standard streams. What goes wrong is told to the sender, and raised.

    root: replicas outside of it may not be named; allow, append_only: as `parse_permissions` takes them
    group: by name or number, whose members may read the replica from now on
    Raises NotFound when root is no directory or there is no such group, InvalidInput for rights that are none.
    """
    permissions = parse_permissions(allow, append_only=append_only, confined=root is not None)
    number = None if group is None else group_number(group)
    if root is not None and not root.is_dir():
        raise NotFound("no such directory", subject=root, hint="make it, or name another --root")
    channel = accept_lanes(stdio_channel(patience=PATIENCE))
    if channel is not None:  # else this process was a lane of another's
        with channel:
            receive(channel, within=root, permissions=permissions, group=number)
