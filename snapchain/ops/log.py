"""log: which disks, guests and points a destination has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from pydantic import BaseModel, ConfigDict

from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import DiskRecord, HoldRecord
from snapchain.errors import NotFound
from snapchain.model.consistency import Consistency
from snapchain.ops.guest_points import GuestPoint, GuestView, Leftover, guest_named, guests_of, records_of


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)


class GuestPointRow(_Shown):
    """A guest point. disks: name of a disk -> number of its point; virtual_size: of them together, bytes"""

    point: int
    instant: str
    time: datetime
    consistency: Consistency | None
    labels: tuple[str, ...]
    virtual_size: int
    disks: Mapping[str, int]
    holds: tuple[HoldRecord, ...] = ()
    of_the_future: bool = False


class LeftoverRow(_Shown):
    """Points of disks that belong to no guest point, since it was never published. disks: as of GuestPointRow"""

    instant: str
    time: datetime
    disks: Mapping[str, int]


class GuestRow(_Shown):
    """A guest and its points, ascending. disks: all below its name; record_disk: the disk that holds its records"""

    name: str
    disks: tuple[str, ...]
    record_disk: str
    points: tuple[GuestPointRow, ...]
    leftovers: tuple[LeftoverRow, ...] = ()


class LogReport(_Shown):
    """All disks, by name. encryption: the name of the cipher, or none; guests: to which some of the disks belong

    guest: the one that was asked for, whose disks these are; None for all, and for one disk
    """

    destination: str
    encryption: str
    disks: tuple[DiskRecord, ...]
    guests: tuple[GuestRow, ...] = ()
    guest: str | None = None


def log(destination: ReadableDestination, disk: str | None = None) -> LogReport:
    """All disks, one disk, or all disks of the guest of that name. Raises NotFound for a name that is neither."""
    if disk is None:
        disks = destination.disks()
        return _report(destination, disks, guests_of(disks))
    try:
        return _report(destination, destination.disks(disk), ())
    except NotFound as missing:
        disks = _of_guest(destination, disk, missing)
        view = guest_named(disks, disk)
        if view is None:
            raise
        members = [each for each in disks if each.name in (*view.disks, view.record_disk)]
        return _report(destination, members, [view], guest=disk)


def _of_guest(destination: ReadableDestination, guest: str, missing: NotFound) -> tuple[DiskRecord, ...]:
    """Raises `missing` where not even the destination is there."""
    try:
        return records_of(destination, [guest])
    except NotFound:
        raise missing from None


def _report(
    destination: ReadableDestination,
    disks: Sequence[DiskRecord],
    views: Sequence[GuestView],
    *,
    guest: str | None = None,
) -> LogReport:
    return LogReport(
        destination=destination.url,
        encryption=destination.encryption,
        disks=tuple(disks),
        guests=tuple(map(_row, views)),
        guest=guest,
    )


def _row(view: GuestView) -> GuestRow:
    return GuestRow(
        name=view.name,
        disks=view.disks,
        record_disk=view.record_disk,
        points=tuple(map(_point_row, view.points)),
        leftovers=tuple(
            LeftoverRow(instant=each.instant, time=each.time, disks=_numbers(each)) for each in view.leftovers
        ),
    )


def _point_row(point: GuestPoint) -> GuestPointRow:
    return GuestPointRow(
        point=point.point,
        instant=point.instant,
        time=point.time,
        consistency=point.consistency,
        labels=point.labels,
        virtual_size=point.virtual_size,
        disks=_numbers(point),
        holds=point.holds,
        of_the_future=point.record.of_the_future,
    )


def _numbers(of: GuestPoint | Leftover) -> dict[str, int]:
    return {name: point.point for name, point in of.disks.items()}
