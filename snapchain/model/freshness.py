"""How old the newest point of a disk is, when some points may be dated later than the clock.

A point of the future proves nothing: a disk whose only new points are of the future may not have been shipped for
weeks.  So the newest point is the newest one that is not of the future; the others are reported beside it.

What is kept of a disk for a later look (`candidates`) stays true as the clock goes on:

    old points      newest | of the future, as seen at 02:00
    .  .  .  .         A   |     B      C
    ------------------- 02:00 ------------------> time
                           at 09:00, B is the newest, and C is of the future
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Protocol, TypeVar

from snapchain.model.retention import is_future

MOST_OF_THE_FUTURE = 100
"""Points of the future that are kept of one disk, the earliest ones."""


class Dated(Protocol):
    """A point with a number and an aware time."""

    @property
    def point(self) -> int: ...

    @property
    def time(self) -> datetime: ...


P = TypeVar("P", bound=Dated)


def newest_of(points: Iterable[P], now: datetime) -> tuple[P | None, tuple[P, ...]]:
    """The newest point that is not of the future, and all that are, by time.

    Of equal times the higher number is newer.
    """
    ordered = sorted(points, key=lambda each: (each.time, each.point))
    future = [each for each in ordered if is_future(each.time, now)]
    past = ordered[: len(ordered) - len(future)]
    return (past[-1] if past else None), tuple(future)


def candidates(points: Iterable[P], now: datetime) -> tuple[P, ...]:
    """The points of which one is the newest at `now` or later: what `newest_of` gives of them is what it gives of all.

    Of the points of the future only the earliest MOST_OF_THE_FUTURE are kept.
    """
    newest, future = newest_of(points, now)
    return (*(() if newest is None else (newest,)), *future[:MOST_OF_THE_FUTURE])


def has_gone_back(kept: Sequence[Dated], count: int, now: datetime) -> bool:
    """Whether `candidates` were chosen by a later clock, so that a point that was left out may be the newest now.

    count: of all points of the disk
    """
    return len(kept) < count and all(is_future(each.time, now) for each in kept)
