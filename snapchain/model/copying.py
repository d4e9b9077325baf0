"""Which points of a disk another destination lacks, and under which numbers they go there.

    there has no point, or each number that both have is one and the same point     every point keeps its number
    both have no number in common, and all there is older and has lower numbers     they keep them, too
    else     there are points of another origin: a point gets the next number, if it is newer than all that are there

`latest` is the highest number.  So a point never comes above a newer one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, Protocol, TypeVar


class Copied(Protocol):
    """A point, as far as it can be told whether another one is its copy."""

    @property
    def point(self) -> int: ...

    @property
    def time(self) -> datetime: ...

    @property
    def virtual_size(self) -> int: ...

    @property
    def content_id(self) -> str: ...

    @property
    def instant(self) -> str | None: ...


P = TypeVar("P", bound=Copied)


def identity(point: Copied) -> tuple[object, ...]:
    """What a point and its copies have in common. Labels and holds may change, and so may the number."""
    return point.time, point.virtual_size, point.content_id, point.instant


@dataclass(frozen=True, slots=True)
class Lacking(Generic[P]):
    """What is to be copied of a disk, ascending by number.

    keeps_numbers: whether the points get the numbers that they have in the source; present: which are there already
    too_old: which cannot go there, since a newer point of another origin is there
    """

    points: tuple[P, ...]
    keeps_numbers: bool
    present: tuple[P, ...] = ()
    too_old: tuple[P, ...] = ()


def lacking(
    wanted: Sequence[P], source: Sequence[Copied], there: Sequence[Copied], *, newer: bool = False
) -> Lacking[P]:
    """wanted: of the points of `source` those that are to be there; all ascend by number.

    newer: leave out what is older than the newest point that both have: it was there, and was dropped
    """
    known = {identity(point) for point in there}
    present = tuple(point for point in wanted if identity(point) in known)
    newest_common = max((point.point for point in source if identity(point) in known), default=0) if newer else 0
    rest = [point for point in wanted if identity(point) not in known and point.point > newest_common]
    if keeps_numbers(source, there):
        return Lacking(tuple(rest), keeps_numbers=True, present=present)
    newest = max(point.time for point in there)
    return Lacking(
        tuple(point for point in rest if point.time > newest),
        keeps_numbers=False,
        present=present,
        too_old=tuple(point for point in rest if point.time <= newest),
    )


def keeps_numbers(source: Sequence[Copied], there: Sequence[Copied]) -> bool:
    """Whether points of a source can have there the numbers that they have in it."""
    if not there or not source:
        return True
    mine = {point.point: identity(point) for point in source}
    common = [point for point in there if point.point in mine]
    if common:
        return all(mine[point.point] == identity(point) for point in common)
    known = {identity(point) for point in there}
    first = min((point for point in source if identity(point) not in known), key=_number, default=None)
    if first is None:
        return True
    oldest = min(point.time for point in source if identity(point) not in known)
    return there[-1].point < first.point and max(point.time for point in there) <= oldest


def _number(point: Copied) -> int:
    return point.point


def chosen_since(points: Sequence[P], first: P | None) -> tuple[P, ...]:
    """The points from one of them on, by number; all where none is named."""
    return tuple(point for point in points if first is None or point.point >= first.point)
