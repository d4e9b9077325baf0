"""What may be asked of `migrate`, and what it says: values only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.ops.disk_set import check_disks
from snapchain.ops.other_destinations import Reach
from snapchain.ops.ship.request import Divergence, Files, ShipRequest
from snapchain.source.protocol import Scope


@dataclass(frozen=True, slots=True)
class Move:
    """A disk of the guest. image: the top of its chain, in a format as of `scan`; disk: its name at the replica"""

    image: Path
    disk: str
    format: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrateRequest:
    """Which disks of one guest are to move, all or none.

    paused: the guest is paused, not shut down, and may have the images open; running: it runs
    prove: both sides are read again before
    start_hook: a program and its arguments, run here once the disks are the destination's
    labels: for the points; format, image_dirs: as `scan` takes them; limit_rate: bytes a second on the wire
    reach: how the guest's other destinations are reached from here
    """

    moves: Sequence[Move]
    paused: bool = False
    running: bool = False
    prove: bool = False
    start_hook: Sequence[str] = ()
    labels: Sequence[str] = ()
    divergence: Divergence = Divergence.REFUSE
    format: str | None = None
    image_dirs: Sequence[Path] = ()
    limit_rate: int | None = None
    reach: Reach = field(default_factory=Reach)

    def check(self) -> None:
        """Raises InvalidInput for a disk or an image that is named twice, and for names that cannot be."""
        check_disks([(move.image, move.disk) for move in self.moves])
        for move in self.moves:
            self.send(move, Scope.ALL).check()

    def send(self, move: Move, scope: Scope, *, though_given: bool = False) -> ShipRequest:
        """As `send` takes it: every file as a layer under its own name."""
        return ShipRequest(
            image=move.image,
            disk=move.disk,
            labels=self.labels,
            files=Files.EACH,
            scope=scope,
            divergence=self.divergence,
            format=move.format or self.format,
            image_dirs=self.image_dirs,
            limit_rate=self.limit_rate,
            though_given=though_given,
        )


class DiskPlan(BaseModel):
    """What would be done with a disk.

    seals: whether its top is sealed first; in_use: who has it open, and so keeps it from being moved
    epoch: in which this host writes it; given: whether an earlier run has given it already, and only the rest is to do
    """

    model_config = ConfigDict(frozen=True)

    image: str
    disk: str
    seals: bool
    in_use: str | None
    epoch: int
    given: bool
    layers_to_send: int
    bytes_to_send: int


class MigratePlan(BaseModel):
    """What `migrate` would do."""

    model_config = ConfigDict(frozen=True)

    destination: str
    disks: tuple[DiskPlan, ...]
    bytes_to_send: int
    start_hook: tuple[str, ...]


class DiskMoved(BaseModel):
    """What became of a disk.

    epoch: in which the destination writes it; overlay: the file for the guest there; sealed: the file that its top
    became here, None where it was none; fenced: the files here that were marked and made read-only
    """

    model_config = ConfigDict(frozen=True)

    image: str
    disk: str
    epoch: int
    overlay: str
    sealed: str | None
    fenced: tuple[str, ...]
    layers_sent: int
    bytes_sent: int


class Course(Enum):
    """How a run came to the handover."""

    NEW = "new"
    RESUMED = "resumed"
    """An earlier one had begun it."""
    DONE = "done"
    """An earlier one had ended it, but perhaps for the start of the guest."""


class MigrateReport(BaseModel):
    """What `migrate` did.

    token: of the handover; started: whether the hook was run, now or earlier, None without one
    cutover_seconds: from the first lock to the destination's word, in which no guest could run; seconds: of all
    """

    model_config = ConfigDict(frozen=True)

    destination: str
    token: str
    course: Course
    disks: tuple[DiskMoved, ...]
    bytes_sent: int
    started: bool | None
    cutover_seconds: float
    seconds: float


class TakeBackPlan(BaseModel):
    """What a take-back would do. epochs: of the disks, in which this host would write them; asked: whether the
    destination was
    """

    model_config = ConfigDict(frozen=True)

    destination: str
    images: tuple[str, ...]
    disks: tuple[str, ...]
    epochs: tuple[int, ...]
    asked: bool


class TakeBackReport(BaseModel):
    """What a take-back did. epochs: of the disks, in which this host writes them again; asked: whether the destination
    was; where it was not, its user has vouched for it
    """

    model_config = ConfigDict(frozen=True)

    destination: str
    images: tuple[str, ...]
    disks: tuple[str, ...]
    epochs: tuple[int, ...]
    asked: bool
