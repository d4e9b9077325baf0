"""The step function at the heart of snapchain: guest bytes -> ABSENT, ZERO or DATA.

A layer answers one of three things for each guest byte.  It never answers a boolean: an explicit zero hides
what is below it, an absence does not.

    val     -2 ABSENT     ask the layer below
            -1 ZERO       reads as zeroes, whatever is below
          >= 0 DATA       the number names the owner: 0 in a lone layer, the layer's place in a composed map

Kept as two arrays, `at` (where each run starts) and `val` (what it is); neighbours differ.  So the cost of
everything here follows the number of extents, not the size of the disk, and no cluster size appears.

    over(lower, upper)    upper where it is not ABSENT, else lower; lower is cut at upper.size;
                          what lies between lower.size and upper.size is ZERO

Laws (tests/model/test_extents.py): read, association, idempotence, size, root; see DESIGN section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

ABSENT = -2
ZERO = -1
DATA = 0

Int64s = npt.NDArray[np.int64]

_BLOCK = 1 << 15  # runs of each map that are joined at a time: 256 KiB an array


@dataclass(frozen=True, slots=True, eq=False)
class Extents:
    """A step function on the guest bytes [0, size).

    at:  int64[n], run starts in bytes, strictly increasing, at[0] == 0 (empty when size == 0)
    val: int64[n], what each run is; neighbouring runs differ
    """

    size: int
    at: Int64s
    val: Int64s

    @staticmethod
    def constant(size: int, val: int) -> Extents:
        """One run of `val` over [0, size)."""
        count = 1 if size else 0
        return Extents(size, np.zeros(count, np.int64), np.full(count, val, np.int64))

    @staticmethod
    def absent(size: int) -> Extents:
        """The identity of `over` for layers of this size."""
        return Extents.constant(size, ABSENT)

    @staticmethod
    def from_starts(size: int, at: npt.ArrayLike, val: npt.ArrayLike) -> Extents:
        """From run starts that begin at 0 and strictly increase; merges equal neighbours.

        Raises ValueError when `at` is not such a list or reaches `size`.
        """
        starts = np.asarray(at, np.int64)
        values = np.asarray(val, np.int64)
        if starts.shape != values.shape or starts.ndim != 1:
            raise ValueError("run starts and values must be flat arrays of one length")
        if size < 0 or (size == 0) != (len(starts) == 0):
            raise ValueError("a map has runs exactly when its size is not zero")
        if len(starts) and (starts[0] != 0 or starts[-1] >= size or bool((np.diff(starts) <= 0).any())):
            raise ValueError("run starts must begin at 0, increase, and stay below the size")
        return _canonical(size, starts, values)

    @staticmethod
    def from_runs(size: int, runs: Iterable[tuple[int, int, int]]) -> Extents:
        """From (start, length, val) in ascending order without overlap; gaps are ABSENT."""
        at: list[int] = []
        val: list[int] = []
        end = 0
        for start, length, value in runs:
            if start < end or length <= 0 or start + length > size:
                raise ValueError(f"run {start}+{length} is out of order or outside 0+{size}")
            if start > end:
                at.append(end)
                val.append(ABSENT)
            at.append(start)
            val.append(value)
            end = start + length
        if end < size:
            at.append(end)
            val.append(ABSENT)
        return Extents.from_starts(size, at, val)

    @property
    def ends(self) -> Int64s:
        """int64[n], one past the last byte of each run."""
        return np.append(self.at[1:], np.int64(self.size))[: len(self.at)]

    @property
    def lengths(self) -> Int64s:
        """int64[n], bytes of each run."""
        return self.ends - self.at

    def __len__(self) -> int:
        return len(self.at)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Extents):
            return NotImplemented
        return self.size == other.size and np.array_equal(self.at, other.at) and np.array_equal(self.val, other.val)

    __hash__ = None  # type: ignore[assignment]

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(start, length, val) of every run; for small maps and for printing."""
        return zip(self.at.tolist(), self.lengths.tolist(), self.val.tolist(), strict=True)

    def bytes_where(self, mask: npt.NDArray[np.bool_]) -> int:
        """Total bytes of the runs chosen by a boolean per run."""
        return int(self.lengths[mask].sum())

    @property
    def data_bytes(self) -> int:
        """Bytes that this map answers with DATA."""
        return self.bytes_where(self.val >= DATA)

    @property
    def zero_bytes(self) -> int:
        """Bytes that this map answers with ZERO."""
        return self.bytes_where(self.val == ZERO)

    def at_offset(self, offset: int) -> int:
        """The value at one guest byte. Raises IndexError outside the map."""
        if not 0 <= offset < self.size:
            raise IndexError(offset)
        return int(self.val[np.searchsorted(self.at, offset, side="right") - 1])

    def values_at(self, offsets: Int64s) -> Int64s:
        """The values at many guest bytes, all inside [0, size)."""
        return self.val[np.searchsorted(self.at, offsets, side="right") - 1]

    def mapped(self, val: Int64s) -> Extents:
        """The same runs with other values, one a run."""
        return _canonical(self.size, self.at, val)

    def owned_by(self, owner: int) -> Extents:
        """The same map with every DATA run named `owner`."""
        return self.mapped(np.where(self.val >= DATA, np.int64(owner), self.val))

    def resized(self, size: int, fill: int) -> Extents:
        """Cut at `size`, or grown to it with runs of `fill`."""
        if size == self.size:
            return self
        if size > self.size:
            tail = np.array([self.size], np.int64)
            return _canonical(size, np.concatenate([self.at, tail]), np.append(self.val, np.int64(fill)))
        keep = int(np.searchsorted(self.at, size, side="left"))
        return Extents(size, self.at[:keep], self.val[:keep])

    def window(self, start: int, stop: int) -> Extents:
        """The runs of [start, stop), shifted so that `start` becomes 0."""
        if not 0 <= start <= stop <= self.size:
            raise IndexError((start, stop))
        first = int(np.searchsorted(self.at, start, side="right")) - 1
        last = int(np.searchsorted(self.at, stop, side="left"))
        if start == stop:
            return Extents.absent(0)
        return Extents(stop - start, np.maximum(self.at[first:last] - start, 0), self.val[first:last])


