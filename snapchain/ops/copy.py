"""copy: points of one destination go to another one, which lacks them: a second site, or another bucket.

    choose disks and points -> leave out what is there -> for each point what it shows beyond one that is there
    -> store, prove, publish

Nothing goes on from one run to the next but what is there: so an interrupted copy is simply run again.  A point is
published when its content id, computed from what was written, is the one that the source has.  A point that is damaged
in the source is left out and named; the others go on.

The records of a guest come last, each when the points of all disks of its instant are there.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import partial

from pydantic import BaseModel, ConfigDict, computed_field

from snapchain.destination.copying import CopyReader, CopyWriter, GuardedView, ReadLayer
from snapchain.destination.guest_record import guest_of
from snapchain.destination.protocol import Destination
from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import DiskRecord, PointRecord
from snapchain.destination.writing import HeldLayer, NewLayer, Opening
from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.host.local_time import local_zone
from snapchain.model.content import empty_sum
from snapchain.model.copying import Lacking, chosen_since, identity, lacking
from snapchain.model.events import Notice, OnEvent, Progress, ignore
from snapchain.model.guest_state import Place
from snapchain.model.points import chosen_point, instant
from snapchain.ops.guest_places import guest_named_by, tell_others
from snapchain.ops.guest_points import guest_named
from snapchain.ops.ship.run import check_no_guest

_OF_ONE_DISK = (Conflict, Corrupt, InvalidInput, NotFound, Unsupported)
"""Errors that keep no other disk from being copied."""
_ATTEMPTS = 3
"""How often a disk is looked at anew when it was changed meanwhile, at either side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRequest:
    """What is to be copied.

    names: disks, guests, and patterns such as web*; none: all disks
    newest: of each disk only the newest point, and the points of the newest guest point
    since: the text after '@' of an address: that point of each disk, and those after it
    newer: only points after the newest one that the destination has of the disk
    """

    names: Sequence[str] = ()
    newest: bool = False
    since: str | None = None
    newer: bool = False

    def check(self) -> None:
        """Raises InvalidInput for what contradicts itself."""
        if self.newest and self.since is not None:
            raise InvalidInput("--newest and --since are both given", hint="choose one of them")


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)


class RefusedPoint(_Shown):
    """A point that is not copied, and why. kind: of the error, as in all JSON"""

    point: int
    kind: str
    message: str


class PointToCopy(_Shown):
    """A point that would be copied. data_bytes: at most so much of the source is read"""

    point: int
    time: datetime
    labels: tuple[str, ...]
    data_bytes: int


class CopiedPoint(_Shown):
    """A point that was copied. point_there: its number at the destination"""

    point: int
    point_there: int
    time: datetime
    content_id: str


class DiskPlan(_Shown):
    """What would be copied of a disk.

    present: how many of the chosen points are there already; keeps_numbers: whether points get the same numbers there
    failed: why nothing of the disk can be copied; None where it can
    """

    disk: str
    points: tuple[PointToCopy, ...] = ()
    present: int = 0
    keeps_numbers: bool = True
    refused: tuple[RefusedPoint, ...] = ()
    failed: str | None = None


class CopyPlan(_Shown):
    """What `run` would do. data_bytes: to be read, at most; what is there already is not stored again."""

    source: str
    destination: str
    disks: tuple[DiskPlan, ...]
    points: int
    data_bytes: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        """Whether nothing that was chosen is left out."""
        return all(disk.failed is None and not disk.refused for disk in self.disks)


class DiskReport(_Shown):
    """What was copied of a disk. Sizes in bytes; fields as of DiskPlan, bytes as of ShipReport."""

    disk: str
    points: tuple[CopiedPoint, ...] = ()
    present: int = 0
    keeps_numbers: bool = True
    refused: tuple[RefusedPoint, ...] = ()
    failed: str | None = None
    bytes_read: int = 0
    bytes_stored: int = 0


class CopyReport(_Shown):
    """What was copied. Sizes in bytes. points: how many"""

    source: str
    destination: str
    disks: tuple[DiskReport, ...]
    points: int
    bytes_read: int
    bytes_stored: int
    seconds: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        """As of CopyPlan."""
        return all(disk.failed is None and not disk.refused for disk in self.disks)


def plan(
    request: CopyRequest, source: Destination, destination: Destination, *, on_event: OnEvent = ignore
) -> CopyPlan:
    """What `run` would do; reads records only, and changes nothing. Raises as that does."""
    _check_places(source, destination)
    disks = tuple(_disk_plan(source, destination, chosen) for chosen in _chosen(request, source))
    _ = on_event
    return CopyPlan(
        source=source.url,
        destination=destination.url,
        disks=disks,
        points=sum(len(disk.points) for disk in disks),
        data_bytes=sum(point.data_bytes for disk in disks for point in disk.points),
    )


