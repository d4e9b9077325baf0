"""receive: take a stream in, that somebody pipes here or has saved."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.host.remote_channel import Channel
from snapchain.ops.replica_engine import ReplicaEngine
from snapchain.replica.receiver import receive


class ReceiveReport(BaseModel):
    """What a stream brought. layers: files that are new; layers_present: those that were here already."""

    model_config = ConfigDict(frozen=True)

    disk: str
    destination: str
    layers: tuple[str, ...]
    layers_present: int
    points: tuple[int, ...]
    bytes_received: int


def receive_stream(channel: Channel, root: Path) -> ReceiveReport:
    """Take in one stream that is not answered.

    Raises Corrupt for what is no sound stream, Unavailable when it ends early: received again, it goes on from there.
    """
    root = root.absolute()
    received = receive(channel, root, engine=ReplicaEngine())
    return ReceiveReport(
        disk=received.disk,
        destination=f"dir:{root}",
        layers=tuple(received.layers),
        layers_present=received.known,
        points=tuple(point.point for point in received.points),
        bytes_received=received.bytes_read,
    )