def _canonical(size: int, at: Int64s, val: Int64s) -> Extents:
    """Drop runs that repeat their left neighbour."""
    if len(val) > 1:
        keep = np.empty(len(val), np.bool_)
        keep[0] = True
        np.not_equal(val[1:], val[:-1], out=keep[1:])
        if not keep.all():
            at, val = at[keep], val[keep]
    return Extents(size, at, val)


def blocks(left: Extents, right: Extents) -> Iterator[tuple[Int64s, Int64s, Int64s]]:
    """Two maps of one size cut at each other's breaks, a block at a time: (at, left values, right values).

    A block's arrays stay in the processor's cache and in memory that the process has already touched; fresh
    pages would cost more than the work itself.  Each start carries its side in its lowest bit, so one stable
    sort of two sorted halves (timsort merges them) gives the breaks, and a running sum of those bits says how
    many starts of each map were passed.
    """
    if left.size != right.size:
        raise ValueError(f"maps of {left.size} and {right.size} bytes cannot be laid side by side")
    # Not by np.union1d, which imports numpy.ma: 30 ms of each command.
    cuts = np.array(sorted({*left.at[::_BLOCK].tolist(), *right.at[::_BLOCK].tolist()}), np.int64)
    left_cuts = [*np.searchsorted(left.at, cuts).tolist(), len(left.at)]
    right_cuts = [*np.searchsorted(right.at, cuts).tolist(), len(right.at)]
    one = np.uint64(1)
    for left_first, left_stop, right_first, right_stop in zip(
        left_cuts, left_cuts[1:], right_cuts, right_cuts[1:], strict=False
    ):
        starts = np.concatenate([left.at[left_first:left_stop], right.at[right_first:right_stop]]).view(np.uint64)
        starts <<= one
        starts[left_stop - left_first :] |= one
        starts.sort(kind="stable")
        side = (starts & one).view(np.int64)
        at = (starts >> one).view(np.int64)
        last = np.empty(len(at), np.bool_)  # of two equal starts the second has passed both
        last[-1] = True
        np.not_equal(at[1:], at[:-1], out=last[:-1])
        place = np.flatnonzero(last)
        of_right = np.cumsum(side)[place]
        of_left = place - of_right
        yield at[place], left.val[of_left + left_first], right.val[of_right + (right_first - 1)]


def pairwise(left: Extents, right: Extents) -> tuple[Int64s, Int64s, Int64s]:
    """Cut two maps of one size at each other's breaks: (at, left values, right values)."""
    pieces = list(blocks(left, right))
    if not pieces:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    at, low, up = zip(*pieces, strict=True)
    return np.concatenate(at), np.concatenate(low), np.concatenate(up)


