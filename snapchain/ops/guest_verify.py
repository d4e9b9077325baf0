"""verify, as far as guests go: every record is one, and what it names is there with the recorded content."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import Finding, Findings, VerifyReport
from snapchain.errors import Corrupt, NotFound, SnapchainError, Unavailable
from snapchain.host.terminal import counted
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.guest_checks import CheckKind
from snapchain.ops import guest_checks
from snapchain.ops.guest_points import GuestPoint, GuestView, fault_of, find_guest, guests_of
from snapchain.ops.guest_records import read_record

_FEW = 10
"""Records of each guest that are read at a replica where no data is wanted."""


def verify(
    destination: ReadableDestination,
    name: str | None = None,
    *,
    share: float = 0.0,
    since: datetime | None = None,
    on_event: OnEvent = ignore,
) -> VerifyReport:
    """Check a destination, a disk or a guest of it, and a share (0 to 1) of the data as far as it was not read since.

    Findings are values. A guest point of which a disk is missing is one. Raises as the destination's own `verify`.
    """
    if name is None:
        found = destination.verify(None, share=share, since=since, on_event=on_event)
        guests = guests_of(destination.disks())
        report = _with(found, _of_guests(destination, guests, share=share, on_event=on_event))
        for each in guests:
            _record(destination, each, report, share, on_event)
        return report
    try:
        return destination.verify(name, share=share, since=since, on_event=on_event)
    except NotFound:
        view = find_guest(destination, name)
        if view is None:
            raise
    names = [*view.disks, *([view.record_disk] if view.points else [])]
    reports = [destination.verify(disk, share=share, since=since, on_event=on_event) for disk in names]
    times = [each.verified_since for each in reports]
    report = VerifyReport(
        ok=all(each.ok for each in reports),
        destination=destination.url,
        disks=len(reports),
        points=sum(each.points for each in reports),
        layers=sum(each.layers for each in reports),
        data_read=any(each.data_read for each in reports),
        checked_bytes=sum(each.checked_bytes for each in reports),
        findings=tuple(finding for each in reports for finding in each.findings),
        read_bytes=sum(each.read_bytes for each in reports),
        fresh_bytes=sum(each.fresh_bytes for each in reports),
        stored_bytes=sum(each.stored_bytes for each in reports),
        continued=any(each.continued for each in reports),
        verified_since=None if None in times else min(filter(None, times), default=None),
    )
    report = _with(report, _of_guests(destination, [view], share=1.0, on_event=on_event))
    _record(destination, view, report, share, on_event)
    return report


def _record(
    destination: ReadableDestination, view: GuestView, report: VerifyReport, share: float, on_event: OnEvent
) -> None:
    """Record at the destination what was found about a guest. What no disk is named for may be about it, too."""
    if not view.points:
        return
    about = [each for each in report.findings if each.disk in (None, view.record_disk, *view.disks)]
    words = f"{counted(len(about), 'finding')}, the first: {about[0].message}" if about else ""
    point = view.points[-1].point
    guest_checks.record(
        destination,
        view.name,
        CheckKind.VERIFIED,
        ok=not about,
        point=point,
        share=share,
        words=words,
        on_event=on_event,
    )


def _with(report: VerifyReport, more: Iterator[Finding]) -> VerifyReport:
    findings = Findings()
    for finding in (*report.findings, *more):
        findings.add(finding)
    return report.model_copy(update={"ok": not findings.all(), "findings": findings.all()})


def _of_guests(
    destination: ReadableDestination, views: Sequence[GuestView], *, share: float, on_event: OnEvent
) -> Iterator[Finding]:
    for view in views:
        points = view.points
        if destination.traits.streams and not share:
            points = points[-_FEW:]  # each record is a stream of its own
        for point in points:
            try:
                yield from _of_point(destination, view, point)
            except (Corrupt, NotFound) as error:
                yield Finding.of(error, view.record_disk, (point.point,))
            except Unavailable:
                raise
            except SnapchainError as error:  # a key that may only send reads nothing
                on_event(Notice.of(view.name, f"the records of its guest points were not checked: {error}"))
                break


def _of_point(destination: ReadableDestination, view: GuestView, point: GuestPoint) -> Iterator[Finding]:
    record = read_record(destination, point, disk=view.record_disk)
    for disk in record.disks:
        error = fault_of(point, disk, subject=f"{view.name}@{point.point}")
        if error is not None:
            yield Finding.of(error, view.record_disk, (point.point,))
