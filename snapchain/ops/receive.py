"""receive and serve-replica: take in a stream from a pipe or file, or serve the sender at the other end of ssh."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import NotFound
from snapchain.host.channel import Channel, stdio_channel
from snapchain.host.lanes import accept_lanes
from snapchain.replica.access import group_number
from snapchain.replica.permissions import parse_permissions
from snapchain.replica.receiver import begun, receive


class ReceiveReport(BaseModel):
    """What a stream brought. layers: files that are new; layers_present: count of layers that were here already."""

    model_config = ConfigDict(frozen=True)

    disk: str
    destination: str
    layers: tuple[str, ...]
    layers_present: int
    points: tuple[int, ...]
    bytes_received: int


class ReceivePlan(BaseModel):
    """The disk of a stream, and what this replica has of it: layers, and the number of its newest point, or 0.

    The content of the stream is not known before it is read, and then it would have been received.
    """

    model_config = ConfigDict(frozen=True)

    disk: str
    destination: str
    layers_present: int
    last_point: int


def plan_receive(channel: Channel, root: Path) -> ReceivePlan:
    """Read the beginning of a stream; changes nothing. Raises as `receive_stream`, for what that refuses at once."""
    root = root.absolute()
    found = begun(channel, root)
    return ReceivePlan(
        disk=found.disk, destination=f"dir:{root}", layers_present=len(found.layers), last_point=found.last_point
    )


def receive_stream(channel: Channel, root: Path) -> ReceiveReport:
    """Receive one stream whose sender does not listen.

    Raises Corrupt for an invalid stream, Unavailable when it ends early: received again, it resumes there.
    """
    root = root.absolute()
    received = receive(channel, root)
    return ReceiveReport(
        disk=received.disk,
        destination=f"dir:{root}",
        layers=tuple(received.layers),
        layers_present=received.known,
        points=tuple(point.point for point in received.points),
        bytes_received=received.bytes_read,
    )


# --- serve-replica: the other end of ssh://, started there by the sender's ssh.
#
# The sender names the replica's directory, and is trusted as far as the user that logged in, who could have run any
# other command. Where sshd runs only this one (`command=` in authorized_keys), a root confines it. All else is checked.

PATIENCE = 60.0
"""Seconds without a byte until the sender is given up. It sends one every 10 seconds; its ssh notices a dead link after
75, and when the sender connects again then, this process must have released the disk's lock."""


def serve_stdio(
    *, root: Path | None = None, allow: str | None = None, append_only: bool = False, group: str | None = None
) -> None:
    """Receive one stream from the standard streams. The sender is told of an error, which is raised here too.

    root: replicas outside of it may not be named; allow, append_only: as `parse_permissions` takes them
    group: by name or number, whose members may read the replica from now on
    Raises NotFound when root is no directory or there is no such group, InvalidInput for unknown rights.
    """
    permissions = parse_permissions(allow, append_only=append_only, confined=root is not None)
    number = None if group is None else group_number(group)
    if root is not None and not root.is_dir():
        raise NotFound("no such directory", subject=root, hint="make it, or name another --root")
    channel = accept_lanes(stdio_channel(patience=PATIENCE))
    if channel is not None:  # else this process was a lane of another one
        with channel:
            receive(channel, within=root, permissions=permissions, group=number)