def run(
    request: CopyRequest, source: Destination, destination: Destination, *, on_event: OnEvent = ignore
) -> CopyReport:
    """Copy the points that the destination lacks. What could not be copied is in the report.

    Raises InvalidInput and Unsupported for places that do not do, NotFound for a name that is nothing in the source,
    Unavailable and Busy when either side does not answer: the next run continues.
    """
    begun = time.monotonic()
    _check_places(source, destination)
    chosen = _chosen(request, source)
    progress = _Progress(on_event)
    introduced: set[str] = set()

    def introduce(disk: str) -> None:
        guest = guest_named_by(disk)
        if guest is not None and guest not in introduced:
            _introduce(guest, source, destination, on_event)
            introduced.add(guest)

    reports = [_copied(_Disk(each, source, destination, progress, introduce, on_event)) for each in chosen]
    return CopyReport(
        source=source.url,
        destination=destination.url,
        disks=tuple(sorted(reports, key=lambda report: report.disk)),
        points=sum(len(report.points) for report in reports),
        bytes_read=sum(report.bytes_read for report in reports),
        bytes_stored=sum(report.bytes_stored for report in reports),
        seconds=time.monotonic() - begun,
    )


def _check_places(source: Destination, destination: Destination) -> None:
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


# --- which points


@dataclass(frozen=True, slots=True)
class _Chosen:
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
        return self.record.name


def _chosen(request: CopyRequest, source: ReadableDestination) -> list[_Chosen]:
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


def _points_of(request: CopyRequest, disk: DiskRecord, disks: Sequence[DiskRecord]) -> _Chosen:
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
    return _Chosen(disk, points, request.newer, tuple(siblings), failed)


def _since(disk: DiskRecord, text: str) -> tuple[PointRecord, ...]:
    moment = instant(text, now=datetime.now(UTC), zone=local_zone())
    try:
        first = chosen_point(disk.name, disk.points, text if moment is None else moment.isoformat())
    except NotFound:
        if moment is None:
            raise
        return disk.points  # all of them are newer
    return chosen_since(disk.points, first)


def _there(destination: ReadableDestination, disk: str) -> DiskRecord | None:
    try:
        return destination.disks(disk)[0]
    except NotFound:
        return None


def _found_lacking(chosen: _Chosen, there: DiskRecord | None) -> Lacking[PointRecord]:
    return lacking(chosen.points, chosen.record.points, () if there is None else there.points, newer=chosen.newer)


def _too_old(found: Lacking[PointRecord]) -> Iterator[RefusedPoint]:
    for point in found.too_old:
        yield RefusedPoint(
            point=point.point,
            kind=Conflict.kind,
            message="the disk there has newer points of another origin, which it would come after; copy it to another "
            "repository",
        )


def _check_epoch(chosen: DiskRecord, there: DiskRecord | None, url: str) -> None:
    if there is not None and max(1, chosen.epoch) < there.epoch:
        raise Conflict(
            f"it is in epoch {max(1, chosen.epoch)} in the source, and in epoch {there.epoch} there: it was taken over "
            "there, and has gone on without the source",
            subject=f"{url}::{chosen.name}",
            hint="copy the other way, or to another repository",
        )


# --- plan


def _disk_plan(source: Destination, destination: Destination, chosen: _Chosen) -> DiskPlan:
    try:
        if chosen.failed is not None:
            raise chosen.failed
        there = _there(destination, chosen.name)
        _check_epoch(chosen.record, there, source.url)
        found = _found_lacking(chosen, there)
        points, refused = _amounts(source, chosen, there, found)
    except _OF_ONE_DISK as error:
        return DiskPlan(disk=chosen.name, failed=str(error))
    return DiskPlan(
        disk=chosen.name,
        points=tuple(points),
        present=len(found.present),
        keeps_numbers=found.keeps_numbers,
        refused=(*_too_old(found), *refused),
    )


def _amounts(
    source: ReadableDestination, chosen: _Chosen, there: DiskRecord | None, found: Lacking[PointRecord]
) -> tuple[list[PointToCopy], list[RefusedPoint]]:
    points: list[PointToCopy] = []
    refused: list[RefusedPoint] = []
    if not found.points:
        return points, refused
    with source.copying(chosen.name) as reader:
        for point, amount in _read_amounts(reader, chosen.record, there, found.points):
            if isinstance(amount, Corrupt):
                reader.check_there()
                refused.append(_refused(point, amount))
            else:
                points.append(PointToCopy(point=point.point, time=point.time, labels=point.labels, data_bytes=amount))
    return points, refused


