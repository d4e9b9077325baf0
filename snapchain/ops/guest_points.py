"""Which disks of a destination are of one guest, and its guest points: grouped by `instant`, nothing is read.

    web1/vda     points 1 2 3        instants a b c
    web1/vdb     points 1 2          instants a b
    web1/.guest  points 1 2          instants a b         the records (destination/guest_record.py), published last

    ->  guest web1, guest points 1 (a) and 2 (b); c is a leftover: its record was never published

A guest point has the number, the time and the labels of its record's point.  What of its disks is missing at the
destination only the record tells: `fault_of`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from snapchain.destination.guest_record import RecordedDisk, guest_of, record_disk
from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import DiskRecord, HoldRecord, PointRecord
from snapchain.destination.summary import possible_guest
from snapchain.errors import Corrupt, NotFound
from snapchain.model.consistency import Consistency
from snapchain.model.points import chosen_point

_WHOLE = "`snapchain verify DEST::GUEST` tells which guest points are whole"


@dataclass(frozen=True, slots=True)
class GuestPoint:
    """One moment of a guest. record: the point of its record's disk; disks: name of a disk -> its point, by name."""

    guest: str
    instant: str
    record: PointRecord
    disks: Mapping[str, PointRecord]

    @property
    def point(self) -> int:
        """Its number."""
        return self.record.point

    @property
    def time(self) -> datetime:
        """Of all its disks."""
        return self.record.time

    @property
    def labels(self) -> tuple[str, ...]:
        """As `chosen_point` wants them."""
        return self.record.labels

    @property
    def consistency(self) -> Consistency | None:
        """How the guest stood."""
        return self.record.consistency

    @property
    def holds(self) -> tuple[HoldRecord, ...]:
        """Why it stays: those of its record's point."""
        return self.record.holds

    @property
    def virtual_size(self) -> int:
        """Of all disks together, bytes."""
        return sum(point.virtual_size for point in self.disks.values())


@dataclass(frozen=True, slots=True)
class Leftover:
    """Points of disks with one instant and no record: a guest point whose publishing was interrupted."""

    instant: str
    time: datetime
    disks: Mapping[str, PointRecord]


@dataclass(frozen=True, slots=True)
class GuestView:
    """A guest at a destination.

    disks: names of all disks right below its name, also those that have ordinary points only
    points: with their record, ascending by number; leftovers: without one, oldest first
    """

    name: str
    disks: tuple[str, ...]
    points: tuple[GuestPoint, ...]
    leftovers: tuple[Leftover, ...] = ()

    @property
    def record_disk(self) -> str:
        """The name of the disk with its records."""
        return record_disk(self.name)

    def point(self, wanted: str | None) -> GuestPoint:
        """The guest point that the text after '@' of an address means. Raises NotFound."""
        if not self.points:
            raise NotFound(
                "the guest has no guest point",
                subject=self.name,
                hint=f"its disks have points of their own: {', '.join(self.disks)}" if self.disks else None,
            )
        return chosen_point(self.name, self.points, wanted)


def guests_of(disks: Sequence[DiskRecord]) -> tuple[GuestView, ...]:
    """The guests that these disks belong to, by name. A destination is listed as a whole, or a guest is torn."""
    parents: dict[str, list[DiskRecord]] = {}
    for disk in disks:
        guest, mark, _ = disk.name.rpartition("/")
        if mark:
            parents.setdefault(guest, []).append(disk)
    found = (_view(guest, members) for guest, members in sorted(parents.items()))
    return tuple(view for view in found if view is not None)


def guest_named(disks: Sequence[DiskRecord], name: str) -> GuestView | None:
    """The guest of that name; None where there is none, and where an ordinary disk has the very name."""
    if any(disk.name == name for disk in disks):
        return None
    return next((view for view in guests_of(disks) if view.name == name), None)


def find_guest(destination: ReadableDestination, name: str) -> GuestView | None:
    """As `guest_named`, of what a destination has. Raises as `records_of`."""
    return guest_named(records_of(destination, [name]), name)


def records_of(destination: ReadableDestination, guests: Collection[str]) -> tuple[DiskRecord, ...]:
    """The disks of these guests and those that have the very name of one, by name, perhaps among others.

    Whole records are read of these disks alone: a repository may have 10,000 others. A replica answers for all at once.
    Raises what keeps a disk from being read, whichever it is: it may be one of them.
    """
    if destination.traits.streams:
        return destination.disks()
    there = destination.summaries()
    if any(disk.trouble for disk in there):
        return destination.disks()
    names = [disk.name for disk in there if disk.name in guests or possible_guest(disk.name) in guests]
    return tuple(record for name in names for record in destination.disks(name))


def fault_of(point: GuestPoint, disk: RecordedDisk, *, subject: object) -> NotFound | Corrupt | None:
    """What is wrong with a disk that the record of a guest point names; None where its point is the recorded one."""
    found = point.disks.get(disk.disk)
    if found is None:
        return NotFound(f"guest point {point.point} lacks its disk {disk.name}", subject=subject, hint=_WHOLE)
    if (found.content_id, found.virtual_size) != (disk.content_id, disk.virtual_size):
        return Corrupt(
            f"the point of disk {disk.name} has another content than guest point {point.point} records",
            subject=subject,
            hint=_WHOLE,
        )
    return None


def _view(guest: str, members: Sequence[DiskRecord]) -> GuestView | None:
    """members: all disks right below the guest's name."""
    records: dict[str, PointRecord] = {}
    moments: dict[str, dict[str, PointRecord]] = {}
    has_records = False
    for disk in sorted(members, key=lambda each: each.name):
        is_record = guest_of(disk.name) is not None
        has_records |= is_record
        for point in disk.points:
            if point.instant is None:
                continue
            # A shipment that began anew may have published one twice: the newer one counts.
            if is_record:
                records[point.instant] = point
            else:
                moments.setdefault(point.instant, {})[disk.name] = point
    if not has_records and not moments:
        return None
    points = [GuestPoint(guest, instant, point, moments.pop(instant, {})) for instant, point in records.items()]
    leftovers = [Leftover(instant, _time(torn), torn) for instant, torn in moments.items()]
    return GuestView(
        name=guest,
        disks=tuple(sorted(disk.name for disk in members if guest_of(disk.name) is None)),
        points=tuple(sorted(points, key=lambda each: each.point)),
        leftovers=tuple(sorted(leftovers, key=lambda each: each.time)),
    )


def _time(points: Mapping[str, PointRecord]) -> datetime:
    return max(point.time for point in points.values())
