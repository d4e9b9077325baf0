"""hold and release: keep a layer or a point whatever a rule says, until its holds are released.

an image's layer   its file stays byte for byte: no merge takes it, neither to write to it nor to replace it
a point            retention never drops it

a guest point      so are the points of all its disks, and of its record

All holds of a destination are listed by `list_holds`.

A hold bears a tag, so that several people or programs may each have their reason, and release only their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from snapchain.destination.guest_record import record_disk
from snapchain.errors import InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.host.path_resolution import place_to_change
from snapchain.model.events import OnEvent, ignore
from snapchain.model.holds import check_tag
from snapchain.source.lineage import held_by_another
from snapchain.source.notes import Hold, LayerNote, Notes

if TYPE_CHECKING:
    from snapchain.destination.reading import ReadableDestination
    from snapchain.destination.records import HoldRecord, PointRecord
    from snapchain.ops.guest_points import GuestPoint


class HeldDisk(BaseModel):
    """A disk of a guest point, and the point of it that is held with it, or released."""

    model_config = ConfigDict(frozen=True)

    disk: str
    point: int


class HoldReport(BaseModel):
    """What is held now. address: the file or the point; holds: all that it has."""

    model_config = ConfigDict(frozen=True)

    address: str
    holds: tuple[Hold, ...]


class GuestHoldReport(HoldReport):
    """The same of a guest point. disks: whose points are held with it, or released."""

    disks: tuple[HeldDisk, ...]


class HeldPoint(BaseModel):
    """A hold of a point, or of a guest point. name: of the disk, or the guest; time: of the point

    disks: of a guest point, those whose points have the hold; its record does not count. Empty for a disk
    """

    model_config = ConfigDict(frozen=True)

    name: str
    point: int
    time: datetime
    labels: tuple[str, ...]
    tag: str
    since: datetime
    reason: str
    guest: bool = False
    disks: tuple[str, ...] = ()


class HoldsReport(BaseModel):
    """All holds of points at a destination, the oldest first."""

    model_config = ConfigDict(frozen=True)

    destination: str
    holds: tuple[HeldPoint, ...]


def list_holds(destination: ReadableDestination, name: str | None = None, *, tag: str | None = None) -> HoldsReport:
    """The holds of a destination, or of one disk or guest of it. tag: only those under it.

    A guest point's holds are listed once, and not once more for each of its disks. Raises NotFound as `log`.
    """
    from snapchain.ops.guest_points import guests_of
    from snapchain.ops.log import log

    disks = log(destination, name).disks
    found: list[HeldPoint] = []
    of_guests: set[tuple[str, int]] = set()
    for point in (point for guest in guests_of(disks) for point in guest.points):
        of_guests |= {(disk, part.point) for disk, part in _parts(point)}
        by_tag: dict[str, list[tuple[str, HoldRecord]]] = {}
        for disk, part in _parts(point):
            for each in part.holds:
                by_tag.setdefault(each.tag, []).append((disk, each))
        found += [
            _held_point(point.guest, point, parts[-1][1]).model_copy(
                update={"guest": True, "disks": tuple(disk for disk, _ in parts if disk in point.disks)}
            )
            for parts in by_tag.values()
        ]
    found += [
        _held_point(disk.name, point, hold)
        for disk in disks
        for point in disk.points
        for hold in point.holds
        if (disk.name, point.point) not in of_guests
    ]
    chosen = [each for each in found if tag is None or each.tag == tag]
    return HoldsReport(
        destination=destination.url, holds=tuple(sorted(chosen, key=lambda each: (each.since, each.name, each.point)))
    )


def _held_point(name: str, point: PointRecord | GuestPoint, hold: HoldRecord) -> HeldPoint:
    return HeldPoint(
        name=name,
        point=point.point,
        time=point.time,
        labels=point.labels,
        tag=hold.tag,
        since=hold.since,
        reason=hold.reason,
    )


def hold_image(path: Path, tag: str, *, reason: str = "", dry_run: bool = False) -> HoldReport:
    """Hold a layer's file. If it has the tag already, only the reason changes.

    dry_run: change nothing, and tell which holds it would have.
    Raises NotFound, InvalidInput for a bad tag, Unsupported for what is no regular file.
    """
    check_tag(tag)
    file = _file(path)

    def held(note: LayerNote) -> LayerNote:
        before = next((each for each in note.holds if each.tag == tag), None)
        hold = Hold(tag=tag, since=before.since if before else datetime.now(UTC), reason=reason)
        return note.model_copy(update={"holds": (*(each for each in note.holds if each.tag != tag), hold)})

    return HoldReport(address=str(file), holds=_changed(file, held, dry_run=dry_run).holds)


def release_image(path: Path, tag: str, *, dry_run: bool = False) -> HoldReport:
    """Take a hold off a layer's file; dry_run: as `hold_image`. Raises NotFound when it has none of this tag.

    Raises Conflict for a hold in a note of another user.
    A file that is gone may have left its holds behind; they are released by its name.
    """
    file = _file(path, may_be_gone=True)
    held = {hold.tag: hold for hold in Notes().of(file).holds}
    if tag in held and held[tag].word_of is not None:
        raise held_by_another(held[tag], file)

    def released(note: LayerNote) -> LayerNote:
        left = tuple(each for each in note.holds if each.tag != tag)
        if len(left) == len(note.holds):
            tags = ", ".join(each.tag for each in note.holds)
            raise NotFound(
                f"it is not held under {tag!r}",
                subject=file,
                hint=f"its holds: {tags}" if tags else "it is not held at all",
            )
        return note.model_copy(update={"holds": left})

    return HoldReport(address=str(file), holds=_changed(file, released, dry_run=dry_run).holds)


def _changed(file: Path, change: Callable[[LayerNote], LayerNote], *, dry_run: bool) -> LayerNote:
    return Notes().changed(file, change) if dry_run else Notes().change(file, change)


def hold_point(
    destination: ReadableDestination,
    disk: str,
    tag: str,
    *,
    point: str | None,
    reason: str = "",
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> HoldReport:
    """Keep a point whatever the rules say. point: the text after '@' of an address; dry_run: as `hold_image`.

    Raises NotFound, InvalidInput, Unsupported for a peer that is too old.
    """
    wanted = _named(destination, disk, point)
    number, holds = destination.hold(disk, wanted, tag, reason=reason, dry_run=dry_run, on_event=on_event)
    return _of_point(destination, disk, number, holds)


def release_point(
    destination: ReadableDestination,
    disk: str,
    tag: str,
    *,
    point: str | None,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> HoldReport:
    """Take a hold off a point; dry_run: as `hold_image`. Raises NotFound when it has none of this tag."""
    wanted = _named(destination, disk, point)
    number, holds = destination.release(disk, wanted, tag, dry_run=dry_run, on_event=on_event)
    return _of_point(destination, disk, number, holds)


def hold_guest(
    destination: ReadableDestination,
    guest: str,
    tag: str,
    *,
    point: str | None,
    reason: str = "",
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> GuestHoldReport:
    """Keep a guest point: the points of all its disks, and of its record. Arguments as `hold_point`.

    A hold of any of them keeps the guest point, so a run that is cut off has held it already; it is run again for the
    others. When one cannot be held, the holds of this run are taken off again.
    Raises NotFound for a guest that is not there, and as `hold_point`.
    """
    check_tag(tag)
    wanted = _named(destination, guest, point)
    found = _guest_point(destination, guest, wanted)
    parts = _parts(found)
    made: list[tuple[str, int]] = []
    holds: tuple[HoldRecord, ...] = ()
    try:
        for disk, part in parts:
            number = str(part.point)
            _, holds = destination.hold(disk, number, tag, reason=reason, dry_run=dry_run, on_event=on_event)
            if not dry_run and all(each.tag != tag for each in part.holds):
                made.append((disk, part.point))
    except SnapchainError:
        for disk, each in made:
            with suppress(SnapchainError):
                destination.release(disk, str(each), tag)
        raise
    return _of_guest(destination, guest, found, holds)


def release_guest(
    destination: ReadableDestination,
    guest: str,
    tag: str,
    *,
    point: str | None,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> GuestHoldReport:
    """Take a hold off a guest point. What an earlier run has released already is left out.

    Raises NotFound when none of its points has a hold of this tag, and as `hold_guest`.
    """
    wanted = _named(destination, guest, point)
    found = _guest_point(destination, guest, wanted)
    parts = _parts(found)
    held = [(disk, part) for disk, part in parts if any(each.tag == tag for each in part.holds)]
    for disk, part in held or parts[-1:]:  # the last one says what holds there are
        destination.release(disk, str(part.point), tag, dry_run=dry_run, on_event=on_event)
    left = tuple(each for each in found.record.holds if each.tag != tag)
    return _of_guest(destination, guest, found, left)


def _guest_point(destination: ReadableDestination, guest: str, wanted: str) -> GuestPoint:
    from snapchain.destination.address import in_full
    from snapchain.ops.guest_points_merge import guest_at

    return guest_at(destination, guest).point(in_full(wanted))


def _parts(point: GuestPoint) -> list[tuple[str, PointRecord]]:
    """The points that belong to a guest point, by their disks; that of the record is the last."""
    return [*point.disks.items(), (record_disk(point.guest), point.record)]


def _of_guest(
    destination: ReadableDestination, guest: str, point: GuestPoint, holds: Sequence[HoldRecord]
) -> GuestHoldReport:
    plain = _of_point(destination, guest, point.point, holds)
    disks = tuple(HeldDisk(disk=disk, point=part.point) for disk, part in point.disks.items())
    return GuestHoldReport(address=plain.address, holds=plain.holds, disks=disks)


def _named(destination: ReadableDestination, disk: str, point: str | None) -> str:
    """Raises InvalidInput where no point is named: the latest is another one tomorrow."""
    if point is None:
        address = f"{destination.url}::{disk}"
        raise InvalidInput(
            "a hold is on one point, and none is named", subject=address, hint=f"such as {address}@latest"
        )
    return point


def _of_point(destination: ReadableDestination, disk: str, number: int, holds: Sequence[HoldRecord]) -> HoldReport:
    shown = tuple(Hold(tag=each.tag, since=each.since, reason=each.reason) for each in holds)
    return HoldReport(address=f"{destination.url}::{disk}@{number}", holds=shown)


def _file(path: Path, *, may_be_gone: bool = False) -> Path:
    found = place_to_change(path, strict=not may_be_gone)
    if found.exists() and not found.is_file():
        raise Unsupported(
            "only a layer that is a regular file can be held", subject=path, hint="a device is never merged away"
        )
    return found
