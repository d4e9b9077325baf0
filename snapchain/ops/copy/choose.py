"""Which points of which disks are to be at the destination, and which of them it lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase

from snapchain.destination.guest_record import guest_of
from snapchain.destination.protocol import Destination
from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import DiskRecord, PointRecord
from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.host.local_time import local_zone
from snapchain.model.copying import Lacking, chosen_since, lacking
from snapchain.model.points import chosen_point, instant
from snapchain.ops.copy.request import CopyRequest, RefusedPoint
from snapchain.ops.guest_places import guest_named_by
from snapchain.ops.guest_points import guest_named

OF_ONE_DISK = (Conflict, Corrupt, InvalidInput, NotFound, Unsupported)
"""Errors that keep no other disk from being copied."""


def check_places(source: Destination, destination: Destination) -> None:
    """Raises Unsupported for a destination that takes no copies, InvalidInput where both are one repository."""
    if not destination.traits.branches:
        raise Unsupported(
            f"points are copied to repositories, and this is a {destination.traits.kind}",
            subject=destination.url,
            hint="restore the point, and ship the image: snapchain restore, snapchain ship IMAGE DEST::DISK",
        )
    if source.id is not None and source.id == destination.id:
        raise InvalidInput(
            f"it is the repository that is copied, or a copy of its objects: both have the id {source.id}",
            subject=destination.url,
            hint="make another one for the copy: snapchain init DEST",
        )


@dataclass(frozen=True, slots=True)
class ChosenDisk:
    """A disk of the source. points: of it that are to be there; newer: as of CopyRequest

    siblings: of the records of a guest, the guest's disks; failed: why no point can be chosen
    """

    record: DiskRecord
    points: tuple[PointRecord, ...]
    newer: bool = False
    siblings: tuple[DiskRecord, ...] = ()
    failed: SnapchainError | None = None

    @property
    def name(self) -> str:
        """At either side."""
        return self.record.name


def choose(request: CopyRequest, source: ReadableDestination) -> list[ChosenDisk]:
    """The disks, those with the records of guests last. Raises NotFound for a name that is nothing there."""
    request.check()
    disks = _listed(request, source)
    names = _named(request.names, disks, source.url)
    found = [_points_of(request, disk, disks) for disk in disks if disk.name in names and disk.points]
    return sorted(found, key=lambda each: (guest_of(each.name) is not None, each.name))


def _listed(request: CopyRequest, source: ReadableDestination) -> tuple[DiskRecord, ...]:
    """The disks of the source among which some are chosen: those that are named, where nothing else is asked about."""
    if request.names and not request.newest and all(guest_of(name) is None for name in request.names):
        with suppress(NotFound):  # a pattern, or a guest
            return tuple(disk for name in dict.fromkeys(request.names) for disk in source.disks(name))
    try:
        return source.disks()
    except Corrupt as error:
        error.hint = error.hint or "name the other disks to copy them all the same: snapchain copy SRC DEST DISK..."
        raise


def _named(names: Sequence[str], disks: Sequence[DiskRecord], url: str) -> set[str]:
    if not names:
        return {disk.name for disk in disks}
    found: set[str] = set()
    for name in names:
        view = guest_named(disks, name)
        members = {*view.disks, view.record_disk} if view is not None else set()
        matching = {disk.name for disk in disks if disk.name == name or fnmatchcase(disk.name, name)} | members
        if not matching & {disk.name for disk in disks}:
            raise NotFound(f"{name!r} names no disk and no guest there", subject=url, hint="`snapchain log` lists both")
        found |= matching
    return found


def _points_of(request: CopyRequest, disk: DiskRecord, disks: Sequence[DiskRecord]) -> ChosenDisk:
    guest = guest_of(disk.name)
    siblings = [each for each in disks if guest is not None and each is not disk and guest_named_by(each.name) == guest]
    points = disk.points
    failed: SnapchainError | None = None
    if request.newest:
        of = guest_named_by(disk.name)
        records = {each.points[-1].instant for each in disks if of and guest_of(each.name) == of and each.points}
        points = tuple(point for point in points if point is points[-1] or point.instant in records - {None})
    elif request.since is not None:
        try:
            points = _since(disk, request.since)
        except NotFound as error:
            points, failed = (), error
    return ChosenDisk(disk, points, request.newer, tuple(siblings), failed)


def _since(disk: DiskRecord, text: str) -> tuple[PointRecord, ...]:
    moment = instant(text, now=datetime.now(UTC), zone=local_zone())
    try:
        first = chosen_point(disk.name, disk.points, text if moment is None else moment.isoformat())
    except NotFound:
        if moment is None:
            raise
        return disk.points  # all of them are newer
    return chosen_since(disk.points, first)


def disk_there(destination: ReadableDestination, disk: str) -> DiskRecord | None:
    """The disk as the destination has it; None where it has none."""
    try:
        return destination.disks(disk)[0]
    except NotFound:
        return None


def found_lacking(chosen: ChosenDisk, there: DiskRecord | None) -> Lacking[PointRecord]:
    """Which of the chosen points the destination lacks. there: the disk as it has it"""
    return lacking(chosen.points, chosen.record.points, () if there is None else there.points, newer=chosen.newer)


def too_old(found: Lacking[PointRecord]) -> Iterator[RefusedPoint]:
    """The points that would come above newer ones of another origin."""
    for point in found.too_old:
        yield RefusedPoint(
            point=point.point,
            kind=Conflict.kind,
            message="the disk there has newer points of another origin, which it would come after; copy it to another "
            "repository",
        )


def check_epoch(chosen: DiskRecord, there: DiskRecord | None, url: str) -> None:
    """Raises Conflict for a disk that was taken over at the destination. url: of the source"""
    if there is not None and max(1, chosen.epoch) < there.epoch:
        raise Conflict(
            f"it is in epoch {max(1, chosen.epoch)} in the source, and in epoch {there.epoch} there: it was taken over "
            "there, and has gone on without the source",
            subject=f"{url}::{chosen.name}",
            hint="copy the other way, or to another repository",
        )
