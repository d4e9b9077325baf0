"""The answer to ASK: the points of a replica, and whether it is sound.

    ASK  ->  DISK* DONE                                    what points there are, or each disk in short
         ->  (PROGRESS* FINDING* VERDICT)* DONE            whether records, or data, are sound

Nothing is made, locked or changed, except that an interrupted merge is finished or undone first.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from snapchain.errors import Busy, Corrupt, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.host.os_errors import os_errors
from snapchain.image import ImageChain, ImageFile
from snapchain.image.leaves import counted
from snapchain.image.pread import file_bytes
from snapchain.image.qcow2.refcounts import refcounts
from snapchain.image.qcow2.tables import ImageFd
from snapchain.model.content import content_id, empty_sum
from snapchain.model.events import ByteCount
from snapchain.model.freshness import candidates
from snapchain.replica.arrival import opened_chain
from snapchain.replica.catalogue import Catalogue, Point
from snapchain.replica.guest_store import guest_of, read_standing
from snapchain.replica.merge_journal import is_under_way, wait_for_merge
from snapchain.replica.store import ReplicaDisk, open_replica
from snapchain.replica.stream.fields import POINTS_AT_ONCE
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.messages import (
    PROGRESS,
    AddedPoint,
    Ask,
    BriefDisk,
    BriefPoint,
    DiskFiles,
    Finding,
    HeldDisk,
    HeldPoint,
    Verdict,
)
from snapchain.replica.stream.requests import Feature

if TYPE_CHECKING:
    from snapchain.replica.receiver import Receiver


def answer(receiver: Receiver, request: Ask) -> None:
    """ASK: all but DONE. Raises NotFound where there is no such replica or disk."""
    session = receiver.session
    replica = open_replica(receiver.root(request.replica))
    disks = replica.disks() if request.disk is None else [replica.disk(request.disk)]
    if request.want == "summary":
        for disk in disks:
            if (brief := _brief(disk, datetime.now(UTC))) is not None:
                session.reply(Kind.DISK, brief)
        session.done()
        return
    if request.want == "files":
        for disk in disks:
            for part in _files(disk):
                session.reply(Kind.DISK, part)
        session.done()
        return
    if request.want == "points":
        for disk in disks:
            found = _settled(disk)
            if found is None:
                if request.disk is not None:
                    raise NotFound(f"there is no disk {disk.name!r} here", subject=disk.directory.parent)
                continue  # its first layer was on its way when they were listed: that keeps nobody from the others
            for page in _pages(found, session.features):
                session.reply(Kind.DISK, page)
        session.done()
        return
    share = request.share if request.want == "data" else 0.0
    # A catalogue that cannot be read is a finding later; here it adds nothing.
    total = int(share * sum(_data_bytes(disk) for disk in disks))
    count = ByteCount(total, lambda done, total: session.reply(Kind.PROGRESS, PROGRESS.pack(done, total)))
    for disk in disks:
        checked = check_disk(disk, share=share, on_bytes=count.add)
        for finding in checked.findings:
            session.reply(Kind.FINDING, finding)
        session.reply(Kind.VERDICT, checked.verdict)
    session.done()


def _settled(disk: ReplicaDisk) -> Catalogue | None:
    with suppress(Busy, InvalidInput, Unsupported):  # its points are listed all the same
        wait_for_merge(disk, patience=0)
    return disk.read()


def _brief(disk: ReplicaDisk, now: datetime) -> BriefDisk | None:
    """A disk in short; None where its first layer is on its way. One that cannot be read hides no other."""
    try:
        found = _settled(disk)
        guest = guest_of(disk.name)
        standing = read_standing(disk.root, guest) if guest else None
    except SnapchainError as error:
        return BriefDisk(disk=disk.name, kind=error.kind, message=str(error)[:4000])
    if found is None:
        return None
    return BriefDisk(
        disk=disk.name,
        epoch=found.epoch,
        points=len(found.points),
        layers=len(found.layers),
        newest=tuple(
            BriefPoint(point=each.point, time=each.time, size=each.size) for each in candidates(found.points, now)
        ),
        of_guest=standing is not None or any(point.instant for point in found.points),
    )


def _files(disk: ReplicaDisk) -> Iterator[DiskFiles]:
    """What the files of a disk take. One that cannot be read hides no other."""
    try:
        found = _settled(disk)
        if found is None:
            return
        with os_errors(disk.directory):
            sizes = [disk.path(layer.file).stat().st_blocks * 512 for layer in found.layers]
    except SnapchainError as error:
        yield DiskFiles(disk=disk.name, kind=error.kind, message=str(error)[:4000])
        return
    heights = {layer.id: number for number, layer in enumerate(found.layers, 1)}
    points, reached = [], 0
    for point in found.points:
        height = max(reached, heights[point.layer])
        points.append(AddedPoint(point=point.point, time=point.time, added=sum(sizes[reached:height])))
        reached = height
    data = sum(each.data_bytes for each in found.layers)
    totals = {"stored": sum(sizes), "data": data, "other": sum(sizes[reached:])}
    for at in range(0, max(1, len(points)), POINTS_AT_ONCE):
        page = tuple(points[at : at + POINTS_AT_ONCE])
        yield DiskFiles(disk=disk.name, files=len(sizes), points=page, **totals)


def held_point(point: Point, layers: int, features: Collection[str]) -> HeldPoint:
    """A point as a client sees it. layers: length of its chain; features: of the client."""
    with_moment = Feature.GUEST_POINT in features
    return HeldPoint(
        point=point.point,
        time=point.time,
        labels=point.labels,
        size=point.size,
        content_id=point.content_id,
        layers=layers,
        holds=point.holds if Feature.HOLD in features else (),
        instant=point.instant if with_moment else None,
        consistency=point.consistency if with_moment else None,
    )


def _pages(catalogue: Catalogue, features: Collection[str]) -> Iterator[HeldDisk]:
    heights = {layer.id: number for number, layer in enumerate(catalogue.layers, 1)}
    points = [held_point(point, heights[point.layer], features) for point in catalogue.points]
    for at in range(0, max(1, len(points)), POINTS_AT_ONCE):
        page = tuple(points[at : at + POINTS_AT_ONCE])
        yield HeldDisk(disk=catalogue.disk, epoch=catalogue.epoch, points=page)


def _data_bytes(disk: ReplicaDisk) -> int:
    try:
        catalogue = disk.read()
    except SnapchainError:
        return 0
    return 0 if catalogue is None else sum(layer.data_bytes for layer in catalogue.layers)


# --- data: every layer is read and compared with its recorded content id


@dataclass(frozen=True, slots=True)
class BrokenLayer:
    """A layer that does not show what it should, or whose reference counts would lead a writer astray."""

    file: str
    shown: str
    recorded: str
    counts: str | None = None

    @property
    def message(self) -> str:
        """What is wrong."""
        if self.shown != self.recorded:
            return f"it shows the content {self.shown}, recorded is {self.recorded}"
        return f"its reference counts are wrong, though it shows what it should: {self.counts}"


def verify_disk(disk: ReplicaDisk, *, share: float = 1.0, on_bytes: Callable[[int], None]) -> list[BrokenLayer]:
    """Read layers, compare what the chain shows at each with the catalogue, and count; what is wrong, root first.

    share: the probability with which each layer is read; its content is counted from the record of the one below it,
    so a layer can be checked without the others

    A layer is counted from the sum recorded for the one below it: the lowest of the findings has a fault, those above
    it may only lie on it.
    on_bytes: called with the bytes read since the last call
    Raises Corrupt when files are missing, replaced, or linked otherwise, or one cannot be read.
    """
    catalogue = disk.read()
    if catalogue is None or catalogue.tip is None:
        return []
    found: list[BrokenLayer] = []
    with opened_chain(disk, catalogue, catalogue.tip) as chain:
        below: ImageChain | None = None
        total = empty_sum()
        for number, layer in enumerate(catalogue.layers):
            view = chain.at(number)
            if share < 1 and random.random() >= share:  # noqa: S311
                below, total = view, layer.sum()
                continue
            shown = content_id(view.size, counted(view.top.extents, view, below, total, on_bytes=on_bytes))
            counts = _miscounted(view.top)
            if shown != layer.content_id or counts is not None:
                found.append(BrokenLayer(layer.file, shown, layer.content_id, counts))
            below, total = view, layer.sum()
    return found


def _miscounted(file: ImageFile) -> str | None:
    """What `qemu-img check` would report; None for neither errors nor leaks."""
    assert file.header is not None, "a replica's layers are qcow2"
    try:
        found = refcounts(ImageFd(file.fileno(), file_bytes(file.fileno()), file.header, file.path))
    except Corrupt as error:
        return error.message
    if not found.errors and not found.leaks:
        return None
    return f"{found.errors} clusters have too low a count, {found.leaks} too high a one"


# --- one disk
#
# A disk may be changed meanwhile. So a finding counts only if the catalogue has not changed since; otherwise the disk
# is checked again.

_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found of one disk."""

    verdict: Verdict
    findings: tuple[Finding, ...]


