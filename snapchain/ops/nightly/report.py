"""What a run did, as values: the table, the JSON and the metrics are drawn from the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from snapchain.destination.records import GcReport, PointsMergeReport
from snapchain.errors import SnapchainError
from snapchain.guest.protocol import State
from snapchain.guest.snapshot import LeftOut
from snapchain.merge.run import MergeReport
from snapchain.model.consistency import Consistency
from snapchain.model.traffic import Bill
from snapchain.ops.guest_points_merge import GuestPointsMergeReport


class Outcome(StrEnum):
    """How it ended with a disk, a destination or the whole run; the later ones outweigh those before.

    ok       all that was to be done is done
    moved    nothing was to be done: the disk was given to another host
    busy     left out: somebody has the image open
    left     begun or not, and not finished: the window, the time or a budget came to its end
    damaged  all was done, and the destination has lost bytes of some point, which the image no longer has
    failed   something went wrong
    """

    OK = "ok"
    MOVED = "moved"
    BUSY = "busy"
    LEFT = "left"
    DAMAGED = "damaged"
    FAILED = "failed"

    @classmethod
    def worst(cls, outcomes: Sequence[Outcome]) -> Outcome:
        """The weightiest; ok for none."""
        return max(outcomes, key=list(cls).index, default=cls.OK)


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class Fault(_Shown):
    """Something that went wrong, while doing what (`step`); the fields of an error."""

    step: str
    kind: str
    message: str
    subject: str | None
    hint: str | None

    @classmethod
    def of(cls, step: str, error: Exception) -> Self:
        """From an error; one that nobody has foreseen is a bug, and says so."""
        if isinstance(error, SnapchainError):
            return cls(step=step, kind=error.kind, message=error.message, subject=error.subject, hint=error.hint)
        message = f"this is a bug in snapchain: {type(error).__name__}: {error}"
        return cls(step=step, kind="bug", message=message, subject=None, hint=None)

    def __str__(self) -> str:
        return f"{self.step}: {self.subject}: {self.message}" if self.subject else f"{self.step}: {self.message}"


class ShipResult(_Shown):
    """A disk at one destination.

    point: None when nothing was shipped; bytes: guest bytes read, stored bytes; damaged: points with lost bytes
    """

    destination: str
    outcome: Outcome
    point: int | None = None
    layers_sent: int = 0
    bytes_read: int = 0
    bytes_stored: int = 0
    content_id: str | None = None
    retention: PointsMergeReport | GuestPointsMergeReport | None = None
    points: int | None = None
    layers: int | None = None
    damaged: tuple[int, ...] = ()


class TurnReport(_Shown):
    """What a disk and a guest have in common.

    destinations: each that it is to go to; snapshot: made, unchanged (nothing was written since the last one), off, or
    none; why_not_merged: why there are still more files than there should be; left: steps that were not
    begun or not finished, and why; moved_to: DEST::DISK, whose disk it is now
    """

    outcome: Outcome
    snapshot: str = "none"
    destinations: tuple[ShipResult, ...] = ()
    why_not_merged: str | None = None
    faults: tuple[Fault, ...] = ()
    left: tuple[str, ...] = ()
    moved_to: str | None = None
    seconds: float = 0.0

    def damaged_at(self, destination: str) -> Self:
        """The report, when it came to light after the disk's turn that the destination has lost bytes of it."""
        places = tuple(
            each.model_copy(update={"outcome": Outcome.worst([each.outcome, Outcome.DAMAGED])})
            if each.destination == destination
            else each
            for each in self.destinations
        )
        worst = Outcome.worst([self.outcome, Outcome.DAMAGED])
        return self.model_copy(update={"outcome": worst, "destinations": places})


class DiskReport(TurnReport):
    """One disk.

    sealed: the file that was shipped; merge: of local layers; chain_length: files
    """

    disk: str
    image: Path
    sealed: Path | None = None
    merge: MergeReport | None = None
    chain_length: int | None = None
    shadowed_bytes: int | None = None


