"""Capture the disks of a guest through QEMU's monitor: one block from the instant to the end of all of it.

A journal record (capture_record.py) names what is made in the guest (capture_filters.py, capture_bitmaps.py) before it
is made, so `undo` can remove what a killed run has left: each step looks first at what is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial

from snapchain.errors import Busy, InvalidInput, NotFound, SnapchainError
from snapchain.guest import journal
from snapchain.guest.capture import CLUSTER, CapturedDisk, CaptureRequest, Freeze, Reached, as_it_comes
from snapchain.guest.capture_bitmaps import copied, drop_older, name_new
from snapchain.guest.capture_filters import (
    check_server,
    check_supported,
    export_views,
    planned,
    remove_files,
    take_instant,
    undo,
    written_since,
)
from snapchain.guest.capture_record import CaptureInFlight, Monitor
from snapchain.guest.nbd_client import NbdExport
from snapchain.guest.protocol import GuestDisk, Layer
from snapchain.guest.qmp_guest import QmpGuest
from snapchain.host.os_errors import os_errors
from snapchain.host.process_identity import own_identity
from snapchain.image.file import fingerprint_of
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.fingerprint import Fingerprint

Journal = Callable[[CaptureInFlight], Callable[[], None]]
OPERATION = "capture"
"""The journal's word."""


class QmpCapture:
    """Implements `guest.capture.Capture`."""

    def __init__(
        self, monitor: Monitor, plan: CaptureInFlight, disks: Sequence[CapturedDisk], time: datetime, how: Reached
    ) -> None:
        self._monitor, self._plan = monitor, plan
        self.disks, self.time = tuple(disks), time
        self.consistency, self.why_not, self.frozen_seconds = how.consistency, how.why_not, how.frozen_seconds

    def name_bitmaps(self, names: Mapping[str, tuple[str, str]]) -> None:
        """See `Capture`."""
        name_new(self._monitor, self._plan, names)

    def drop_bitmaps(self, names: Mapping[str, tuple[str, str]]) -> None:
        """See `Capture`."""
        drop_older(self._monitor, self._plan, names)


@contextmanager
def capture_of(
    guest: QmpGuest, request: CaptureRequest, *, freeze: Freeze = as_it_comes, on_event: OnEvent = ignore
) -> Iterator[QmpCapture]:
    """See `capture.capture_of`."""
    settle(guest)
    disks = to_capture(guest, request)
    with captured(
        guest.monitor,
        disks,
        request,
        guest=guest.name,
        journal=partial(_journalled, guest),
        freeze=freeze,
        on_event=on_event,
    ) as found:
        yield found


def to_capture(guest: QmpGuest, request: CaptureRequest) -> list[GuestDisk]:
    """The disks that a capture takes. Raises as `capture_of` does before anything is made."""
    check_supported(guest.monitor, guest=guest.name)
    for each in journal.find(guest=guest.name, operation=OPERATION)[0]:
        if not each.record.is_abandoned and each.record.writer != own_identity():
            raise Busy(
                f"another snapchain (pid {each.record.writer[0]}) captures the guest now",
                subject=guest.name,
                hint="wait for its end",
            )
    at_work = [each for each in guest.activities() if each.kind != "export"]
    if at_work:
        raise Busy(f"something is at work in the guest: {at_work[0].says}", subject=guest.name, hint="wait for its end")
    check_server(guest.monitor, guest=guest.name)
    found = [disk for disk in guest.disks() if disk.left_out is None and disk.chain]
    for name in request.disks:
        if name not in {disk.name for disk in found}:
            raise NotFound(
                f"the guest has no disk {name} that can be captured",
                subject=guest.name,
                hint=f"it has {', '.join(disk.name for disk in found) or 'none'}",
            )
    chosen = [disk for disk in found if not request.disks or disk.name in request.disks]
    if not chosen:
        raise NotFound("the guest has no disk that can be captured", subject=guest.name, hint="see `snapchain guests`")
    return chosen


def settle(guest: QmpGuest) -> None:
    """Remove what killed runs have left in a guest. Raises what QEMU refuses it with."""
    for found in journal.abandoned(guest=guest.name, process=guest.process(), operations=(OPERATION,)):
        settle_record(found, guest)


def settle_record(found: journal.Found, guest: QmpGuest | None) -> None:
    """Undo the capture of a killed run. guest: None where its QEMU has ended: then only files are left."""
    plan = CaptureInFlight.model_validate(found.record.details)
    if guest is not None and found.record.qemu_runs is not False:
        undo(guest.monitor, plan)
    remove_files(plan)
    journal.remove(found.path)


def _journalled(guest: QmpGuest, plan: CaptureInFlight) -> Callable[[], None]:
    record = journal.begun(guest, OPERATION, **plan.model_dump(mode="json"))
    return partial(journal.remove, journal.write(record))


@contextmanager
def captured(
    monitor: Monitor,
    disks: Sequence[GuestDisk],
    request: CaptureRequest,
    *,
    guest: str,
    journal: Journal,
    freeze: Freeze = as_it_comes,
    on_event: OnEvent = ignore,
) -> Iterator[QmpCapture]:
    """A block in which the disks of a guest can be read as they were at one instant.

    disks: those to capture, looked at now; guest: for people
    journal: stores what is about to be made, durably, and returns what forgets it
    Raises Unsupported for a QEMU without the filter, Busy where something else is at work on a disk or somebody else
    has the NBD server, Unavailable where the view broke or the monitor is gone.
    """
    check_supported(monitor, guest=guest)
    check_server(monitor, guest=guest)
    chosen = [disk for disk in disks if not request.disks or disk.name in request.disks]
    if not chosen:
        raise InvalidInput("there is no disk to capture", subject=guest)
    plan = planned(monitor, chosen, request, guest=guest)
    forget = journal(plan)
    try:
        with ExitStack() as stack:
            time, how = take_instant(monitor, plan, chosen, request, freeze)
            bitmaps = copied(monitor, plan)
            export_views(monitor, plan, bitmaps)
            found = [
                CapturedDisk(
                    disk.name,
                    path=disk.active.path,
                    image_format="raw" if disk.active.image_format == "raw" else "qcow2",
                    sources=_sources(disk.chain),
                    export=stack.enter_context(NbdExport(plan.socket, plan.export(number), unit=CLUSTER)),
                    written_since=partial(written_since, monitor, plan, number),
                    bitmaps=bitmaps[number],
                )
                for number, disk in enumerate(chosen)
            ]
            yield QmpCapture(monitor, plan, found, time, how)
    finally:
        try:
            undo(monitor, plan)
            remove_files(plan)
            forget()
        except SnapchainError as fault:
            # The guest goes on with the filters. What ended the block is the better error, where there is one.
            on_event(
                Notice.of(guest, f"the filters of its capture are still there, and the next run removes them: {fault}")
            )


def _sources(chain: Sequence[Layer]) -> tuple[Fingerprint, ...]:
    """Keys of the files: those of sealed ones are true; the active one's has its inode, and matches no file."""
    found = []
    for number, layer in enumerate(chain):
        if layer.path is None or layer.is_block_device:
            return ()
        with os_errors(layer.path):
            mark = fingerprint_of(os.stat(layer.path))  # noqa: PTH116 - as image.file has it
        if number == len(chain) - 1:
            mark = Fingerprint(inode=mark.inode, size=0, mtime_ns=0, ctime_ns=0)
        found.append(mark)
    return tuple(found)
