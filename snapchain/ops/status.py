"""status: how the disks and guests of destinations stand, a line each, also of thousands of disks.

A disk is *late* when its newest point is older than a stated age. Points of the future never count as its newest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.destination.guest_record import guest_of
from snapchain.destination.protocol import Destination
from snapchain.destination.summary import DiskSummary
from snapchain.errors import NotFound, SnapchainError
from snapchain.model.freshness import newest_of
from snapchain.ops import guest_status
from snapchain.ops.guest_status import GuestStatus
from snapchain.ops.other_destinations import Reach


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)


class Trouble(_Shown):
    """Why something cannot be shown. kind: as of an error; subject: an object or a file"""

    kind: str
    subject: str | None
    message: str


class DiskStatus(_Shown):
    """A disk at a destination.

    point, time, virtual_size, age_seconds: of the newest point that is not of the future, None where there is none
    points, layers: how many
    points_of_the_future: numbers, of the earliest hundred at most
    late: whether it has missed the stated age; None where none was stated, or the disk cannot be read
    verified: all data that it had then was read and found good at this time or later; None: not all, or not known
    guest: to which it belongs; record_of: whose records it holds
    trouble: why nothing else is known of it
    """

    destination: str
    disk: str
    guest: str | None = None
    record_of: str | None = None
    point: int | None = None
    time: datetime | None = None
    age_seconds: float | None = None
    virtual_size: int | None = None
    points: int = 0
    layers: int = 0
    points_of_the_future: tuple[int, ...] = ()
    late: bool | None = None
    verified: datetime | None = None
    trouble: Trouble | None = None


class DestinationStatus(_Shown):
    """A destination. kind: repository or replica; disks, points: how many; trouble: why it could not be asked"""

    destination: str
    kind: str | None = None
    disks: int = 0
    points: int = 0
    trouble: Trouble | None = None


class StatusReport(_Shown):
    """All guests by name, and disks by name at each destination in the order in which these were named.

    time: the clock by which ages are counted; max_age_seconds: that was stated
    """

    guests: tuple[GuestStatus, ...]
    destinations: tuple[DestinationStatus, ...] = ()
    disks: tuple[DiskStatus, ...] = ()
    time: datetime
    max_age_seconds: float | None = None

    @property
    def is_sound(self) -> bool:
        """Whether all could be asked and read, and no disk is late."""
        troubles = [*(each.trouble for each in self.destinations), *(each.trouble for each in self.disks)]
        return not any(troubles) and not self.late

    @property
    def late(self) -> tuple[DiskStatus, ...]:
        """The disks that have missed the stated age."""
        return tuple(each for each in self.disks if each.late)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked about.

    dest: as the user named it; name: of one disk or guest there, None for all; opens: opens the destination
    """

    dest: str
    name: str | None
    opens: Callable[[], Destination]


def status(
    wanted: Sequence[Wanted],
    *,
    match: Sequence[str] = (),
    max_age: float | None = None,
    now: datetime | None = None,
    with_guests: bool = True,
    reach: Reach | None = None,
    shows_troubles: bool = True,
) -> StatusReport:
    """Ask destinations. A disk or a guest that cannot be read is a row with the reason.

    match: shell patterns for names of disks or guests, one of which must fit; max_age: seconds
    now: the clock; reach: how other destinations of guests are asked, too
    shows_troubles: a destination that cannot be asked is a row with the reason, too; else its error is raised
    Raises NotFound for a disk or guest that a destination lacks, and where nothing fits the patterns.
    """
    now = now or datetime.now(UTC)
    destinations: list[DestinationStatus] = []
    disks: list[DiskStatus] = []
    guests: list[GuestStatus] = []
    by_dest: dict[str, list[Wanted]] = {}
    for each in wanted:
        by_dest.setdefault(each.dest, []).append(each)
    for dest, asked in by_dest.items():
        try:
            place = asked[0].opens()
            there = place.summaries(now=now)
        except SnapchainError as error:
            if not shows_troubles:
                raise
            destinations.append(DestinationStatus(destination=_url(dest), trouble=_trouble(error)))
            continue
        chosen: dict[str, DiskSummary] = {}
        names: set[str] = set()
        for each in asked:
            found_disks, found_guests = _chosen(there, each.name, match)
            # A guest that was moved there has a state, and no disk.
            is_gone = not found_disks and each.name is not None and not match
            if is_gone and not guest_status.statuses(place, there, found_guests, now=now):
                raise NotFound("there is no such disk or guest", subject=f"{place.url}::{each.name}")
            chosen |= {disk.name: disk for disk in found_disks}
            names.update(found_guests)
        if with_guests:
            guests += guest_status.statuses(place, there, sorted(names), now=now, reach=reach)
        disks += [_disk(place.url, chosen[name], now, max_age) for name in sorted(chosen)]
        points = sum(disk.points for disk in chosen.values())
        destinations.append(
            DestinationStatus(destination=place.url, kind=place.traits.kind, disks=len(chosen), points=points)
        )
    report = StatusReport(
        guests=tuple(sorted(guests, key=lambda row: row.guest)),
        destinations=tuple(destinations),
        disks=tuple(disks),
        time=now,
        max_age_seconds=max_age,
    )
    if match and not disks and not guests and not any(each.trouble for each in destinations):
        raise NotFound(f"no disk and no guest fits {' or '.join(match)}", subject=wanted[0].dest if wanted else None)
    return report


def _chosen(
    disks: Sequence[DiskSummary], name: str | None, match: Sequence[str]
) -> tuple[list[DiskSummary], list[str]]:
    """The disks and the names of the guests that are asked about."""
    if name is not None:
        disks = [disk for disk in disks if disk.name == name] or [disk for disk in disks if disk.guest == name]
        guests = [name] if not disks or any(disk.guest == name for disk in disks) else []
    else:
        guests = guest_status.guests_among(disks)
    if not match:
        return list(disks), guests
    fitting = {each for each in guests if _fits(each, match)}
    chosen = [disk for disk in disks if _fits(disk.name, match) or disk.guest in fitting]
    return chosen, [each for each in guests if each in fitting or any(disk.guest == each for disk in chosen)]


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _disk(destination: str, disk: DiskSummary, now: datetime, max_age: float | None) -> DiskStatus:
    row = DiskStatus(destination=destination, disk=disk.name, guest=disk.guest, record_of=guest_of(disk.name))
    if disk.trouble is not None:
        trouble = Trouble(kind=disk.trouble.kind, subject=disk.trouble.subject, message=disk.trouble.message)
        return row.model_copy(update={"trouble": trouble})
    newest, future = newest_of(disk.newest, now)
    age = None if newest is None else max(0.0, (now - newest.time).total_seconds())
    found: dict[str, object] = {
        "points": disk.points,
        "layers": disk.layers,
        "verified": disk.verified,
        "points_of_the_future": tuple(sorted(each.point for each in future)),
        "late": None if max_age is None else age is None or age > max_age,
    }
    if newest is not None:
        found |= {
            "point": newest.point,
            "time": newest.time,
            "virtual_size": newest.virtual_size,
            "age_seconds": age,
        }
    return row.model_copy(update=found)


def _trouble(error: SnapchainError) -> Trouble:
    return Trouble(kind=error.kind, subject=error.subject, message=error.message)


def _url(dest: str) -> str:
    """As an opened destination would call itself, as far as that can be told."""
    return dest if "://" in dest or dest.startswith("dir:") else str(Path.cwd() / dest)