class GuestDiskResult(_Shown):
    """The local chain of one disk of a guest. chain_length: files; merge: of local layers"""

    disk: str
    sealed: Path | None = None
    chain_length: int | None = None
    merge: MergeReport | None = None
    why_not_merged: str | None = None


class GuestReport(TurnReport):
    """One guest. The results of its destinations are of guest points, with the bytes of all disks together.

    guest: its name at the destinations; option: how it is named on a command line; is_new: no earlier run has known it
    state: whether it ran; instant, time, consistency: of its guest point; why_not: why it is not
    filesystem-consistent where that was tried; frozen_seconds: how long it was frozen
    left_out: its disks that were not taken, each with the reason
    """

    guest: str
    option: str
    is_new: bool = False
    state: State | None = None
    instant: str | None = None
    time: datetime | None = None
    consistency: Consistency | None = None
    why_not: str | None = None
    frozen_seconds: float | None = None
    disks: tuple[GuestDiskResult, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


class VerifyResult(_Shown):
    """The sample of one disk. checked_bytes: guest bytes read and compared."""

    disk: str
    checked_bytes: int
    findings: tuple[str, ...]


class CopyResult(_Shown):
    """A disk or a guest that was copied. points: their numbers at the copy; present: how many were there already"""

    name: str
    points: tuple[int, ...]
    present: int
    bytes_read: int
    bytes_stored: int
    retention: PointsMergeReport | GuestPointsMergeReport | None = None


class DestinationReport(_Shown):
    """What a destination got after all disks.

    copy_of: name of the destination whose points are copied to it
    traffic: requests to it in the whole run, where it counts them
    """

    destination: str
    outcome: Outcome
    copy_of: str | None = None
    copied: tuple[CopyResult, ...] = ()
    gc: GcReport | None = None
    verified: tuple[VerifyResult, ...] = ()
    traffic: Bill | None = None
    faults: tuple[Fault, ...] = ()
    left: tuple[str, ...] = ()


class BootTestReport(_Shown):
    """A clone of a guest that was to boot from its newest guest point at a destination.

    booted: None where it did not come to that; by: what showed it: agent, check, console, running
    boot_seconds: from the start of the clone; bytes_written: what its disks took here
    console: the last lines, where it did not boot
    """

    guest: str
    destination: str
    outcome: Outcome
    guest_point: int | None = None
    booted: bool | None = None
    by: str | None = None
    boot_seconds: float | None = None
    bytes_written: int = 0
    console: tuple[str, ...] = ()
    seconds: float = 0.0
    faults: tuple[Fault, ...] = ()
    left: tuple[str, ...] = ()


class NightlyReport(_Shown):
    """A whole run.

    faults, left: of the run itself; disks: in the order of work; counts: of disks and guests by outcome, also zeros
    (but of moved)
    no_longer_selected: disks that earlier runs have shipped; layers_left_out: files that were matched, and are no disks
    leftovers: those of them that no image uses any more
    guests: in the order of work; guests_gone: those that earlier runs have shipped, and that are not defined any more
    tests: clones that were to boot, in the order of work
    """

    name: str
    config: Path
    outcome: Outcome
    started: datetime
    finished: datetime
    seconds: float
    closes: datetime | None
    counts: dict[Outcome, int]
    disks: tuple[DiskReport, ...]
    guests: tuple[GuestReport, ...] = ()
    destinations: tuple[DestinationReport, ...]
    tests: tuple[BootTestReport, ...] = ()
    faults: tuple[Fault, ...]
    left: tuple[str, ...]
    no_longer_selected: tuple[str, ...]
    guests_gone: tuple[str, ...] = ()
    layers_left_out: tuple[Path, ...]
    leftovers: tuple[Path, ...] = ()
    interrupted: bool = False

    @property
    def complete(self) -> bool:
        """Whether everything was done. Images in use that the configuration lets be, and moved disks, do not count."""
        return self.outcome in (Outcome.OK, Outcome.MOVED, Outcome.BUSY) and not self.interrupted