def check_disk(disk: ReplicaDisk, *, share: float, on_bytes: Callable[[int], None]) -> Checked:
    """Check a disk. share: the probability with which each layer is read too, and compared with its record.

    on_bytes: called with the bytes read since the last call
    Raises NotFound for a disk that has no catalogue, Unsupported for the catalogue of a newer snapchain, Busy when it
    changes all the time.
    """
    for _ in range(_ATTEMPTS):
        wait_for_merge(disk)
        try:
            catalogue = disk.read()
        except Unsupported:  # of a newer snapchain: nothing is damaged
            raise
        except SnapchainError as error:
            finding = _finding(disk, error.kind, error.subject, error.message, ())
            return Checked(Verdict(disk=disk.name, points=0, layers=0, checked_bytes=0), (finding,))
        if catalogue is None:
            raise NotFound(f"there is no disk {disk.name!r} here", subject=disk.directory)
        read = 0

        def counted(count: int) -> None:
            nonlocal read
            read += count
            on_bytes(count)

        findings = _findings(disk, catalogue, share=share, on_bytes=counted)
        if not findings or (not is_under_way(disk) and disk.read() == catalogue):
            layers = len(catalogue.layers)
            verdict = Verdict(disk=disk.name, points=len(catalogue.points), layers=layers, checked_bytes=read)
            return Checked(verdict, tuple(findings))
    raise Busy("the disk changes while it is looked at", subject=disk.directory, hint="run it again")


