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
from dataclasses import dataclass, field, replace
from functools import partial

from snapchain.destination.copying import CopyReader, CopyWriter, GuardedView, ReadLayer
from snapchain.destination.protocol import Destination
from snapchain.destination.records import DiskRecord, PointRecord
from snapchain.destination.writing import HeldLayer, NewLayer, Opening
from snapchain.errors import Conflict, Corrupt, NotFound, SnapchainError, Unsupported
from snapchain.model.content import empty_sum
from snapchain.model.copying import Lacking, identity
from snapchain.model.events import Notice, OnEvent, Progress, ignore
from snapchain.model.guest_state import Place
from snapchain.ops.copy.amounts import content_of, read_amounts, refusal
from snapchain.ops.copy.choose import (
    OF_ONE_DISK,
    ChosenDisk,
    check_epoch,
    check_places,
    choose,
    disk_there,
    found_lacking,
    too_old,
)
from snapchain.ops.copy.request import CopiedPoint, CopyReport, CopyRequest, DiskReport, RefusedPoint
from snapchain.ops.guest_places import guest_named_by, tell_others
from snapchain.ops.ship.run import check_no_guest

_ATTEMPTS = 3
"""How often a disk is looked at anew when it was changed meanwhile, at either side."""


def run(
    request: CopyRequest, source: Destination, destination: Destination, *, on_event: OnEvent = ignore
) -> CopyReport:
    """Copy the points that the destination lacks. What could not be copied is in the report.

    Raises InvalidInput and Unsupported for places that do not do, NotFound for a name that is nothing in the source,
    Unavailable and Busy when either side does not answer: the next run continues.
    """
    begun = time.monotonic()
    check_places(source, destination)
    chosen = choose(request, source)
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
    except OF_ONE_DISK as error:
        return work.report(failed=error)


@dataclass(slots=True)
class _Disk:
    """A disk that is being copied, by one or several attempts."""

    chosen: ChosenDisk
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
        there = disk_there(self.destination, name)
        check_epoch(self.chosen.record, there, self.source.url)
        if there is None:
            check_no_guest(name, self.destination)
            self.introduce(name)
        self.found = found = found_lacking(self.chosen, there)
        if self.present is None:
            self.present = len(found.present)
        self.refused = {refused.point: refused for refused in too_old(found)}
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
            if (disk := disk_there(self.destination, sibling.name)) is not None
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
        amounts = read_amounts(reader, self.chosen.record, there, points)
        self.progress.expected = sum(amount for _, amount in amounts if isinstance(amount, int))
        contents = {point.point: content_of(point) for point in self.chosen.record.points}
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
            self.refused[point.point] = refusal(point, damage.error)
            self.on_event(Notice(f"{self.chosen.name}@{point.point} is not copied: {damage.error}"))
            return
        assert top is not None, "a point has at least one layer"
        if (top.size, top.content_id) != content_of(point):
            error = Corrupt(
                f"what was read has the content id {top.content_id}, and the point {point.content_id}",
                subject=f"{self.source.url}::{self.chosen.name}@{point.point}",
                hint="`snapchain verify --read-data` of the source tells which points are affected",
            )
            self.refused[point.point] = refusal(point, error)
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
