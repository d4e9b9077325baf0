"""Holds of points at a replica, which its catalogue keeps.

HOLD, RELEASE  ->  HELD DONE
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from snapchain.errors import NotFound, Unsupported
from snapchain.model import holds
from snapchain.model.points import chosen_point
from snapchain.replica.arrival import settle
from snapchain.replica.catalogue import FOR_CHANGES, Catalogue, Point
from snapchain.replica.store import ReplicaDisk, Work, in_turn, open_replica
from snapchain.replica.stream.fields import MOST_HOLDS
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.messages import Held, Hold, HoldPoint, ReleasePoint

if TYPE_CHECKING:
    from snapchain.replica.receiver import Receiver

Change = Callable[[Catalogue, Point], Sequence[Point] | None]


def hold(receiver: Receiver, request: HoldPoint) -> None:
    """HOLD. Raises NotFound where there is no such disk or point, Unsupported for too many holds, Busy."""

    def made(before: holds.Held | None) -> Hold:
        since = datetime.now(UTC) if before is None else before.since
        return Hold(tag=request.tag, since=since, reason=request.reason)

    def held(catalogue: Catalogue, point: Point) -> Sequence[Point] | None:
        if len([each for each in point.holds if each.tag != request.tag]) == MOST_HOLDS:
            raise Unsupported(f"point {point.point} has {MOST_HOLDS} holds, and no more are allowed")
        return holds.held(
            catalogue.points, point.point, request.tag, reason=request.reason, make=made, disk=request.disk
        )

    _answer(receiver, request, held)


def release(receiver: Receiver, request: ReleasePoint) -> None:
    """RELEASE. Raises NotFound where there is no such disk, point or hold, Busy."""
    _answer(
        receiver,
        request,
        lambda catalogue, point: holds.released(catalogue.points, point.point, request.tag, disk=request.disk),
    )


def _answer(receiver: Receiver, request: HoldPoint | ReleasePoint, change: Change) -> None:
    disk = open_replica(receiver.root(request.replica)).disk(request.disk)
    catalogue = _existing(disk, disk.read())  # nothing is locked for a disk that is not there
    point = chosen_point(disk.name, catalogue.points, request.point)
    points: Sequence[Point] | None
    if request.dry_run:
        points = change(catalogue, point)
    else:
        with in_turn(disk, Work.TRANSFER):
            catalogue = _existing(disk, settle(disk))
            point = chosen_point(disk.name, catalogue.points, request.point)
            points = change(catalogue, point)
            if points is not None:
                disk.write(catalogue.after(points=tuple(points)), reserve=FOR_CHANGES)
    kept = next(each for each in points or catalogue.points if each.point == point.point)
    receiver.session.reply(Kind.HELD, Held(disk=disk.name, point=kept.point, holds=kept.holds))
    receiver.session.done()


def _existing(disk: ReplicaDisk, catalogue: Catalogue | None) -> Catalogue:
    if catalogue is None:
        raise NotFound(f"there is no disk {disk.name!r} here", subject=disk.directory.parent)
    return catalogue
