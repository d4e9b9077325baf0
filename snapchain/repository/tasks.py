"""What taking in a layer has to do, cut into tasks of bounded size; decided before a byte is read.

    HOT    whole leaves that hold DATA, or that a ZERO run covers only in part: read, hash, store
    COLD   whole leaves inside a ZERO run: nothing to read

A task is some neighbouring items: at most `WINDOW` hot bytes, within `SPAN` guest bytes, so that the old leaves
of its range (a few pages) are looked up once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from snapchain.model.content import LEAF_BYTES, ZERO_LEAF
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, Int64s, covering, over

WINDOW = 4 * 1024 * 1024
SPAN = 256 * 1024 * 1024
COLD_PIECE = 16 * 1024 * 1024 * 1024
_RUNS = 1 << 16


@dataclass(frozen=True, slots=True)
class Item:
    """Guest bytes [start, stop), whole leaves but for the end of the disk."""

    start: int
    stop: int
    hot: bool


Task = tuple[Item, ...]


def with_last_leaf(extents: Extents) -> Extents:
    """The map with its last leaf as DATA where the size cuts it.

    For a layer that is shorter than what is below it: its last leaf lost its tail, and only a layer that holds
    the leaf can say so.
    """
    size = extents.size
    if not size % LEAF_BYTES:
        return extents
    start = size // LEAF_BYTES * LEAF_BYTES
    return over(covering(size, np.array([start], np.int64), np.array([size], np.int64)), extents)


def hot_leaves(extents: Extents) -> Extents:
    """DATA on every leaf that must be read to know its new hash."""
    first: list[Int64s] = []
    stop: list[Int64s] = []
    # Leaf by leaf there is much less to say than run by run: a piece at a time, so that only the result is large.
    for begin in range(0, len(extents), _RUNS):
        leaves = _hot(extents, slice(begin, begin + _RUNS))
        held = leaves.val == DATA
        first.append(leaves.at[held])
        stop.append(leaves.ends[held])
    return covering(extents.size, np.concatenate(first), np.concatenate(stop)) if first else Extents.absent(0)


def _hot(extents: Extents, some: slice) -> Extents:
    """`hot_leaves` of some of the runs."""
    size = extents.size
    at, val = extents.at[some], extents.val[some]
    ends = np.append(at[1:], extents.at[some.stop] if some.stop < len(extents) else size)
    data, zero = val >= DATA, val == ZERO
    first, stop = [at[data] // LEAF_BYTES * LEAF_BYTES], [ends[data]]
    for edge in (at[zero], ends[zero]):
        partial = edge[(edge % LEAF_BYTES != 0) & (edge < size)]
        first.append(partial // LEAF_BYTES * LEAF_BYTES)
        stop.append(partial)
    starts, stops = np.concatenate(first), np.concatenate(stop)
    stops = np.minimum(-(-stops // LEAF_BYTES) * LEAF_BYTES, size)
    order = np.argsort(starts, kind="stable")
    return covering(size, starts[order], stops[order])


def _cut(start: int, stop: int, piece: int) -> Iterator[tuple[int, int]]:
    at = start
    while at < stop:
        end = min(stop, (at // piece + 1) * piece)
        yield at, end
        at = end


def _alike(start: int, stop: int) -> Iterator[tuple[int, int]]:
    return _cut(start, stop, COLD_PIECE)


def tasks(
    extents: Extents, hot: Extents, cold: Callable[[int, int], Iterator[tuple[int, int]]] = _alike
) -> Iterator[Task]:
    """The items of a layer in guest order, in tasks. cold: cuts a COLD run [start, stop) into pieces."""
    zeroes = extents.mapped(np.where(extents.val == ZERO, ZERO, ABSENT))
    work = over(zeroes, hot)
    pending: list[Item] = []
    hot_bytes = 0
    for item in _items(work, cold):
        size = item.stop - item.start if item.hot else 0
        if pending and (hot_bytes + size > WINDOW or item.stop - pending[0].start > SPAN):
            yield tuple(pending)
            pending, hot_bytes = [], 0
        pending.append(item)
        hot_bytes += size
    if pending:
        yield tuple(pending)


def _items(work: Extents, cold: Callable[[int, int], Iterator[tuple[int, int]]]) -> Iterator[Item]:
    """Runs cut at multiples of the window, so that equal disks are cut alike."""
    for start, length, val in work.runs():
        if val == ABSENT:
            continue
        if val == ZERO:
            yield from (Item(first, end, hot=False) for first, end in cold(start, start + length))
            continue
        yield from (Item(first, end, hot=True) for first, end in _cut(start, start + length, WINDOW))


def spans(task: Task) -> tuple[Int64s, Int64s]:
    """Starts and stops of a task's items, int64[n] each."""
    return np.array([item.start for item in task], np.int64), np.array([item.stop for item in task], np.int64)


def pieces(extents: Extents, item: Item, block: int) -> list[tuple[int, int, int]]:
    """(start, stop, val) of the DATA and ZERO runs inside an item; DATA cut at multiples of `block`."""
    view = extents.window(item.start, item.stop)
    found: list[tuple[int, int, int]] = []
    for start, length, val in view.runs():
        if val == ABSENT:
            continue
        at, stop = item.start + start, item.start + start + length
        if val == ZERO:
            found.append((at, stop, ZERO))
            continue
        while at < stop:
            end = min(stop, (at // block + 1) * block)
            found.append((at, end, DATA))
            at = end
    return found


def without_zeroes(begin: int, stop: int, item: Item, leaves: Sequence[bytes]) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, is zero) of the stretches of a piece, cut where leaves change between all zero and not."""
    at = begin
    while at < stop:
        leaf = (at - item.start) // LEAF_BYTES
        zero = leaves[leaf] == ZERO_LEAF
        while leaf < len(leaves) and (leaves[leaf] == ZERO_LEAF) == zero:
            leaf += 1
        end = min(stop, item.start + leaf * LEAF_BYTES)
        yield at, end, zero
        at = end
