"""What a layer changes of a chain's content sum, counted from the bytes of both sides of the change.

Sender and receiver count it alike, each from its own files; that the results agree is the proof of a transfer.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from snapchain.image.view import View
from snapchain.image.windows import WINDOW, Window, data_leaves, hidden_leaves, hot_leaves, windows
from snapchain.model.content import HASH_BYTES, LEAF_BYTES, Hashes, Sum, empty_sum, leaf_hash, sum_of
from snapchain.model.extents import Extents, Int64s

T = TypeVar("T")
WORKERS = max(2, min(4, os.cpu_count() or 1))
_UNDER_WAY = 4
_SAMPLED = 512
"""One word in so many tells of most leaves that they are not zero."""


@dataclass(frozen=True, slots=True)
class LeafTable:
    """Leaves of a chain that is known by its hashes alone: those that a layer on it replaces, or cuts off.

    size: of that chain, bytes; numbers: ascending; hashes: of those leaves; a leaf that is not listed is all zero
    """

    size: int
    numbers: Int64s
    hashes: Hashes

    def beyond(self, size: int) -> Sum:
        """The sum of the leaves that lie wholly past `size`."""
        first = int(np.searchsorted(self.numbers, -(-size // LEAF_BYTES)))
        return sum_of(self.numbers[first:], self.hashes[first:])

    def replaced_by(self, window: Window, mine: memoryview) -> Sum:
        """What a window's leaves, in place of those listed here, add to the content sum."""
        new = np.frombuffer(mine, np.uint64).reshape(-1, LEAF_BYTES // 8)
        listed = np.isin(self.numbers, _numbers(window), assume_unique=True)
        theirs = sum_of(self.numbers[listed], self.hashes[listed])
        return _sum(window, mine, np.asarray(new.any(axis=1))) - theirs


def leaves_of(window: Window, data: memoryview) -> tuple[Int64s, Hashes]:
    """(int64[n], uint8[n, 32]): numbers and hashes of the leaves of a window that are not all zero."""
    words = np.frombuffer(data, np.uint64).reshape(-1, LEAF_BYTES // 8)
    return _hashed(window, data, np.asarray(words.any(axis=1)))


def read_window(chain: View | None, window: Window, buffer: memoryview | None = None) -> memoryview:
    """The window's leaves as a chain shows them, the last one whole: a chain below may be longer than the disk.

    buffer: of `WINDOW` bytes, where they are put. Zeroes beyond the chain's end.
    """
    whole = -(-window.length // LEAF_BYTES) * LEAF_BYTES
    if buffer is None:
        buffer = memoryview(bytearray(whole))
    if whole > window.length or chain is None or window.stop > chain.size:
        buffer[:whole] = bytes(whole)
    buffer = buffer[:whole]
    if chain is None:
        return buffer
    at = 0
    for start, end in window.ranges:
        stop = -(-end // LEAF_BYTES) * LEAF_BYTES
        inside = max(0, min(stop, chain.size) - start)
        if inside:
            chain.read_into(start, buffer[at : at + inside])
        at += stop - start
    return buffer


def change(window: Window, mine: memoryview, theirs: memoryview | None) -> Sum:
    """What `mine` in place of `theirs` adds to the content sum. theirs: None where everything below is zero."""
    new = np.frombuffer(mine, np.uint64).reshape(-1, LEAF_BYTES // 8)
    if theirs is None:
        return _sum(window, mine, _holds_data(new))
    old = np.frombuffer(theirs, np.uint64).reshape(-1, LEAF_BYTES // 8)
    differs = np.fromiter((not np.array_equal(one, other) for one, other in zip(new, old, strict=True)), np.bool_)
    return _sum(window, mine, differs & new.any(axis=1)) - _sum(window, theirs, differs & old.any(axis=1))


def _sum(window: Window, data: memoryview, chosen: npt.NDArray[np.bool_]) -> Sum:
    return sum_of(*_hashed(window, data, chosen)) if chosen.any() else empty_sum()


def _holds_data(leaves: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Whether each of some leaves, a row of words, is not all zero."""
    found = np.asarray(leaves[:, ::_SAMPLED].any(axis=1))
    unclear = np.flatnonzero(~found)
    found[unclear] = leaves[unclear].any(axis=1)
    return found


def _hashed(window: Window, data: memoryview, chosen: npt.NDArray[np.bool_]) -> tuple[Int64s, Hashes]:
    """(int64[n], uint8[n, 32]): numbers and hashes of the chosen leaves of a window."""
    places = np.flatnonzero(chosen)
    hashes = b"".join(leaf_hash(data[at : at + LEAF_BYTES]) for at in (places * LEAF_BYTES).tolist())
    return _numbers(window)[places], np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES)


def _numbers(window: Window) -> npt.NDArray[np.int64]:
    parts = [np.arange(start // LEAF_BYTES, -(-stop // LEAF_BYTES)) for start, stop in window.ranges]
    return np.concatenate(parts).astype(np.int64)


def hidden(size: int, below: View | None) -> Sum:
    """The sum of what a layer of `size` bytes cuts off the chain below it."""
    total = empty_sum()
    if below is None or below.size <= size:
        return total
    for window in windows(hidden_leaves(size, below)):
        total += change(window, read_window(below, window), None)
    return total


class Counting:
    """The content sum of a view, from that of the chain below it and the leaves that its top layer touches.

    extents: the top layer's map; may be counted piece by piece, from one thread after the other
    """

    def __init__(self, extents: Extents, view: View, below: View | None, below_sum: Sum) -> None:
        self._view, self._below, self._size = view, below, extents.size
        self._total = below_sum.copy()
        self._windows = windows(hot_leaves(extents, view, below))
        self._next = next(self._windows, None)
        self._local = threading.local()

    def up_to(self, offset: int) -> None:
        """Count the windows that end at that guest offset or before. Errors as the view's `read_into`."""
        while self._next is not None and self._next.stop <= offset:
            self._total += self._count(self._next)[0]
            self._next = next(self._windows, None)

    def rest(self, on_bytes: Callable[[int], None]) -> Sum:
        """Count what is left, on several threads; the sum.

        on_bytes: told, in the calling thread, how much was read since it was last told
        Errors as the view's `read_into`.
        """
        total = self._total - hidden(self._size, self._below)
        left = self._windows if self._next is None else chain([self._next], self._windows)
        for delta, length in in_order(self._count, left):
            total += delta
            on_bytes(length)
        return total

    def _count(self, window: Window) -> tuple[Sum, int]:
        theirs = None if self._below is None else read_window(self._below, window)
        return change(window, read_window(self._view, window, self._buffer()), theirs), window.length

    def _buffer(self) -> memoryview:
        """This thread's: to make a new one costs as much as to read into it."""
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = memoryview(bytearray(WINDOW))
        return buffer


def counted(
    extents: Extents, view: View, below: View | None, below_sum: Sum, *, on_bytes: Callable[[int], None]
) -> Sum:
    """As Counting, in one go."""
    return Counting(extents, view, below, below_sum).rest(on_bytes)


def leaf_hashes(view: View, *, on_bytes: Callable[[int], None]) -> Iterator[tuple[Int64s, Hashes]]:
    """(int64[n], uint8[n, 32]) of each window: numbers and hashes of the leaves that are not all zero, ascending.

    A window is at most 2 MiB of leaves, read and hashed on several threads.
    on_bytes: called in the calling thread with the bytes of each window. Errors as the view's `read_into`.
    """

    def read(window: Window) -> tuple[Int64s, Hashes, int]:
        return *leaves_of(window, read_window(view, window)), window.length

    for numbers, hashes, length in in_order(read, windows(data_leaves(view))):
        yield numbers, hashes
        on_bytes(length)


def in_order(work: Callable[[Window], T], portions: Iterator[Window]) -> Iterator[T]:
    """What `work` makes of each, on several threads."""
    under_way: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(WORKERS, "leaves")
    try:
        for window in portions:
            under_way.append(pool.submit(work, window))
            if len(under_way) > WORKERS * _UNDER_WAY:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
