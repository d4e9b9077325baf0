"""fence IMAGE DEST::DISK...: was the guest taken over while this host was away, and what do its images hold besides?

    ask the destination -> mark the images -> compare each with the point that was taken over -> keep the rest

Nothing is deleted here.  What the images hold beyond that point is named in ranges and bytes; `--keep-tail` ships them
as a guest of its own, `web1.tail-1`, so that nothing of it is lost when the way back overwrites them.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.destination.protocol import Destination
from snapchain.errors import Busy, InvalidInput, NotFound, SnapchainError
from snapchain.image import scan
from snapchain.model.events import OnEvent, ignore
from snapchain.model.guest_state import GuestChange, GuestStanding, GuestState, Transition
from snapchain.ops.diff import DiffReport, Range, diff, image_side
from snapchain.ops.disk_set import check_disks
from snapchain.ops.fence.mark import is_replaced
from snapchain.ops.guest_places import guest_named_by
from snapchain.ops.ship.request import ShipRequest
from snapchain.ops.ship.run import run as ship
from snapchain.source.notes import Notes
from snapchain.source.ownership import epoch_of, mark_taken_over

_MOST_RANGES = 10_000
"""That a report lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceRequest:
    """disks: an image of this host, and its name at the destination: all of one guest

    keeps_tail: ship what the images hold, as points of another guest; host: the name of this host in the record
    """

    disks: Sequence[tuple[Path, str]]
    keeps_tail: bool = False
    format: str | None = None
    image_dirs: Sequence[Path] = ()
    host: str = field(default_factory=socket.gethostname)

    def guest(self) -> str:
        """The guest. Raises InvalidInput for disks of several, or of none."""
        check_disks(self.disks)
        guests = {guest_named_by(disk) for _, disk in self.disks}
        guest = next(iter(guests))
        if len(guests) != 1 or guest is None:
            raise InvalidInput(
                "the disks must be those of one guest",
                subject=", ".join(disk for _, disk in self.disks),
                hint="such as DEST::web1/vda and DEST::web1/vdb",
            )
        return guest


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)


class Beyond(_Shown):
    """What an image holds that the point does not. point: that was taken over, None where it is not recorded

    epoch: in which this host has written it; marked: files that bear the mark, read-only; kept: as which disk it was
    shipped
    """

    image: str
    disk: str
    epoch: int
    point: int | None
    marked: tuple[str, ...]
    changed_bytes: int
    granularity: int
    ranges: tuple[Range, ...]
    kept: str | None = None


class FenceReport(_Shown):
    """What was found. taken_over: whether another host has taken the guest over: only then anything is marked

    standing: of the guest at the destination, afterwards
    """

    destination: str
    guest: str
    taken_over: bool
    standing: GuestStanding
    disks: tuple[Beyond, ...]
    changed_bytes: int


def plan(request: FenceRequest, destination: Destination, *, on_event: OnEvent = ignore) -> FenceReport:
    """What `run` would find; marks nothing, and records nothing."""
    return _found(request, destination, on_event, changes=False)


def run(request: FenceRequest, destination: Destination, *, on_event: OnEvent = ignore) -> FenceReport:
    """Ask, mark, compare, and keep the tail where that is wished. May be repeated.

    Raises NotFound where the destination has no such guest, Busy where a guest runs on an image: it is marked then.
    """
    return _found(request, destination, on_event, changes=True)