def _joined(left: Extents, right: Extents, choose: Callable[[Int64s, Int64s], Int64s]) -> Extents:
    """One map of what `choose` makes of the values of two maps of one size."""
    at = np.empty(len(left) + len(right), np.int64)
    val = np.empty(len(at), np.int64)
    count = 0
    for starts, low, up in blocks(left, right):
        block = _canonical(left.size, starts, choose(low, up))
        repeats = int(count > 0 and bool(block.val[0] == val[count - 1]))
        stop = count + len(block) - repeats
        at[count:stop] = block.at[repeats:]
        val[count:stop] = block.val[repeats:]
        count = stop
    # Both arrays were made for the worst case.  The unused end of a large one was never touched, so costs nothing;
    # a short result does not hold on to it.
    if count <= _BLOCK:
        return Extents(left.size, at[:count].copy(), val[:count].copy())
    return Extents(left.size, at[:count], val[:count])


def over(lower: Extents, upper: Extents) -> Extents:
    """What QEMU shows when `upper` is an overlay on `lower`.

    A lower layer that is shorter hides what is below it from its end on: the gap is ZERO, not ABSENT.
    """
    return _joined(lower.resized(upper.size, ZERO), upper, lambda low, up: np.where(up == ABSENT, low, up))


def fold(layers: Iterable[Extents]) -> Extents:
    """`over` from the root up. Raises TypeError for no layers.

    Neighbours are joined in pairs, then the pairs: `over` is associative, and so every extent is touched
    log(layers) times, not once for each layer above it.
    """
    row = list(layers)
    if not row:
        raise TypeError("a stack has at least one layer")
    while len(row) > 1:
        row = [over(*row[place : place + 2]) if place + 1 < len(row) else row[place] for place in range(0, len(row), 2)]
    return row[0]


def where(extents: Extents, mask: Extents, *, otherwise: int = ABSENT) -> Extents:
    """`extents` where `mask` is not ABSENT, else `otherwise`. Both of one size."""
    return _joined(extents, mask, lambda val, chosen: np.where(chosen == ABSENT, np.int64(otherwise), val))


def rounded(extents: Extents, grain: int) -> Extents:
    """The cells of `grain` bytes that hold anything but ABSENT: DATA there, ABSENT elsewhere.

    The last cell is cut at the size.
    """
    held = extents.val != ABSENT
    first = extents.at[held] // grain * grain
    stop = np.minimum(-(-extents.ends[held] // grain) * grain, extents.size)
    return covering(extents.size, first, stop)


def covering(size: int, first: Int64s, stop: Int64s) -> Extents:
    """DATA on the union of [first, stop) ranges whose starts ascend, ABSENT elsewhere. Empty ranges do not count."""
    held = stop > first
    if not held.any():
        return Extents.absent(size)
    if not held.all():
        first, stop = first[held], stop[held]
    reach = np.maximum.accumulate(stop)
    fresh = np.empty(len(first), np.bool_)
    fresh[0] = True
    np.greater(first[1:], reach[:-1], out=fresh[1:])
    starts = first[fresh]
    stops = reach[np.append(np.flatnonzero(fresh)[1:] - 1, len(first) - 1)]
    at = np.empty(2 * len(starts), np.int64)
    at[0::2], at[1::2] = starts, stops
    val = np.tile(np.array([DATA, ABSENT], np.int64), len(starts))
    if at[0] > 0:
        at, val = np.insert(at, 0, 0), np.insert(val, 0, ABSENT)
    inside = at < size
    return _canonical(size, at[inside], val[inside])


# --- Distinct values of integer columns. numpy's set functions do the same, but load numpy.ma: 30 ms of each command.

Whole = TypeVar("Whole", bound=np.integer)


def distinct(*columns: npt.NDArray[Whole]) -> npt.NDArray[Whole]:
    """The values of all columns, ascending, each once."""
    return counted(*columns)[0]


def counted(*columns: npt.NDArray[Whole]) -> tuple[npt.NDArray[Whole], npt.NDArray[np.int64]]:
    """The values of all columns, ascending, each once; and how often each is there."""
    values = np.concatenate(columns)
    values.sort()
    first = np.flatnonzero(np.concatenate([np.ones(min(len(values), 1), np.bool_), values[1:] != values[:-1]]))
    return values[first], np.diff(first, append=len(values))