def _findings(
    disk: ReplicaDisk, catalogue: Catalogue, *, share: float, on_bytes: Callable[[int], None]
) -> list[Finding]:
    if catalogue.tip is None:
        return []
    try:
        if not share:
            opened_chain(disk, catalogue, catalogue.tip).close()
            return []
        wrong = verify_disk(disk, share=share, on_bytes=on_bytes)
    except SnapchainError as error:
        return [_finding(disk, error.kind, error.subject, error.message, _points_from(catalogue, None))]
    return [
        _finding(
            disk,
            "corrupt",
            str(disk.path(each.file)),
            each.message,
            _points_from(catalogue, each.file),
        )
        for each in wrong
    ]


def _points_from(catalogue: Catalogue, file: str | None) -> tuple[int, ...]:
    """The points whose chains have that file; all of them where none is named."""
    files = [layer.file for layer in catalogue.layers]
    first = 0 if file is None or file not in files else files.index(file)
    above = {layer.id for layer in catalogue.layers[first:]}
    return tuple(point.point for point in catalogue.points if point.layer in above)


def _finding(disk: ReplicaDisk, kind: str, subject: str | None, message: str, points: tuple[int, ...]) -> Finding:
    return Finding(
        disk=disk.name,
        kind=kind,
        subject=None if subject is None else subject[:1000],
        message=message[:4000],
        points=points,
    )
