"""What destinations report, in the form in which it is shown: the same for every kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Self

from pydantic import BaseModel, ConfigDict, computed_field

from snapchain.destination.guest_record import guest_of
from snapchain.errors import Corrupt, SnapchainError
from snapchain.model.consistency import Consistency
from snapchain.model.merging import MergeRow

MOST_FINDINGS = 10_000
"""Findings that are listed one by one: a stored name of 32 bytes that leads nowhere makes one of two kilobytes."""


class Record(BaseModel):
    """Never changes once it is made."""

    # Built when they are needed: a command shows few of these.
    model_config = ConfigDict(frozen=True, defer_build=True)


class HoldRecord(Record):
    """A reason to keep a point whatever the rules say. tag: names it, once a point; reason: for people."""

    tag: str
    since: datetime
    reason: str = ""


class PointRecord(Record):
    """A point. layers: length of the chain that gives it; holds: why it stays whatever the rules say.

    of_the_future: dated later than this host's clock
    instant: of the guest point that it belongs to, 32 hex digits; consistency: how the guest stood; None: not recorded
    """

    point: int
    time: datetime
    labels: tuple[str, ...]
    virtual_size: int
    content_id: str
    layers: int
    holds: tuple[HoldRecord, ...] = ()
    of_the_future: bool = False
    instant: str | None = None
    consistency: Consistency | None = None


class DiskRecord(Record):
    """A disk and its points, oldest first.

    epoch: says which host may write it, and grows at each failover; layers: distinct ones of all points
    record_of: the guest whose records it holds, None for an ordinary disk
    """

    name: str
    epoch: int
    points: tuple[PointRecord, ...]
    layers: int = 0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def record_of(self) -> str | None:
        return guest_of(self.name)


class Finding(Record):
    """Something wrong. subject: the object, file or range; points: those of `disk` that it affects."""

    kind: str
    subject: str | None
    message: str
    disk: str | None
    points: tuple[int, ...]

    @classmethod
    def of(cls, error: SnapchainError, disk: str | None, points: Sequence[int], where: str = "") -> Self:
        """From an error. where: put before its message."""
        return cls(
            kind=error.kind, subject=error.subject, message=f"{where}{error.message}", disk=disk, points=tuple(points)
        )


class Findings:
    """Collects findings: each once, the first MOST_FINDINGS one by one, and the others as one for each disk."""

    def __init__(self) -> None:
        self._found: dict[Finding, None] = {}
        self._further: dict[str | None, tuple[int, set[int]]] = {}

    def add(self, finding: Finding) -> None:
        """Add one, unless it is there."""
        if finding in self._found:
            return
        if len(self._found) < MOST_FINDINGS:
            self._found[finding] = None
        else:
            self.add_further(finding.disk, finding.points)

    def add_further(self, disk: str | None, points: Iterable[int]) -> None:
        """Add one that is only counted. points: those of the disk that it affects"""
        count, affected = self._further.get(disk, (0, set()))
        affected.update(points)
        self._further[disk] = count + 1, affected

    def all(self) -> tuple[Finding, ...]:
        """What was added, in that order."""
        further = (
            Finding.of(
                Corrupt(f"there are {count} further errors", subject=disk or "the repository"), disk, sorted(points)
            )
            for disk, (count, points) in self._further.items()
        )
        return (*self._found, *further)


class VerifyReport(Record):
    """What `verify` found.

    checked_bytes: bytes of data that were read and found good, 0 where only records were; layers: distinct ones
    read_bytes: stored bytes that were read for that, of `stored_bytes`; fresh_bytes: those that were not because they
    had been read and found good before; continued: whether a run that was interrupted was continued
    verified_since: all data was read and found good at this time or later; None: not all of it was
    What a replica does not tell is 0 or None.
    """

    ok: bool
    destination: str
    disks: int
    points: int
    layers: int
    data_read: bool
    checked_bytes: int
    findings: tuple[Finding, ...]
    read_bytes: int = 0
    fresh_bytes: int = 0
    stored_bytes: int = 0
    continued: bool = False
    verified_since: datetime | None = None


class LostRange(Record):
    """Guest bytes [offset, offset + length) of a disk that some of its points have lost.

    subject: the object that is missing or damaged
    """

    disk: str
    points: tuple[int, ...]
    offset: int
    length: int
    subject: str


class RepairPlan(Record):
    """What a repair would do.

    damaged: what cannot be read now; lost: what of it no source has
    findings: damage that no source can make good, such as that of a catalogue
    """

    destination: str
    damaged: tuple[LostRange, ...]
    lost: tuple[LostRange, ...]
    findings: tuple[Finding, ...] = ()


class RepairReport(Record):
    """What a repair did.

    damaged: what could not be read before; lost: what of it still cannot, since no source has it
    blobs_stored, bytes_stored: stored again, before compression; layers_replaced: records that were written anew
    findings: as of the plan
    """

    ok: bool
    destination: str
    damaged: tuple[LostRange, ...]
    lost: tuple[LostRange, ...]
    blobs_stored: int
    bytes_stored: int
    layers_replaced: int
    findings: tuple[Finding, ...] = ()


class PointDecision(Record):
    """What becomes of one point, and why. of_the_future: dated later than this host's clock."""

    point: int
    time: datetime
    labels: tuple[str, ...]
    kept: bool
    reasons: tuple[str, ...]
    of_the_future: bool = False


