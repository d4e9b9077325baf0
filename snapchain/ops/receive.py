"""receive: take a stream in, that somebody pipes here or has saved."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.host.channel import Channel
from snapchain.replica.receiver import begun, receive


class ReceiveReport(BaseModel):
    """What a stream brought. layers: files that are new; layers_present: those that were here already."""

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
    """Take in one stream that is not answered.

    Raises Corrupt for what is no sound stream, Unavailable when it ends early: received again, it goes on from there.
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
