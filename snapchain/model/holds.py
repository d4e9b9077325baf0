"""Holds: what stays whatever the rules of retention say, until each of its holds is released.

A hold has a tag, so that several people or programs may each have their reason and release only their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Protocol, Self, TypeVar

from snapchain.errors import InvalidInput, NotFound

LONGEST_TAG = 100


class Held(Protocol):
    """A hold, as each kind of destination records it."""

    @property
    def tag(self) -> str: ...

    @property
    def since(self) -> datetime: ...

    @property
    def reason(self) -> str: ...


class HeldPoint(Protocol):
    """A point of a disk, as a catalogue records it."""

    @property
    def point(self) -> int: ...

    @property
    def holds(self) -> Sequence[Held]: ...

    def model_copy(self, *, update: Mapping[str, object]) -> Self: ...


P = TypeVar("P", bound=HeldPoint)


def held(
    points: Sequence[P], number: int, tag: str, *, reason: str, make: Callable[[Held | None], Held], disk: str
) -> tuple[P, ...] | None:
    """The points, number `number` among them held under `tag`; None when it is so already.

    make: the new hold, from the one of this tag that it replaces
    Raises NotFound for a point that is not there, InvalidInput for a bad tag.
    """
    check_tag(tag)
    found = _point(points, number, disk)
    before = next((hold for hold in found.holds if hold.tag == tag), None)
    if before is not None and before.reason == reason:
        return None
    return _with(points, found, (*(hold for hold in found.holds if hold.tag != tag), make(before)))


def released(points: Sequence[P], number: int, tag: str, *, disk: str) -> tuple[P, ...]:
    """The points, number `number` among them no longer held under `tag`. Raises NotFound where it is not held."""
    found = _point(points, number, disk)
    left = tuple(hold for hold in found.holds if hold.tag != tag)
    if len(left) == len(found.holds):
        tags = ", ".join(hold.tag for hold in found.holds)
        raise NotFound(
            f"point {number} is not held under {tag!r}",
            subject=disk,
            hint=f"its holds: {tags}" if tags else "it is not held at all",
        )
    return _with(points, found, left)


def _point(points: Sequence[P], number: int, disk: str) -> P:
    for point in points:
        if point.point == number:
            return point
    raise NotFound(f"the disk has no point {number}", subject=disk, hint="snapchain log lists its points")


def _with(points: Sequence[P], point: P, holds: Sequence[Held]) -> tuple[P, ...]:
    changed = point.model_copy(update={"holds": tuple(holds)})
    return tuple(changed if each.point == point.point else each for each in points)


def hold_reasons(point: HeldPoint) -> tuple[str, ...]:
    """Why a point stays, one text for each hold; for `retention.decide`."""
    return tuple(f"held: {hold.tag}" + (f" ({hold.reason})" if hold.reason else "") for hold in point.holds)


def check_tag(tag: str) -> str:
    """Raises InvalidInput unless `tag` is printable text of at most 100 bytes without blanks at its ends."""
    if not tag or len(tag.encode()) > LONGEST_TAG or not tag.isprintable() or tag != tag.strip():
        raise InvalidInput(f"{tag!r} cannot name a hold", hint=f"printable text of at most {LONGEST_TAG} bytes")
    return tag