def _found(request: FenceRequest, destination: Destination, on_event: OnEvent, *, changes: bool) -> FenceReport:
    guest = request.guest()
    standing = destination.guest_state(guest)
    epochs = [_epoch(request, image) for image, _ in request.disks]
    if not is_replaced(standing, max(epochs)):
        return FenceReport(
            destination=destination.url, guest=guest, taken_over=False, standing=standing, disks=(), changed_bytes=0
        )
    # All marks first: what is compared afterwards takes long, and nobody may start on any of them meanwhile.
    marked = [_mark(request, image, disk, standing, destination) if changes else () for image, disk in request.disks]
    if changes:
        standing = _step(destination, standing, Transition.RETURN, request.host)
    found = [
        _beyond(request, image, disk, epoch, files, standing, destination, on_event)
        for (image, disk), epoch, files in zip(request.disks, epochs, marked, strict=True)
    ]
    if changes and any(each.changed_bytes for each in found):
        standing = _step(destination, standing, Transition.DIVERGE, request.host)
    if changes and request.keeps_tail:
        found = [_kept(request, each, guest, destination, on_event) for each in found]
    if changes and all(each.kept or not each.changed_bytes for each in found):
        standing = _step(destination, standing, Transition.SETTLE, request.host)
    return FenceReport(
        destination=destination.url,
        guest=guest,
        taken_over=True,
        standing=standing,
        disks=tuple(found),
        changed_bytes=sum(each.changed_bytes for each in found),
    )


def _epoch(request: FenceRequest, image: Path) -> int:
    with scan(image, format=request.format, image_dirs=request.image_dirs) as chain:
        return epoch_of(chain, Notes())


def _mark(
    request: FenceRequest, image: Path, disk: str, standing: GuestStanding, destination: Destination
) -> tuple[str, ...]:
    with scan(image, format=request.format, image_dirs=request.image_dirs) as chain:
        files = mark_taken_over(chain, standing, destination=destination.url, disk=disk, image_dirs=request.image_dirs)
    return tuple(map(str, files))


def _step(destination: Destination, standing: GuestStanding, transition: Transition, host: str) -> GuestStanding:
    """Record what became of the old master; how the guest stands now. Left out where nothing can be written there."""
    legal = {
        Transition.RETURN: (GuestState.ACTIVE,),
        Transition.DIVERGE: (GuestState.ACTIVE, GuestState.SUSPECT),
        Transition.SETTLE: (GuestState.SUSPECT, GuestState.DIVERGED),
    }[transition]
    if standing.state not in legal or standing.token is None:
        return standing
    change = GuestChange(
        guest=standing.guest,
        transition=transition,
        seen=standing.number,
        token=standing.token,
        by=host,
        host=standing.former or host,
    )
    with suppress(SnapchainError):
        standing, _ = destination.change_guest(change)
    return standing


def _beyond(
    request: FenceRequest,
    image: Path,
    disk: str,
    epoch: int,
    marked: tuple[str, ...],
    standing: GuestStanding,
    destination: Destination,
    on_event: OnEvent,
) -> Beyond:
    number = _point(destination, disk, standing)
    difference: DiffReport | None = None
    if number is not None:
        try:
            with (
                destination.leaves(disk, str(number), on_event=on_event) as there,
                image_side(image, format=request.format, image_dirs=request.image_dirs, on_event=on_event) as here,
            ):
                difference = diff(there, here)
        except Busy as error:
            error.hint = "a guest runs on it, although another host has taken it over: shut it down at once"
            raise
    return Beyond(
        image=str(image),
        disk=disk,
        epoch=epoch,
        point=number,
        marked=marked,
        changed_bytes=0 if difference is None else difference.changed_bytes,
        granularity=0 if difference is None else difference.granularity,
        ranges=() if difference is None else difference.ranges[:_MOST_RANGES],
    )


def _point(destination: Destination, disk: str, standing: GuestStanding) -> int | None:
    """The point of a disk that was taken over."""
    try:
        points = destination.disks(disk)[0].points
    except NotFound:
        return None
    if standing.instant is None:
        return points[-1].point if points else None
    return next((each.point for each in points if each.instant == standing.instant), None)


def _kept(request: FenceRequest, found: Beyond, guest: str, destination: Destination, on_event: OnEvent) -> Beyond:
    """Ship an image that holds more than the point, as a disk of another guest."""
    if not found.changed_bytes:
        return found
    disk = f"{guest}.tail-{found.epoch}/{found.disk.rpartition('/')[2]}"
    asked = ShipRequest(
        image=Path(found.image),
        disk=disk,
        labels=("tail",),
        format=request.format,
        image_dirs=request.image_dirs,
        though_given=True,
    )
    ship(asked, destination, on_event=on_event)
    return found.model_copy(update={"kept": disk})
