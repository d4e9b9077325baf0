"""What an image shows and a destination's newest layer does not: found by leaf hashes, and nothing else is sent.

    here    leaves of the region in which both may differ, read and hashed
    there   leaf hashes of the newest content, in portions
    ->      DATA where they differ, ZERO where the image now reads zero, ABSENT elsewhere: one layer on top

The hashes of the other side decide only what is sent.  The content sum of the result follows from both, and whoever
does not believe the other side compares it with a sum that was counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain as chained

import numpy as np

from snapchain.destination.writing import HeldLayer, NewestLeaves
from snapchain.image.leaves import LeafTable, in_order, leaves_of, read_window
from snapchain.image.view import View
from snapchain.image.windows import Window, windows
from snapchain.model.content import HASH_BYTES, LEAF_BYTES, Hashes, Sum, empty_sum, sum_of
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, Int64s, covering, over, rounded, where

_NO_LEAVES = np.empty(0, np.int64), np.empty((0, HASH_BYTES), np.uint8)


@dataclass(frozen=True, slots=True)
class Difference:
    """A layer that makes the newest content show the image.

    extents: its map; table: the leaves there that it replaces or cuts off; total: the content sum of the result
    read: the content sum of what was read of the view
    """

    extents: Extents
    table: LeafTable
    total: Sum
    read: Sum

    @property
    def is_none(self) -> bool:
        """Whether both show the same."""
        return self.extents == Extents.absent(self.table.size)


def region_of(extents: Extents | None, view: View, there: HeldLayer) -> Extents:
    """Whole leaves in which a view can differ from a newer content there; all of them where nothing is known.

    extents: the map of what was written since both were equal, of the view's size
    """
    if extents is None:
        return Extents.constant(view.size, DATA)
    return over(rounded(extents, LEAF_BYTES), _end_leaves(view.size, [view.size, there.size]))


def to_read(region: Extents, view: View) -> Extents:
    """Which leaves of a region must be read: those that show data."""
    shown = view.resolve()
    data = shown.mapped(np.where(shown.val >= DATA, np.int64(DATA), np.int64(ABSENT)))
    return where(rounded(data, LEAF_BYTES), region)


def compare(
    view: View, there: HeldLayer, leaves: NewestLeaves, region: Extents, *, on_bytes: Callable[[int], None]
) -> Difference:
    """The difference of a view to a destination's newest layer. Errors as the view's `read_into`.

    region: as `region_of` gives it; on_bytes: called with how many bytes were read since the last call
    """
    found = _Found(view.size)
    hot = to_read(region, view)
    portions: Iterator[tuple[int, Int64s, Hashes]] = leaves.portions()
    if view.size > there.size:
        portions = chained(portions, [(view.size, *_NO_LEAVES)])
    done = 0
    for end, listed, listed_hashes in portions:
        stop = -(-end // LEAF_BYTES) * LEAF_BYTES
        inside = listed * LEAF_BYTES < view.size
        found.cut_off(listed[~inside], listed_hashes[~inside])
        chosen = inside
        chosen[inside] = region.values_at(listed[inside] * LEAF_BYTES) == DATA
        numbers, hashes = listed[chosen], listed_hashes[chosen]
        at = 0
        for window, mine, total in in_order(partial(_hashed, view), windows(hot, since=done, until=stop)):
            found.read = found.read + total
            upto = int(np.searchsorted(numbers, -(-window.stop // LEAF_BYTES)))
            found.compare(mine, (numbers[at:upto], hashes[at:upto]))
            on_bytes(window.length)
            at = upto
        found.compare(_NO_LEAVES, (numbers[at:], hashes[at:]))
        done = stop
    return found.difference(there)


@dataclass(slots=True)
class _Found:
    size: int
    changed: list[Int64s] = field(default_factory=list)
    zeroed: list[Int64s] = field(default_factory=list)
    replaced: list[tuple[Int64s, Hashes]] = field(default_factory=list)
    added: list[Sum] = field(default_factory=list)
    read: Sum = field(default_factory=empty_sum)

    def cut_off(self, numbers: Int64s, hashes: Hashes) -> None:
        """Leaves there that lie wholly past the end of the view."""
        if len(numbers):
            self.replaced.append((numbers, hashes))

    def compare(self, mine: tuple[Int64s, Hashes], theirs: tuple[Int64s, Hashes]) -> None:
        """All leaves of one stretch that are not all zero, here and there."""
        _, one, other = np.intersect1d(mine[0], theirs[0], assume_unique=True, return_indices=True)
        equal = (mine[1][one] == theirs[1][other]).all(axis=1)
        new, old = np.ones(len(mine[0]), np.bool_), np.ones(len(theirs[0]), np.bool_)
        new[one[equal]] = False
        old[other[equal]] = False
        if new.any():
            self.changed.append(mine[0][new])
            self.added.append(sum_of(mine[0][new], mine[1][new]))
        if old.any():
            self.replaced.append((theirs[0][old], theirs[1][old]))
            self.zeroed.append(np.setdiff1d(theirs[0][old], mine[0], assume_unique=True))

    def difference(self, there: HeldLayer) -> Difference:
        numbers = np.concatenate([_NO_LEAVES[0], *(numbers for numbers, _ in self.replaced)])
        hashes = np.concatenate([_NO_LEAVES[1], *(hashes for _, hashes in self.replaced)])
        order = np.argsort(numbers, kind="stable")
        table = LeafTable(there.size, numbers[order], hashes[order])
        total = there.total - sum_of(table.numbers, table.hashes)
        for added in self.added:
            total = total + added
        data, zero = self._covered(self.changed, DATA), self._covered(self.zeroed, ZERO)
        return Difference(over(zero, data), table, total, self.read)

    def _covered(self, parts: list[Int64s], val: int) -> Extents:
        first = np.sort(np.concatenate([_NO_LEAVES[0], *parts])) * LEAF_BYTES
        held = covering(self.size, first, np.minimum(first + LEAF_BYTES, self.size))
        return held.mapped(np.where(held.val == DATA, np.int64(val), held.val))


def _hashed(view: View, window: Window) -> tuple[Window, tuple[Int64s, Hashes], Sum]:
    """A window with the hashes of its leaves, and their sum."""
    leaves = leaves_of(window, read_window(view, window))
    return window, leaves, sum_of(*leaves)


def _end_leaves(size: int, ends: list[int]) -> Extents:
    """The leaves in which disks end: what one of them cuts off there is not told by any map."""
    starts = sorted({end // LEAF_BYTES * LEAF_BYTES for end in ends if end % LEAF_BYTES and end <= size})
    first = np.array(starts, np.int64)
    return covering(size, first, np.minimum(first + LEAF_BYTES, size))
