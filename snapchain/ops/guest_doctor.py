"""What killed runs have left in guests: found by the records in the state directory, judged by the guest itself.

thaw        the guest may be frozen                thaw, first of all
snapshot    overlays were made for its disks       in its chains: the snapshot is made; else they are removed
capture     filters are above its disks            they are removed, and the scratch files
migration   the guest was on its way elsewhere     it goes on here, or there: as the destination has recorded
incoming    a guest was on its way to this host    as migration, seen from this side
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import Corrupt, NotFound, Unavailable
from snapchain.guest import capture_qmp, journal, overlays
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.guest.capture import with_views
from snapchain.guest.quiesce import THAW, settle_thaw
from snapchain.model.events import OnEvent
from snapchain.ops.migrate import live_settle

Settle = Callable[[journal.Found, OnEvent], tuple[Path, ...]]
"""Finishes or undoes an operation; the files removed. Raises what stands in the way; the record is then kept."""


@dataclass(frozen=True, slots=True)
class Operation:
    """says: what was interrupted; remedy: what the doctor does; settle: does it"""

    says: str
    remedy: str
    settle: Settle


def _thaw(found: journal.Found, on_event: OnEvent) -> tuple[Path, ...]:
    _ = on_event
    settle_thaw(found)
    return ()


def _overlays(found: journal.Found, on_event: OnEvent) -> tuple[Path, ...]:
    try:
        with open_guest(_address(found), on_event=on_event) as guest:
            return overlays.settle_by_graph(guest, found, on_event=on_event)
    except (NotFound, Unavailable):
        if found.record.qemu_runs is not False:
            raise
        return overlays.settle_files(found)


def _capture(found: journal.Found, on_event: OnEvent) -> tuple[Path, ...]:
    try:
        with open_guest(_address(found), on_event=on_event) as guest:
            capture_qmp.settle_record(found, with_views(guest))
    except (NotFound, Unavailable):
        if found.record.qemu_runs is not False:
            raise
        capture_qmp.settle_record(found, None)
    return ()


def _migration(found: journal.Found, on_event: OnEvent) -> tuple[Path, ...]:
    live_settle.settle(found, on_event=on_event)
    return ()


def _incoming(found: journal.Found, on_event: OnEvent) -> tuple[Path, ...]:
    from snapchain.replica import guest_server

    _ = on_event
    guest_server.settle_record(found)
    return ()


OPERATIONS: dict[str, Operation] = {
    THAW: Operation(
        "the guest was frozen, or about to be, when snapchain and its watchdog were killed",
        "thaws the guest's filesystems",
        _thaw,
    ),
    overlays.OPERATION: Operation(
        "a snapshot of the guest that was interrupted",
        "finishes it if the guest writes to the new overlays already, else removes them",
        _overlays,
    ),
    capture_qmp.OPERATION: Operation(
        "a capture of the guest's disks that was interrupted",
        "removes its filters from the guest, and its scratch files",
        _capture,
    ),
    live_settle.OPERATION: Operation(
        "a live migration of the guest that was interrupted",
        "lets the guest go on here, unless the destination has recorded that it has it",
        _migration,
    ),
    "incoming": Operation(
        "a live migration of the guest to this host that was interrupted",
        "lets the guest run here if it was given to this host, else ends its QEMU and removes its overlays",
        _incoming,
    ),
}
"""By the journal's word, in the order in which they are treated."""


def left_behind(address: GuestAddress | None = None) -> Iterator[journal.Found]:
    """Records of killed runs, a thaw first; of one guest or all. Raises the first fault of a record that is unsound."""
    found, faults = journal.find()
    for operation in OPERATIONS:
        for each in found:
            is_meant = address is None or each.record.address == _absolute(address, each.record)
            if is_meant and each.record.operation == operation and each.record.is_abandoned:
                yield each
    if faults:
        raise faults[0]


def treat(path: Path, *, on_event: OnEvent) -> tuple[Path, ...]:
    """Settle the operation of a record; the files removed. A record that is gone meanwhile needs nothing.

    Raises Unavailable when the guest does not answer, and what its calls raise.
    """
    found = next((each for each in journal.find()[0] if each.path == path), None)
    if found is None:
        return ()
    return OPERATIONS[found.record.operation].settle(found, on_event)


def _address(found: journal.Found) -> GuestAddress:
    if (address := found.record.address) is None:
        raise Corrupt("it does not say how the guest is reached", subject=found.path, hint="remove it")
    return address


def _absolute(address: GuestAddress, record: journal.InFlight) -> GuestAddress:
    """An address of the command line as a record has it; what is not given is as in the record."""
    return GuestAddress(
        domain=address.domain,
        connect=address.connect or (record.connect if address.domain is not None else None),
        qmp=None if address.qmp is None else address.qmp.absolute(),
        agent=None if address.qmp is None or record.agent is None else Path(record.agent),
        name=record.guest if address.qmp is not None else None,
    )
