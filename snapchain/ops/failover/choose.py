"""The guest point that a failover takes: the newest that is whole and sound on all disks; and what that loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from snapchain.destination.address import in_full
from snapchain.destination.guest_record import GuestRecord
from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import PointRecord
from snapchain.errors import Conflict, Corrupt, NotFound, SnapchainError
from snapchain.ops.failover.request import Loss, Skipped
from snapchain.ops.guest_points import GuestPoint, GuestView, fault_of
from snapchain.ops.guest_records import read_record


@dataclass(frozen=True, slots=True)
class Chosen:
    """A guest point and its record. skipped: newer ones that are not whole"""

    point: GuestPoint
    record: GuestRecord
    skipped: tuple[Skipped, ...]


def choose(destination: ReadableDestination, view: GuestView, wanted: str | None, *, proves: bool) -> Chosen:
    """The newest guest point that is whole, or the one that is wanted.

    Raises NotFound where there is none, Corrupt where the wanted one is not whole.
    """
    unsound = _unsound(destination, view, share=1.0 if proves else 0.0)
    if wanted is not None:
        point = view.point(in_full(wanted))
        record, fault = _judged(destination, view, point, unsound)
        if fault is not None or record is None:
            raise Corrupt(
                f"guest point {point.point} cannot be taken: {fault}",
                subject=f"{destination.url}::{view.name}",
                hint="leave out --to: the newest guest point that is whole is taken",
            )
        return Chosen(point, record, ())
    skipped: list[Skipped] = []
    for point in reversed(view.points):
        record, fault = _judged(destination, view, point, unsound)
        if fault is None and record is not None:
            return Chosen(point, record, tuple(skipped))
        skipped.append(Skipped(guest_point=point.point, reason=fault or "its record cannot be read"))
    why = f"; guest point {skipped[0].guest_point}: {skipped[0].reason}" if skipped else ""
    raise NotFound(
        f"the guest has no guest point that is whole{why}",
        subject=f"{destination.url}::{view.name}",
        hint="`snapchain verify DEST::GUEST` tells what is wrong; `snapchain restore` gets single disks back",
    )


def the_point(destination: ReadableDestination, view: GuestView, instant: str) -> Chosen:
    """The guest point that an earlier run has taken. Raises Conflict where it is gone."""
    point = next((each for each in view.points if each.instant == instant), None)
    if point is None:
        raise Conflict(
            "the guest point that the failover began with is not here any more",
            subject=f"{destination.url}::{view.name}",
            hint="withdraw that failover, and begin anew: `snapchain failover --withdraw`",
        )
    return Chosen(point, read_record(destination, point, disk=view.record_disk), ())


def _judged(
    destination: ReadableDestination, view: GuestView, point: GuestPoint, unsound: Mapping[str, Mapping[int, str]]
) -> tuple[GuestRecord | None, str | None]:
    """The record of a guest point, and what is wrong with the point."""
    try:
        record = read_record(destination, point, disk=view.record_disk)
    except (Corrupt, NotFound) as error:
        return None, error.message
    for disk in record.disks:
        fault: SnapchainError | None = fault_of(point, disk, subject=view.name)
        if fault is not None:
            return record, fault.message
        found = unsound.get(disk.disk, {}).get(point.disks[disk.disk].point)
        if found is not None:
            return record, f"its disk {disk.name} is damaged: {found}"
    return record, None if record.disks else "it has no disks"


def _unsound(destination: ReadableDestination, view: GuestView, *, share: float) -> dict[str, dict[int, str]]:
    """disk -> number of a point -> what is wrong with it"""
    found: dict[str, dict[int, str]] = {}
    for disk in view.disks:
        report = destination.verify(disk, share=share)
        for finding in report.findings:
            for number in finding.points:
                found.setdefault(disk, {}).setdefault(number, finding.message)
    return found


def loss_of(
    destination: ReadableDestination, view: GuestView, point: GuestPoint, *, now: datetime | None = None
) -> Loss:
    """What is lost by going back to a point. Reads maps, and no data."""
    now = now or datetime.now(UTC)
    seconds = max(0.0, (now - point.time).total_seconds())
    known = 0
    for disk, taken in point.disks.items():
        latest = destination.disks(disk)[0].points[-1]
        if latest.point > taken.point:
            known += _data_above(destination, disk, latest, taken.layers)
    before = next((each for each in reversed(view.points) if each.time < point.time), None)
    likely = None
    if before is not None and set(before.disks) == set(point.disks):
        wrote = sum(
            _data_above(destination, disk, taken, before.disks[disk].layers) for disk, taken in point.disks.items()
        )
        likely = int(wrote * seconds / (point.time - before.time).total_seconds())
    return Loss(since=point.time, seconds=seconds, known_bytes=known, likely_bytes=likely)


def _data_above(destination: ReadableDestination, disk: str, top: PointRecord, layers: int) -> int:
    """DATA of the layers of a point above the lowest ones, of which there are so many."""
    if top.layers <= layers:
        return 0
    with destination.reader(disk, str(top.point), chain=True, maps_only=True) as reader:
        return sum(layer.extents.data_bytes for place, layer in enumerate(reader.layers()) if place >= layers)
