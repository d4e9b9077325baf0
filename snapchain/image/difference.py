"""Whether two chains read the same, by reading only where they could differ.

    shared lower files          not read, nor ranges that are zero in both
    the very same place         of one file, or of one piece of disk (`sameness`): equal without reading
    compressed clusters         compared as stored
    the rest                    read from both, on several threads

So the cost of proving a merge follows the copied bytes, not the disk; where extents are shared it is nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from snapchain.image.chain import ImageChain
from snapchain.image.physical import Int64s
from snapchain.image.pread import pread_into
from snapchain.image.sameness import Pairs, equal_compressed, pairs_of, same_place
from snapchain.image.threads import spread
from snapchain.model.extents import DATA, covering, pairwise

_PIECE = 1 << 20
"""Two of them fit into the processor's cache."""
_ROWS = 256

OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True, order=True)
class Difference:
    """A range [start, stop) of guest bytes, the first and the last of which differ."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class RangesToCompare:
    """The ranges to read to find out whether two chains of one size differ.

    plain: ranges that both store uncompressed; start, stop: guest ranges to read as a guest does
    """

    plain: Pairs
    start: Int64s
    stop: Int64s

    @property
    def bytes(self) -> int:
        """Guest bytes to read from each chain."""
        return int(self.plain.length.sum()) + int((self.stop - self.start).sum())


def ranges_to_compare(old: ImageChain, new: ImageChain, *, shared: int, trust_place: bool = True) -> RangesToCompare:
    """The ranges where two chains of one size could differ; of guest data it reads only compressed clusters.

    shared: how many of the lowest files are the same files in both; trust_place: bytes at one place are one (they are,
    unless the place was written to since the old map was read)
    """
    at, left, right = pairwise(old.resolve(), new.resolve())
    stop = np.append(at[1:], np.int64(old.size))[: len(at)]
    zero = (left < DATA) & (right < DATA)
    same = (left == right) & (left >= DATA) & (left < shared)
    doubt = ~(zero | same)
    both = doubt & (left >= DATA) & (right >= DATA)
    one_only = doubt & ~both
    wanted = covering(old.size, at[both], stop[both])
    pairs = pairs_of(wanted, old, new)
    if trust_place:
        pairs = pairs[~same_place(pairs, old, new)]
    squeezed = (pairs.one_stored > 0) | (pairs.other_stored > 0)
    unpack = pairs[squeezed]
    unpack = unpack[~equal_compressed(unpack, old, new)]
    start = np.concatenate([at[one_only], unpack.guest])
    stop = np.concatenate([stop[one_only], unpack.guest + unpack.length])
    order = np.argsort(start, kind="stable")
    return RangesToCompare(pairs[~squeezed].joined(), *_joined(start[order], stop[order]))


def _joined(start: Int64s, stop: Int64s) -> tuple[Int64s, Int64s]:
    """Adjacent ranges joined."""
    if not len(start):
        return start, stop
    fresh = np.append(True, start[1:] != stop[:-1])
    first = np.flatnonzero(fresh)
    return start[first], stop[np.append(first[1:], len(stop)) - 1]


def first_difference(
    old: ImageChain, new: ImageChain, found: RangesToCompare, *, on_bytes: OnBytes = lambda _count: None
) -> Difference | None:
    """The first range that differs, exact at its start, or None.

    found: from `ranges_to_compare`; on_bytes: called with the bytes compared, of `found.bytes`, one call at a time.
    A difference in size counts as a difference after the end of the shorter. Errors as ImageChain.read_into.
    """
    if old.size != new.size:
        return Difference(min(old.size, new.size), max(old.size, new.size))
    comparison = _Comparison(old, new, on_bytes)
    spread(_jobs(found), comparison.work)
    return comparison.first


@dataclass(frozen=True, slots=True)
class _Plain:
    rows: Pairs


@dataclass(frozen=True, slots=True)
class _View:
    start: int
    stop: int


def _jobs(found: RangesToCompare) -> Iterator[_Plain | _View]:
    """Pieces of at most _PIECE bytes, or several smaller ones together."""
    cut = found.plain.cut(_PIECE)
    ends = np.cumsum(cut.length)
    first = 0
    while first < len(cut):
        reach = int(ends[first] - cut.length[first]) + _PIECE
        stop = max(first + 1, min(int(np.searchsorted(ends, reach, side="right")), first + _ROWS))
        yield _Plain(cut[first:stop])
        first = stop
    for start, stop in zip(found.start.tolist(), found.stop.tolist(), strict=True):
        for at in range(start, stop, _PIECE):
            yield _View(at, min(at + _PIECE, stop))


class _Comparison:
    """Reads pieces from both chains, on several threads; `first` is the lowest difference found."""

    def __init__(self, old: ImageChain, new: ImageChain, on_bytes: OnBytes) -> None:
        self.first: Difference | None = None
        self._old, self._new = old, new
        self._maps = old.resolve(), new.resolve()
        self._on_bytes = on_bytes
        self._lock = threading.Lock()
        self._local = threading.local()

    def work(self, job: _Plain | _View) -> None:
        if isinstance(job, _View):
            one, other = self._buffers(job.stop - job.start)
            self._old.read_into(job.start, one, resolved=self._maps[0])
            self._new.read_into(job.start, other, resolved=self._maps[1])
            self._judge(job.start, one, other)
            count = job.stop - job.start
        else:
            rows = job.rows
            for guest, length, number, offset, new_number, new_offset in rows.rows():
                one, other = self._buffers(length)
                file, new_file = self._old.files[number], self._new.files[new_number]
                pread_into(file.fileno(), one, offset=offset, subject=file.path)
                pread_into(new_file.fileno(), other, offset=new_offset, subject=new_file.path)
                self._judge(guest, one, other)
            count = int(rows.length.sum())
        with self._lock:
            self._on_bytes(count)

    def _buffers(self, length: int) -> tuple[memoryview, memoryview]:
        if not hasattr(self._local, "buffers"):
            self._local.buffers = memoryview(bytearray(_PIECE)), memoryview(bytearray(_PIECE))
        one, other = self._local.buffers
        return one[:length], other[:length]

    def _judge(self, at: int, one: memoryview, other: memoryview) -> None:
        if _equal(one, other):
            return
        differs = np.flatnonzero(np.frombuffer(one, np.uint8) != np.frombuffer(other, np.uint8))
        found = Difference(at + int(differs[0]), at + int(differs[-1]) + 1)
        with self._lock:
            self.first = found if self.first is None else min(self.first, found)


def _equal(one: memoryview, other: memoryview) -> bool:
    """Compare buffers of one length, eight bytes at a time where possible."""
    whole = len(one) // 8 * 8
    same = np.array_equal(np.frombuffer(one[:whole], np.uint64), np.frombuffer(other[:whole], np.uint64))
    return bool(same) and bytes(one[whole:]) == bytes(other[whole:])
