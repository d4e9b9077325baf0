"""The leaves of a layer to read, in portions.

A layer changes the content of the chain only in the leaves that it touches. Of these, a leaf needs reading only where
the layer, or the chain below, has data: two zeroes are equal unread.  A window is several such leaves, at most `WINDOW`
bytes of them, whatever the gaps between; each window of a sender is one DATA frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from snapchain.image.view import View
from snapchain.model.content import LEAF_BYTES
from snapchain.model.extents import ABSENT, DATA, Extents, covering, over, rounded, where

WINDOW = 2 << 20


@dataclass(frozen=True, slots=True)
class Window:
    """Leaf-aligned guest ranges, ascending, apart, not empty; the last one may end with the disk."""

    ranges: tuple[tuple[int, int], ...]

    @property
    def start(self) -> int:
        return self.ranges[0][0]

    @property
    def stop(self) -> int:
        return self.ranges[-1][1]

    @property
    def length(self) -> int:
        """Bytes of its ranges."""
        return sum(stop - start for start, stop in self.ranges)


def hot_leaves(extents: Extents, view: View, below: View | None) -> Extents:
    """DATA on each leaf that a layer may have changed.

    extents: the layer's own map, of the view's size; view: the chain up to it; below: the chain that it lies on
    """
    size = extents.size
    touched = rounded(extents, LEAF_BYTES)
    shows = over(_data(extents), _data(view.resolve()))
    if below is not None:
        # By leaves before the cut: data in the cut-off tail may share a leaf with a head that stays.
        shows = over(rounded(_data(below.resolve()), LEAF_BYTES).resized(size, ABSENT), shows)
        if size < below.size and size % LEAF_BYTES:
            # The leaf in which a shorter layer ends has lost its tail, whichever layer holds its head.
            cut = size // LEAF_BYTES * LEAF_BYTES
            touched = over(touched, covering(size, np.array([cut]), np.array([size])))
    return where(rounded(shows, LEAF_BYTES), touched)


def hidden_leaves(size: int, below: View) -> Extents:
    """DATA on each leaf of the chain below that a layer of `size` bytes cuts off."""
    lower = rounded(_data(below.resolve()), LEAF_BYTES)
    first = min(-(-size // LEAF_BYTES) * LEAF_BYTES, below.size)
    return where(lower, covering(below.size, np.array([first]), np.array([below.size])))


def data_leaves(view: View) -> Extents:
    """DATA on each leaf in which a chain shows data; all others are zero."""
    return rounded(_data(view.resolve()), LEAF_BYTES)


def windows(leaves: Extents, *, since: int = 0, until: int | None = None) -> Iterator[Window]:
    """The hot leaves that end after guest offset `since`, and begin before `until`, in portions.

    since, until: ends of leaves; `since` where a window ended
    """
    ranges: list[tuple[int, int]] = []
    room = WINDOW
    for start, length, val in leaves.runs():
        stop = start + length if until is None else min(start + length, until)
        at = max(start, since)
        if val != DATA:
            continue
        while at < stop:
            end = min(stop, at + room)
            ranges.append((at, end))
            room -= end - at
            at = end
            if room <= 0:
                yield Window(tuple(ranges))
                ranges, room = [], WINDOW
    if ranges:
        yield Window(tuple(ranges))


def _data(extents: Extents) -> Extents:
    return extents.mapped(np.where(extents.val >= DATA, np.int64(DATA), np.int64(ABSENT)))
