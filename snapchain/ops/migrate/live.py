"""migrate of a running guest: everything cold goes ahead, then the guest itself, paused for as short as was allowed.

    rounds of seal and ship, as `sync`            the guest runs; nothing here depends on the destination
    overlays there, empty                         record "moving", watchdog
    the move itself, by the kind of guest         live_qmp.py, live_libvirt.py

Whatever fails, and Ctrl-C, ends as `live_settle` has it: up to the switch with the guest running here as before.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from pydantic import JsonValue

from snapchain.errors import Busy, Conflict, SnapchainError
from snapchain.guest import journal
from snapchain.guest.address import GuestAddress
from snapchain.guest.disks import disks_to_protect
from snapchain.guest.libvirt_guest import LibvirtGuest
from snapchain.guest.protocol import Guest, GuestDisk
from snapchain.guest.qmp_guest import QmpGuest
from snapchain.host.hooks import missing, run_hook
from snapchain.host.processes import held_back
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.ops.migrate import live_settle
from snapchain.ops.migrate.elsewhere import Elsewhere
from snapchain.ops.migrate.live_kind import Asked, LiveKind, Moved
from snapchain.ops.migrate.live_libvirt import LibvirtKind
from snapchain.ops.migrate.live_prepare import prepare, ship
from snapchain.ops.migrate.live_qmp import QmpKind
from snapchain.ops.migrate.live_request import (
    AbortPlan,
    AbortReport,
    InterruptedMove,
    LiveDiskPlan,
    LivePlan,
    LiveReport,
    LiveRequest,
    SettledMove,
)
from snapchain.ops.migrate.live_settle import MoveRecord
from snapchain.ops.migrate.live_watchdog import MoveWatchdog
from snapchain.ops.sync.guests import requests_of
from snapchain.ops.sync.request import SetReport
from snapchain.ops.sync.run import check_set
from snapchain.replica.endpoint import GuestEndpoint


def plan_live(guest: Guest, request: LiveRequest, endpoint: GuestEndpoint, *, on_event: OnEvent = ignore) -> LivePlan:
    """What `migrate_live` would do; changes nothing on either side. Raises as its checks."""
    request.check()
    disks = disks_to_protect(guest)
    kind = _kind(Asked(guest, request, endpoint, "0" * 32, on_event), disks)
    kind.check(disks)
    requests, _ = requests_of(
        guest, prefix=request.prefix, migrating=lambda _: None, image_dirs=request.image_dirs, on_event=on_event
    )
    stands = check_set(requests, endpoint, on_event=on_event)
    return LivePlan(
        guest=guest.name,
        destination=endpoint.url,
        disks=tuple(
            LiveDiskPlan(disk=each.disk, image=each.image, bytes_to_send=each.bytes_to_send, bytes_left=each.bytes_left)
            for each in stands.disks
        ),
        max_downtime=request.max_downtime,
        memory_dirty_rate=kind.dirty_rate(),
    )


def settle_left(guest: Guest, *, is_gone: bool = False, on_event: OnEvent = ignore) -> list[SettledMove]:
    """End what killed runs have left of moves of this guest. Raises as `live_settle.settle`."""
    monitor = guest.monitor if isinstance(guest, QmpGuest) else None
    return [
        live_settle.settle(found, monitor=monitor, is_gone=is_gone, on_event=on_event)
        for found in live_settle.abandoned(guest.name, guest.process())
    ]


def abort(address: GuestAddress, *, is_gone: bool = False, on_event: OnEvent = ignore) -> AbortReport:
    """As `settle_left`, also for a guest whose QEMU has ended. Raises Busy where its migration is under way."""
    settled = [live_settle.settle(found, is_gone=is_gone, on_event=on_event) for found in _interrupted(address)]
    return AbortReport(settled=tuple(settled))


def plan_abort(address: GuestAddress) -> AbortPlan:
    """What `abort` would end; changes nothing, and asks nobody. Raises Busy as that."""
    return AbortPlan(
        interrupted=tuple(
            InterruptedMove(guest=each.record.guest, destination=found.destination, stage=found.stage, time=at)
            for each in _interrupted(address)
            for found, at in [(live_settle.record_of(each), each.record.time)]
        )
    )


def _interrupted(address: GuestAddress) -> list[journal.Found]:
    found = [each for each in journal.find(operation=live_settle.OPERATION)[0] if _names(address, each.record)]
    for each in found:
        if not each.record.is_abandoned:
            raise Busy(
                "its migration is under way",
                subject=each.record.guest,
                hint=f"interrupt that command, by Ctrl-C or `kill -INT {each.record.writer[0]}`: up to the switch the "
                "guest goes on here",
            )
    return found


def _names(address: GuestAddress, record: journal.InFlight) -> bool:
    """Whether a record is of the guest of an address; a domain is named by its name or its UUID."""
    if address.qmp is not None:  # /var/run is mostly a link to /run
        return record.qmp is not None and os.path.realpath(record.qmp) == os.path.realpath(address.qmp)
    domain = record.details.get("domain")
    uuid = domain.get("uuid") if isinstance(domain, dict) else None
    return record.domain is not None and address.domain in (record.domain, record.guest, uuid)


def migrate_live(
    guest: Guest, request: LiveRequest, endpoint: GuestEndpoint, *, on_event: OnEvent = ignore
) -> LiveReport:
    """Move it; all disks or none.

    Raises Conflict, Unsupported or Busy for what stands in the way, before anything is done; Conflict with the figures
    where the pause cannot be kept below the bound; Unavailable for what fails on the way. Then the guest runs here as
    before, unless the error says that only the destination knows.
    """
    begun = time.monotonic()
    request.check()
    for which, hook in (("before", request.before), ("after", request.after)):
        if hook and (fault := missing(which, hook)):
            raise fault
    for settled in settle_left(guest, on_event=on_event):
        on_event(Notice.of(guest.name, f"an interrupted migration was ended first: {settled.says}"))
        if settled.moved:
            raise Conflict(
                f"an interrupted migration has ended now: {settled.says}", subject=f"{guest.name} at {endpoint.url}"
            )
    asked = Asked(guest, request, endpoint, secrets.token_hex(16), on_event)
    disks = disks_to_protect(guest)
    kind = _kind(asked, disks)
    kind.check(disks)
    facts = {"guest": guest.name, "destination": endpoint.url, "disks": len(disks)}
    if request.before:
        run_hook("before", request.before, facts)
    shipped = ship(guest, request, endpoint, on_event)
    record = prepare(guest, request, endpoint, asked.token, on_event)
    elsewhere = Elsewhere(replace(record.request, reach=request.reach), endpoint, on_event)
    elsewhere.announce(record.disks[0].mark.epoch - 1)
    moved = _Work(asked, kind).run(record, shipped)
    elsewhere.tell_afterwards(asked.token, record.disks[0].mark.epoch)
    report = moved.report(shipped, seconds=time.monotonic() - begun)
    if request.after:
        run_hook("after", request.after, {**facts, "pause": report.pause, "qmp": report.qmp})
    return report


def _kind(asked: Asked, disks: Sequence[GuestDisk]) -> LiveKind:
    if isinstance(asked.guest, QmpGuest):
        return QmpKind(asked, asked.guest, disks)
    assert isinstance(asked.guest, LibvirtGuest), "there are two kinds"
    return LibvirtKind(asked, asked.guest)


class _Work:
    """One move, from its record on."""

    def __init__(self, asked: Asked, kind: LiveKind) -> None:
        self._asked, self._kind, self._name, self._on_event = asked, kind, asked.guest.name, asked.on_event

    def run(self, record: MoveRecord, shipped: SetReport) -> Moved:
        """Do it. Where it fails, it is undone before the error is raised."""
        record = self._kind.begin(record)
        moved = Moved(record, self._name, self._asked.request.max_downtime)
        values: dict[str, JsonValue] = record.model_dump(mode="json")
        begun = journal.begun(self._asked.guest, live_settle.OPERATION, **values)
        found = journal.Found(journal.write(begun), begun)
        watchdog = MoveWatchdog(found.path)
        try:
            with self._undone_on_error(found):
                self._kind.move(found, moved, shipped)
        finally:
            watchdog.release()
        return moved

    @contextmanager
    def _undone_on_error(self, found: journal.Found) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            with held_back():
                self._settle(found, error)
            raise

    def _settle(self, found: journal.Found, error: BaseException) -> None:
        now = live_settle.current(found)
        if now is None:
            return  # it was done; a signal came after that
        try:
            settled = self._kind.settle(now)
        except SnapchainError as fault:
            words = f"the migration could not be ended, and the next run, or --abort, does that: {fault}"
            self._on_event(Notice.of(self._name, words))
            if isinstance(error, SnapchainError):
                error.hint = fault.hint
        else:
            words = "is done all the same" if settled.moved else "was given up"
            self._on_event(Notice.of(self._name, f"the migration {words}: {settled.says}"))