def _read_amounts(
    reader: CopyReader, record: DiskRecord, there: DiskRecord | None, points: Sequence[PointRecord]
) -> Iterator[tuple[PointRecord, int | Corrupt]]:
    """Each point with the bytes to be read for it, at most, or why it cannot be read. record: the disk in the source"""
    shown = {_content(point) for point in (() if there is None else there.points)}
    contents = {point.point: _content(point) for point in record.points}
    for point in points:
        try:
            base = next((each for each in reader.on_chain(point.point) if contents.get(each) in shown), None)
            amount = reader.data_bytes(base, point.point)
        except Corrupt as error:
            yield point, error
            continue
        shown.add(_content(point))
        yield point, amount


def _content(point: PointRecord) -> tuple[int, str]:
    return point.virtual_size, point.content_id


def _refused(point: PointRecord, error: SnapchainError) -> RefusedPoint:
    return RefusedPoint(point=point.point, kind=error.kind, message=str(error))


# --- run


@dataclass(slots=True)
class _Progress:
    """Bytes of all disks together: of those that are done, and of the one that is being copied."""

    on_event: OnEvent
    before: int = 0
    expected: int = 0

    def reach(self, done: int) -> None:
        """done: of the disk that is being copied."""
        self.on_event(Progress("copy", self.before + done, self.before + max(self.expected, done)))


def _introduce(guest: str, source: Destination, destination: Destination, on_event: OnEvent) -> None:
    """Make the destination know where the guest comes from: whoever takes it over there asks there first.

    The source is not told: who asks about the guest there need not wait for a copy of it (docs/decisions/0145).
    """
    try:
        standing = source.guest_state(guest)
        others = (standing.here or Place(url=source.url), *standing.others)
        tell_others(destination, guest, others, by=socket.gethostname(), begins=True)
    except (NotFound, Unsupported) as error:
        on_event(Notice(f"{destination.url} is not told of the other destinations of the guest {guest}: {error}"))


def _copied(work: _Disk) -> DiskReport:
    """One disk. What is wrong with it alone is in the report."""
    try:
        if work.chosen.failed is not None:
            raise work.chosen.failed
        for attempt in range(_ATTEMPTS):
            try:
                return work.run()
            except Conflict:
                if attempt == _ATTEMPTS - 1:
                    raise
                work.look_again()
        raise AssertionError("the loop returns or raises")
    except _OF_ONE_DISK as error:
        return work.report(failed=error)


