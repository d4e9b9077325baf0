"""Holds: points that stay whatever the rules of retention say, until each of their holds is released.

A point is held under a tag, so that several people or programs may each have their reason and release only their own.
Here is what changes in a catalogue; Repository.hold and Repository.release publish it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from snapchain.errors import InvalidInput, NotFound
from snapchain.repository.catalogue import Catalogue, Hold, Point

_LONGEST_TAG = 100


def held(catalogue: Catalogue, *, point: int, tag: str, reason: str, now: datetime) -> Sequence[Point] | None:
    """The catalogue's points, `point` among them held under `tag`; None when it is so already. Raises NotFound."""
    found = _point(catalogue, point)
    before = next((hold for hold in found.holds if hold.tag == tag), None)
    if before is not None and before.reason == reason:
        return None
    hold = Hold(tag=tag, since=before.since if before else now, reason=reason)
    return _with(catalogue, found, (*(each for each in found.holds if each.tag != tag), hold))


def released(catalogue: Catalogue, *, point: int, tag: str) -> Sequence[Point]:
    """The catalogue's points, `point` among them no longer held under `tag`. Raises NotFound."""
    found = _point(catalogue, point)
    left = tuple(hold for hold in found.holds if hold.tag != tag)
    if len(left) == len(found.holds):
        tags = ", ".join(hold.tag for hold in found.holds)
        raise NotFound(
            f"point {point} is not held under {tag!r}",
            subject=catalogue.disk,
            hint=f"its holds: {tags}" if tags else "it is not held at all",
        )
    return _with(catalogue, found, left)


def reasons(point: Point) -> tuple[str, ...]:
    """Why a point stays, one for each hold; for model.retention.decide."""
    return tuple(f"held: {hold.tag}" + (f" ({hold.reason})" if hold.reason else "") for hold in point.holds)


def check_tag(tag: str) -> str:
    """Raises InvalidInput unless `tag` is printable text of at most 100 bytes without blanks at its ends."""
    if not tag or len(tag.encode()) > _LONGEST_TAG or not tag.isprintable() or tag != tag.strip():
        raise InvalidInput(f"{tag!r} cannot name a hold", hint=f"printable text of at most {_LONGEST_TAG} bytes")
    return tag


def _point(catalogue: Catalogue, number: int) -> Point:
    for point in catalogue.points:
        if point.point == number:
            return point
    raise NotFound(f"the disk has no point {number}", subject=catalogue.disk, hint="snapchain log tells its points")


def _with(catalogue: Catalogue, point: Point, holds: tuple[Hold, ...]) -> Sequence[Point]:
    changed = point.model_copy(update={"holds": holds})
    return tuple(changed if each.point == point.point else each for each in catalogue.points)
