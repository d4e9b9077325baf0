"""Holds: points that stay whatever the retention rules say, until each of their holds is released.

    HOLD, RELEASE  ->  HELD DONE

A point is held under a tag, so that several people or programs may each have their reason, and release only their own.
The catalogue keeps the holds.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from snapchain.errors import NotFound, Unsupported
from snapchain.model.points import chosen_point
from snapchain.replica.arrival import settle
from snapchain.replica.catalogue import FOR_CHANGES, Catalogue, Point
from snapchain.replica.store import ReplicaDisk, Work, in_turn, open_replica
from snapchain.replica.stream.messages import MOST_HOLDS, Held, Hold, HoldPoint, Kind, ReleasePoint

if TYPE_CHECKING:
    from snapchain.replica.receiver import Receiver


def hold(receiver: Receiver, request: HoldPoint) -> None:
    """HOLD. Raises NotFound where there is no such disk or point, Unsupported for too many holds, Busy."""

    def changed(point: Point) -> tuple[Hold, ...]:
        before = next((each for each in point.holds if each.tag == request.tag), None)
        since = datetime.now(UTC) if before is None else before.since
        others = tuple(each for each in point.holds if each.tag != request.tag)
        if len(others) == MOST_HOLDS:
            raise Unsupported(f"point {point.point} has {MOST_HOLDS} holds, and no more are allowed")
        return (*others, Hold(tag=request.tag, since=since, reason=request.reason))

    _answer(receiver, request, changed)


def release(receiver: Receiver, request: ReleasePoint) -> None:
    """RELEASE. Raises NotFound where there is no such disk, point or hold, Busy."""

    def changed(point: Point) -> tuple[Hold, ...]:
        left = tuple(each for each in point.holds if each.tag != request.tag)
        if len(left) == len(point.holds):
            tags = ", ".join(each.tag for each in point.holds)
            raise NotFound(
                f"point {point.point} is not held under {request.tag!r}",
                subject=request.disk,
                hint=f"its holds: {tags}" if tags else "it is not held at all",
            )
        return left

    _answer(receiver, request, changed)


def reasons(point: Point) -> tuple[str, ...]:
    """Why a point stays, one text a hold, for model.retention.decide."""
    return tuple(f"held: {each.tag}" + (f" ({each.reason})" if each.reason else "") for each in point.holds)


def _answer(
    receiver: Receiver, request: HoldPoint | ReleasePoint, changed: Callable[[Point], tuple[Hold, ...]]
) -> None:
    disk = open_replica(receiver.root(request.replica)).disk(request.disk)
    if request.dry_run:
        point = _chosen(disk, disk.read(), request.point)
        held = Held(disk=disk.name, point=point.point, holds=changed(point))
    else:
        _chosen(disk, disk.read(), request.point)  # nothing is locked for a disk that is not there
        with in_turn(disk, Work.TRANSFER):
            catalogue = settle(disk)
            point = _chosen(disk, catalogue, request.point)
            kept = point.model_copy(update={"holds": changed(point)})
            points = tuple(kept if each.point == point.point else each for each in catalogue.points)
            if kept != point:
                disk.write(catalogue.after(points=points), reserve=FOR_CHANGES)
        held = Held(disk=disk.name, point=point.point, holds=kept.holds)
    receiver.session.reply(Kind.HELD, held)
    receiver.session.done()


def _chosen(disk: ReplicaDisk, catalogue: Catalogue | None, wanted: str | None) -> Point:
    if catalogue is None:
        raise NotFound(f"there is no disk {disk.name!r} here", subject=disk.directory.parent)
    return chosen_point(disk.name, catalogue.points, wanted)