class StayingLayer(Record):
    """A layer that no kept point needs, and why it stays: it is open, or an image depends on it."""

    file: str
    reason: str


class PointsMergePlan(Record):
    """What keeping some points of a disk would do to its layers. Sizes in bytes.

    merges: layers (files at a replica) that become one, lower first, each; the last one's view stays
    staying: layers that no kept point needs and that stay all the same
    shadowed_bytes: overwritten data that goes; needs_bytes: room that it takes beside the layers
    bytes_dropped: DATA of whole layers that go, since no kept point lies on them
    free_bytes: free room, None if it is not known; requests: objects written at least
    """

    destination: str
    disk: str
    points: tuple[PointDecision, ...]
    merges: tuple[tuple[str, ...], ...]
    staying: tuple[StayingLayer, ...] = ()
    layers_before: int
    layers_after: int
    strategy: str
    bytes_to_move: int = 0
    shadowed_bytes: int = 0
    bytes_dropped: int = 0
    needs_bytes: int = 0
    free_bytes: int | None = None
    requests: int = 0

    @property
    def rows(self) -> tuple[MergeRow, ...]:
        """The merges as every plan shows them, lowest first."""
        return tuple(MergeRow(layers=layers, method=self.strategy) for layers in self.merges)


class PointsMergeReport(Record):
    """What keeping some points of a disk did to its layers. Sizes in bytes.

    points_of_the_future: dated later than this host's clock; no rule counts them, and none drops them
    merges, staying: as of the plan; strategy: of all merges, joined by '+'
    bytes_moved: guest data shared with, or copied into, other files; bytes_freed: of the destination's storage
    bytes_dropped: guest bytes that are unreferenced now, which a collection will free
    findings: damage because of which layers were left unmerged
    """

    destination: str
    disk: str
    points_kept: tuple[int, ...]
    points_dropped: tuple[int, ...]
    points_of_the_future: tuple[int, ...] = ()
    merges: tuple[tuple[str, ...], ...] = ()
    staying: tuple[StayingLayer, ...] = ()
    layers_before: int
    layers_after: int
    bytes_moved: int
    bytes_freed: int
    bytes_dropped: int = 0
    strategy: str
    findings: tuple[Finding, ...] = ()


class RenamePlan(Record):
    """What a renaming would do.

    old, new: names of the disk, or of the guest; disks: old names of all that are renamed
    points, layers: how many go along; of a guest: guest points; finishes: whether an interrupted one is finished
    """

    destination: str
    old: str
    new: str
    disks: tuple[str, ...]
    points: int
    layers: int
    finishes: bool


class RenameReport(RenamePlan):
    """What was done."""


class GcLimits(Record):
    """How much one collection does.

    waste: the share of a pack that may be unreferenced before the rest is moved, 0 to 1; None: a quarter
    most_moved: bytes that are copied out of packs, None: any; the most wasteful packs come first
    """

    waste: float | None = None
    most_moved: int | None = None


class GcPlan(Record):
    """What a collection would do, in stored bytes, without the few bytes that new records need.

    bytes_locked, objects_locked, locked_until: as of GcReport
    """

    destination: str
    bytes_freed: int
    bytes_moved: int
    objects_deleted: int
    packs_deleted: int
    packs_moved: int
    bytes_in_use: int
    bytes_locked: int = 0
    objects_locked: int = 0
    locked_until: datetime | None = None
    findings: tuple[Finding, ...] = ()


class GcReport(Record):
    """What a collection did.

    bytes_freed: by how much the stored bytes fell; bytes_added: by how much they grew, where new records cost more than
    what was deleted
    bytes_moved: copied out of wasteful or damaged packs
    bytes_left: unused so far, and left for a later collection, since somebody at work may still have a use for it
    waits_for: who that is, for people
    bytes_locked, objects_locked: unused objects that the store has locked, and that a later collection deletes
    locked_until: when the last of their locks ends; None also for one that somebody has to release
    findings: damage; all that the damaged points may need was kept
    """

    destination: str
    bytes_freed: int
    bytes_added: int = 0
    bytes_moved: int
    objects_deleted: int
    packs_deleted: int
    packs_moved: int
    bytes_left: int = 0
    waits_for: tuple[str, ...] = ()
    bytes_locked: int = 0
    objects_locked: int = 0
    locked_until: datetime | None = None
    findings: tuple[Finding, ...] = ()