@dataclass(slots=True)
class _Disk:
    """A disk that is being copied, by one or several attempts."""

    chosen: _Chosen
    source: Destination
    destination: Destination
    progress: _Progress
    introduce: Callable[[str], None]
    on_event: OnEvent
    copied: dict[int, CopiedPoint] = field(default_factory=dict)
    refused: dict[int, RefusedPoint] = field(default_factory=dict)
    found: Lacking[PointRecord] | None = None
    present: int | None = None
    bytes_read: int = 0
    bytes_stored: int = 0

    def run(self) -> DiskReport:
        """Copy what is lacking now. Raises Conflict where either side was changed meanwhile: look again."""
        name = self.chosen.name
        there = _there(self.destination, name)
        _check_epoch(self.chosen.record, there, self.source.url)
        if there is None:
            check_no_guest(name, self.destination)
            self.introduce(name)
        self.found = found = _found_lacking(self.chosen, there)
        if self.present is None:
            self.present = len(found.present)
        self.refused = {refused.point: refused for refused in _too_old(found)}
        points = self._complete(found.points)
        epoch = max(1, self.chosen.record.epoch)
        if points or (there is not None and epoch > max(1, there.epoch)):
            with self.source.copying(name, [point.point for point in points], on_event=self.on_event) as reader:
                self.destination.write_copy(
                    Opening(disk=name, epoch=epoch),
                    reader.owner,
                    lambda writer: self._write(reader, writer, points, there),
                    on_event=self.on_event,
                )
        return self.report()

    def look_again(self) -> None:
        """Take what is in the source now of the points that were chosen."""
        record = self.source.disks(self.chosen.name)[0]
        wanted = {identity(point) for point in self.chosen.points}
        points = tuple(point for point in record.points if identity(point) in wanted)
        self.chosen = replace(self.chosen, record=record, points=points)

    def report(self, failed: SnapchainError | None = None) -> DiskReport:
        """What was done by now."""
        return DiskReport(
            disk=self.chosen.name,
            points=tuple(self.copied[number] for number in sorted(self.copied)),
            present=self.present or 0,
            keeps_numbers=self.found is None or self.found.keeps_numbers,
            refused=tuple(self.refused[number] for number in sorted(self.refused)),
            failed=None if failed is None else str(failed),
            bytes_read=self.bytes_read,
            bytes_stored=self.bytes_stored,
        )

    def _complete(self, points: Sequence[PointRecord]) -> list[PointRecord]:
        """The points; of records of a guest those whose disks are there. Else a guest point would come without them."""
        if not self.chosen.siblings:
            return list(points)
        there = {
            disk.name: set(map(identity, disk.points))
            for sibling in self.chosen.siblings
            if (disk := _there(self.destination, sibling.name)) is not None
        }
        complete: list[PointRecord] = []
        for point in points:
            missing = [
                sibling.name
                for sibling in self.chosen.siblings
                for each in sibling.points
                if each.instant == point.instant and identity(each) not in there.get(sibling.name, set())
            ]
            if missing and point.instant is not None:
                self.refused[point.point] = RefusedPoint(
                    point=point.point,
                    kind=NotFound.kind,
                    message=f"the guest point is incomplete there: it lacks the point of {', '.join(missing)}",
                )
            else:
                complete.append(point)
        return complete

    def _write(
        self, reader: CopyReader, writer: CopyWriter, points: Sequence[PointRecord], there: DiskRecord | None
    ) -> None:
        writer.take_epoch()
        begun = writer.traffic
        amounts = _read_amounts(reader, self.chosen.record, there, points)
        self.progress.expected = sum(amount for _, amount in amounts if isinstance(amount, int))
        contents = {point.point: _content(point) for point in self.chosen.record.points}
        try:
            for point in points:
                if point.point not in self.copied:
                    self._write_point(reader, writer, point, contents)
            writer.finish()
        finally:
            self.bytes_read += writer.traffic.read - begun.read
            self.bytes_stored += writer.traffic.stored - begun.stored
            self.progress.before += writer.traffic.read - begun.read

    def _write_point(
        self,
        reader: CopyReader,
        writer: CopyWriter,
        point: PointRecord,
        contents: Mapping[int, tuple[int, str]],
    ) -> None:
        base: int | None = None
        top: HeldLayer | None = None
        try:
            for each in self._on_chain(reader, point.point):
                top = writer.showing(*contents[each]) if each in contents else None
                if top is not None:
                    base = each
                    break
            for layer in self._read(reader, base, point.point):
                top = self._add(writer, layer, top)
        except _SourceDamage as damage:
            reader.check_there()
            self.refused[point.point] = _refused(point, damage.error)
            self.on_event(Notice(f"{self.chosen.name}@{point.point} is not copied: {damage.error}"))
            return
        assert top is not None, "a point has at least one layer"
        if (top.size, top.content_id) != _content(point):
            error = Corrupt(
                f"what was read has the content id {top.content_id}, and the point {point.content_id}",
                subject=f"{self.source.url}::{self.chosen.name}@{point.point}",
                hint="`snapchain verify --read-data` of the source tells which points are affected",
            )
            self.refused[point.point] = _refused(point, error)
            return
        assert self.found is not None
        number = writer.publish_copy(top, point, keeps_number=self.found.keeps_numbers)
        self.copied[point.point] = CopiedPoint(
            point=point.point, point_there=number, time=point.time, content_id=top.content_id
        )

    @staticmethod
    def _on_chain(reader: CopyReader, point: int) -> Iterator[int]:
        try:
            yield from reader.on_chain(point)
        except Corrupt as error:
            raise _SourceDamage(error) from error

    @staticmethod
    def _read(reader: CopyReader, base: int | None, point: int) -> Iterator[ReadLayer]:
        layers = reader.layers(base, point)
        while True:
            try:
                layer = next(layers)
            except StopIteration:
                return
            except Corrupt as error:
                raise _SourceDamage(error) from error
            yield layer

    def _add(self, writer: CopyWriter, layer: ReadLayer, below: HeldLayer | None) -> HeldLayer:
        view = GuardedView(layer.view(None if below is None else partial(writer.view_of, below)))
        new = writer.fitted(
            NewLayer(
                name=layer.name,
                image_format=layer.image_format,
                cluster_size=layer.cluster_size,
                grain=layer.cluster_size,
                sources=layer.sources,
                extents=layer.extents,
                view=view,
                below=None,
                below_sum=empty_sum() if below is None else below.total,
            )
        )
        try:
            added = writer.add(new, below, confirm=_nothing, on_bytes=self.progress.reach)
        except Corrupt as error:
            if view.error is None:
                raise
            raise _SourceDamage(view.error) from error
        try:
            layer.finish()
        except Corrupt as error:
            raise _SourceDamage(error) from error
        return added


class _SourceDamage(Exception):
    """A point cannot be read in the source; no fault of the destination."""

    def __init__(self, error: Corrupt) -> None:
        super().__init__(str(error))
        self.error = error


def _nothing() -> None:
    """What is sealed does not change."""
