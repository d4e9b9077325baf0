"""What may be asked of a live migration, and what it reports: values only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import InvalidInput
from snapchain.ops.other_destinations import Reach
from snapchain.ops.ship.request import Divergence

MAX_DOWNTIME = 1.0
"""Seconds: what a client of the guest notices as one lost packet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRequest:
    """How a running guest is to move.

    prefix: of the disks' names at the replica, by default the guest's name
    max_downtime: seconds that the guest may be paused; bandwidth: bytes a second for memory and disks, each
    auto_converge: QEMU slows the guest down where it dirties memory faster than the link carries
    rounds: of seal and ship, at most; None for the rules of convergence
    dest_uri: of libvirt there, by default that of the replica's host through the same login
    command: started at the destination in place of the guest's own command line, with the facts in its environment
    before, after: hooks, run here; reach: how the guest's other destinations are reached from here
    """

    prefix: str | None = None
    max_downtime: float = MAX_DOWNTIME
    bandwidth: int | None = None
    auto_converge: bool = False
    rounds: int | None = None
    dest_uri: str | None = None
    command: Sequence[str] = ()
    before: Sequence[str] = ()
    after: Sequence[str] = ()
    labels: Sequence[str] = ()
    divergence: Divergence = Divergence.REFUSE
    image_dirs: Sequence[Path] = ()
    reach: Reach = field(default_factory=Reach)

    def check(self) -> None:
        """Raises InvalidInput for numbers that mean nothing."""
        if not 0 < self.max_downtime < float("inf"):
            raise InvalidInput("--max-downtime is a number of seconds above 0", subject=str(self.max_downtime))
        if self.bandwidth is not None and self.bandwidth < 1:
            raise InvalidInput("--bandwidth must be at least 1 byte a second", subject=str(self.bandwidth))


class LiveDiskPlan(BaseModel):
    """A disk that would move. ready: whether its layers are all there; bytes_left: in its active layer"""

    model_config = ConfigDict(frozen=True)

    disk: str
    image: str
    bytes_to_send: int
    bytes_left: int


class LivePlan(BaseModel):
    """What a live migration would do. command: that would be started there, with {overlay:DISK} for unknown paths

    memory_dirty_rate: bytes a second, None where this QEMU cannot measure it
    """

    model_config = ConfigDict(frozen=True)

    guest: str
    destination: str
    disks: tuple[LiveDiskPlan, ...]
    max_downtime: float
    memory_dirty_rate: float | None


class LiveDisk(BaseModel):
    """A disk that has moved. overlay: the file of the guest there; fenced: files here that are read-only now"""

    model_config = ConfigDict(frozen=True)

    disk: str
    image: str
    epoch: int
    overlay: str
    fenced: tuple[str, ...]


class LiveReport(BaseModel):
    """What a live migration did.

    qmp: the monitor of the guest at the destination
    memory_bytes: sent; memory_rounds: over the guest's memory; memory_rate: bytes a second at the end
    predicted_pause, pause: seconds in which the guest did not run; pause_within: whether it was at most what was asked
    clock_ahead: seconds that the clock of the destination is ahead of the one here, None where it was not compared
    bytes_sent: of the layers that were shipped before; seconds: of all
    """

    model_config = ConfigDict(frozen=True)

    guest: str
    destination: str
    token: str
    qmp: str
    disks: tuple[LiveDisk, ...]
    bytes_sent: int
    memory_bytes: int
    memory_rounds: int
    memory_rate: float
    predicted_pause: float
    pause: float | None
    pause_within: bool | None
    max_downtime: float
    clock_ahead: float | None
    seconds: float


class SettledMove(BaseModel):
    """How an interrupted migration was ended. moved: whether the guest is the destination's now"""

    model_config = ConfigDict(frozen=True)

    guest: str
    destination: str
    moved: bool
    says: str


class InterruptedMove(BaseModel):
    """A migration that was interrupted. stage: as `live_settle` has it; time: of its begin"""

    model_config = ConfigDict(frozen=True)

    guest: str
    destination: str
    stage: str
    time: datetime


class AbortPlan(BaseModel):
    """What `--abort` would end, oldest first."""

    model_config = ConfigDict(frozen=True)

    interrupted: tuple[InterruptedMove, ...]


class AbortReport(BaseModel):
    """What `--abort` did. settled: the interrupted migrations of the guest, oldest first"""

    model_config = ConfigDict(frozen=True)

    settled: tuple[SettledMove, ...]
