"""ship --bitmap: the disks of a running guest without overlays, by frozen views and dirty bitmaps (guest/capture.py).

    capture all disks at one instant -> store what is lacking, disk by disk, while the guest runs -> publish the record

A bitmap gets the name of its point's content before that point is published, and the older one goes after it.  So a
killed run leaves at least the bitmap of the point that the destination has.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from pydantic import BaseModel, ConfigDict

from snapchain.destination.guest_record import record_disk
from snapchain.destination.protocol import Destination
from snapchain.destination.writing import Moment, Opening
from snapchain.errors import Busy, Unavailable
from snapchain.guest.capture import Capture, CaptureRequest, Reached, bitmap_name, capture_of, place_of, with_views
from snapchain.guest.capture_qmp import settle, to_capture
from snapchain.guest.protocol import Guest, GuestDisk
from snapchain.guest.quiesce import Quiesced, frozen, with_hooks
from snapchain.guest.snapshot import LeftOut, Quiesce, SnapshotRequest
from snapchain.image import scan
from snapchain.model.consistency import Consistency
from snapchain.model.disk_name import check_disk_name
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.ops.guest_places import introduced
from snapchain.ops.ship import captured
from snapchain.ops.ship.guest import (
    At,
    GuestShipReport,
    GuestShipRequest,
    alone,
    check_no_disk,
    describe,
    naming_disk,
    of_disk,
    publish,
)
from snapchain.ops.ship.request import CapturedBy, ShipReport
from snapchain.source.notes import Notes
from snapchain.source.ownership import check_not_given, epoch_of


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)


class DiskToCapture(_Shown):
    """captured_by: how it would be found out what the destination lacks; virtual_size: bytes"""

    disk: str
    captured_by: CapturedBy
    virtual_size: int


class GuestCapturePlan(_Shown):
    """What `run` would do. guest: its name at the destination."""

    guest: str
    destination: str
    disks: tuple[DiskToCapture, ...]
    left_out: tuple[LeftOut, ...]
    labels: tuple[str, ...]


def plan(
    guest: Guest,
    request: GuestShipRequest,
    capture: CaptureRequest,
    destination: Destination,
    *,
    on_event: OnEvent = ignore,
) -> GuestCapturePlan:
    """What `run` would do; changes nothing on either side. Raises as that does before it begins."""
    request.check()
    name = request.name_of(guest)
    check_no_disk(name, destination)
    chosen, left_out = _chosen(guest, capture)
    disks = []
    for disk in chosen:
        with naming_disk(name, disk.name):
            opening = _opening(disk, request, name, request.epoch)
            with destination.look(opening, on_event=of_disk(disk.name, on_event)) as there:
                held = there.held
            place = place_of(destination.url, opening.disk)
            usable = held and bitmap_name(place, held[-1].content_id) in {each.name for each in disk.active.bitmaps}
            by = CapturedBy.BITMAP if usable else CapturedBy.COMPARED if held else CapturedBy.WHOLE
            disks.append(DiskToCapture(disk=disk.name, captured_by=by, virtual_size=disk.active.virtual_size))
    return GuestCapturePlan(
        guest=name,
        destination=destination.url,
        disks=tuple(disks),
        left_out=left_out,
        labels=tuple(request.labels),
    )


def run(
    guest: Guest,
    request: GuestShipRequest,
    capture: CaptureRequest,
    destination: Destination,
    *,
    on_event: OnEvent = ignore,
) -> GuestShipReport:
    """Capture the disks of a guest, store what a destination lacks of them, and publish one guest point.

    request.snapshot: which of the disks, and how they are quiesced
    Raises as `capture_of` and, for each disk, as `captured.ship`, naming the disk: then no guest point is published.
    """
    begun = time.monotonic()
    request.check()
    name = request.name_of(guest)
    with alone(name, destination.url) as place:
        check_no_disk(name, destination)
        settle(with_views(guest))
        described = describe(guest, destination, on_event=on_event)
        chosen, left_out = _chosen(guest, capture)
        epoch = max(request.epoch, *(_epoch(disk, request, on_event) for disk in chosen))
        record = Opening(disk=record_disk(name), epoch=epoch, epoch_named=request.epoch == epoch, of_guest=True)
        with destination.look(record, on_event=on_event):
            pass  # whatever stands in the way is known before anything is done to the guest
        freeze = partial(_quiesced, guest, request.snapshot, on_event)
        with ExitStack() as stack:
            for disk in chosen:
                if disk.active.path is not None:
                    shown = f"{name}/{disk.name}"
                    stack.enter_context(introduced(disk.active.path, shown, destination, on_event=on_event))
            found = stack.enter_context(capture_of(guest, capture, freeze=freeze, on_event=on_event))
            _check_reached(found, request.snapshot, guest)
            at = At(
                instant=secrets.token_hex(16),
                time=found.time,
                consistency=found.consistency,
                why_not=found.why_not,
                frozen_seconds=found.frozen_seconds,
                left_out=left_out,
            )
            reports = _stored(found, request, name, destination, at, epoch, on_event)
        return publish(guest, described, at, reports, request, destination, place, epoch=epoch, begun=begun)


def _stored(
    found: Capture,
    request: GuestShipRequest,
    name: str,
    destination: Destination,
    at: At,
    epoch: int,
    on_event: OnEvent,
) -> dict[str, ShipReport]:
    reports: dict[str, ShipReport] = {}
    arrived = 0
    for disk in found.disks:
        with naming_disk(name, disk.name):
            opening = Opening(
                disk=f"{name}/{disk.name}",
                epoch=epoch,
                epoch_named=request.epoch == epoch,
                limit_rate=request.limit_rate,
                of_guest=True,
            )
            place = place_of(destination.url, opening.disk)
            report = captured.ship(
                disk,
                opening,
                destination,
                before_publishing=partial(_name_bitmaps, found, disk.name, place),
                time=at.time,
                labels=request.labels,
                moment=Moment(at.instant, at.consistency),
                on_event=of_disk(disk.name, on_event, arrived=arrived),
            )
            reports[disk.name] = report
            arrived += report.bytes_read
            found.drop_bitmaps({disk.name: (place, report.content_id)})
    return reports


def _name_bitmaps(found: Capture, disk: str, place: str, content: str) -> None:
    found.name_bitmaps({disk: (place, content)})


def _chosen(guest: Guest, capture: CaptureRequest) -> tuple[Sequence[GuestDisk], tuple[LeftOut, ...]]:
    taken = to_capture(with_views(guest), capture)
    names = {disk.name for disk in taken}
    left_out = tuple(
        LeftOut(disk=disk.name, reason=disk.left_out or ("not chosen" if disk.chain else "empty"))
        for disk in guest.disks()
        if disk.name not in names
    )
    return taken, left_out


def _opening(disk: GuestDisk, request: GuestShipRequest, name: str, epoch: int) -> Opening:
    check_disk_name(f"{name}/{disk.name}")
    return Opening(disk=f"{name}/{disk.name}", epoch=epoch, epoch_named=request.epoch == epoch)


def _epoch(disk: GuestDisk, request: GuestShipRequest, on_event: OnEvent) -> int:
    """In which epoch this host writes the disk. Raises Conflict where it was given to another host."""
    path = disk.active.path
    if path is None:
        return 1
    try:
        with scan(path, format=disk.active.image_format, image_dirs=request.snapshot.image_dirs) as chain:
            check_not_given(chain, image=path)
            return epoch_of(chain, Notes(), image=path)
    except Busy:
        on_event(Notice.of(disk.name, "the guest writes all the time, so its epoch is not looked up: give --epoch"))
        return 1


@contextmanager
def _quiesced(guest: Guest, request: SnapshotRequest, on_event: OnEvent) -> Iterator[Reached]:
    facts = {"guest": guest.name, "option": guest.option}
    with with_hooks(
        pre_freeze=tuple(request.pre_freeze), post_thaw=tuple(request.post_thaw), facts=facts, on_event=on_event
    ) as tell:
        if request.quiesce is Quiesce.NO:
            reached = Quiesced()
            yield reached
        else:
            with frozen(
                guest,
                required=request.quiesce is Quiesce.REQUIRE,
                freeze_seconds=request.freeze_seconds,
                bound_seconds=request.bound_seconds,
                on_event=on_event,
            ) as reached:
                yield reached
        tell(consistency=str(reached.consistency))


def _check_reached(found: Capture, request: SnapshotRequest, guest: Guest) -> None:
    if request.quiesce is Quiesce.REQUIRE and found.consistency is Consistency.CRASH:
        raise Unavailable(
            f"nothing is stored, since the capture is only crash-consistent: {found.why_not}",
            subject=guest.name,
            hint="run it again",
        )
