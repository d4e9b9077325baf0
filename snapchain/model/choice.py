"""Which layers of a chain may become one: what must stay where it is, and what views must remain.

    places      0 1 2 3 4 5 6 7        barred 0, 7: in no merge at all
    may be       [1 2 3][4 5 6]        kept 3: its view remains, so it may only be the uppermost of a merge

barred   the root (unless it is to be merged too), the top, what is held, what some destination lacks, and the newest
         layer that a destination shares with this chain: the next shipment builds on it
kept     views that a rule of retention names
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from snapchain.errors import InvalidInput


@dataclass(frozen=True, slots=True, order=True)
class MergeRange:
    """Layers `first` to `last`, both included, counted from the root, are to become one."""

    first: int
    last: int

    @property
    def removes(self) -> int:
        """By how many layers the chain becomes shorter."""
        return self.last - self.first


def barred(
    count: int,
    *,
    present: Collection[int] = (),
    held: Collection[int] = (),
    root: bool = True,
    top: bool = True,
) -> frozenset[int]:
    """The places of a chain of `count` layers that no merge may touch.

    present: for each destination how many layers, from the root on, it holds; held: places that stay as they are;
    root, top: whether the ends stay

    Raises InvalidInput when a destination holds more layers than there are.
    """
    if any(not 0 <= there <= count for there in present):
        raise InvalidInput(f"a destination cannot hold {max(present)} of {count} layers")
    stays = {place for place in held if 0 <= place < count}
    stays |= {there - 1 for there in present if there}
    stays |= set(range(min(present, default=count), count))
    if count and root:
        stays.add(0)
    if count and top:
        stays.add(count - 1)
    return frozenset(stays)


def segments(count: int, *, stays: Collection[int], kept: Collection[int] = ()) -> tuple[MergeRange, ...]:
    """The longest ranges that may be merged, lowest first; each part of one may be merged too.

    stays: places in no range; kept: places that may only be the uppermost of a range
    """
    found: list[MergeRange] = []
    first = 0
    for place in range(count + 1):
        if place == count or place in stays:
            if place - first > 1:
                found.append(MergeRange(first, place - 1))
            first = place + 1
        elif place in kept:
            if place > first:
                found.append(MergeRange(first, place))
            first = place + 1
    return tuple(found)
