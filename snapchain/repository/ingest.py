"""Ingest one layer: read -> hash -> look up -> compress -> encrypt -> pack -> upload, on all cores.

Workers take tasks (tasks.py); the calling thread joins their results in guest order, so that pages are cut
alike whatever the timing.  A bounded number of tasks is under way, packs wait in a bounded queue:
memory does not follow the size of the disk.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import blake3
import numpy as np
import zstandard

from snapchain.image.view import read_pieces
from snapchain.model.content import LEAF_BYTES, ZERO_LEAF, Sum, empty_sum, leaf_hash, sum_of
from snapchain.model.extents import DATA, Extents, Int64s
from snapchain.repository.crypto import Keyring
from snapchain.repository.format import ID_BYTES, LEAF_ROW, PAGE_ROW, RUN_ROW
from snapchain.repository.index import BlobIndex
from snapchain.repository.layers import StoredLayer, bounded_ranges, leaves_shown
from snapchain.repository.packer import Packer, Stream
from snapchain.repository.packs import Location, packed
from snapchain.repository.pages import Page, PageBuilder, Rows
from snapchain.repository.tasks import (
    WINDOW,
    Item,
    Task,
    hot_leaves,
    pieces,
    spans,
    tasks,
    with_last_leaf,
    without_zeroes,
)

PAGE_LEVEL = 1
"""Of zstd, for pages: most of their bytes are hashes, which no level makes smaller."""

_UNDER_WAY = 4
"""Tasks in flight a worker: enough to keep cores busy behind one slow read, 16 MiB of results at the most."""


class LayerSource(Protocol):
    """A layer to ingest.

    size: virtual size in bytes; extents: the layer's own map (DATA, ZERO, ABSENT)
    """

    @property
    def size(self) -> int: ...

    @property
    def extents(self) -> Extents: ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """The bytes that the guest sees at this layer, those of layers below included. Thread-safe."""
        ...


@dataclass(frozen=True, slots=True)
class Ingested:
    """A layer whose data and pages are in packs. pages: PAGE_ROW[n]; total: its chain's content sum."""

    pages: Rows
    total: Sum
    data_bytes: int
    zero_bytes: int
    bytes_read: int


@dataclass(frozen=True, slots=True)
class _Result:
    runs: Rows
    packs: Sequence[str]
    leaves: Rows
    change: Sum
    bytes_read: int


class _Part(NamedTuple):
    """Guest bytes [start, stop) of a task. data: None for zeroes; blob: the id, None for those that share a blob"""

    start: int
    stop: int
    data: memoryview | None = None
    blob: bytes | None = None


class Ingest:
    """Takes layers into one repository. Not thread-safe itself; uses threads inside."""

    def __init__(
        self,
        *,
        keys: Keyring,
        index: BlobIndex,
        packer: Packer,
        block_size: int,
        level: Callable[[], int],
        workers: int | None = None,
    ) -> None:
        """level: of zstd, for the next blob"""
        self._keys, self._index, self._packer, self._block, self._level = keys, index, packer, block_size, level
        self._workers = workers or max(2, os.cpu_count() or 1)
        self._local = threading.local()

    def take(self, source: LayerSource, below: Sequence[StoredLayer], on_bytes: Callable[[int], None]) -> Ingested:
        """Take in one layer that lies on the chain `below` (root first, may be empty).

        on_bytes: called in the calling thread with the guest bytes read since the last call.
        """
        shortened = bool(below) and source.size < below[-1].size
        extents = with_last_leaf(source.extents) if shortened else source.extents
        total = below[-1].header.sum().copy() if below else empty_sum()
        if shortened:
            total -= sum_beyond(below, source.size)
        builder, rows = PageBuilder(), np.empty(0, PAGE_ROW)
        table: list[Rows] = [rows]
        data_bytes = zero_bytes = bytes_read = 0
        with closing(self._results(source, extents, below)) as results:
            for result in results:
                zero = result.runs["stored"] == 0
                zero_bytes += int(result.runs["length"][zero].sum())
                data_bytes += int(result.runs["length"][~zero].sum())
                bytes_read += result.bytes_read
                total += result.change
                builder.add(result.runs, result.packs, result.leaves)
                if builder.is_full:
                    table.append(self._store_page(builder))
                on_bytes(result.bytes_read)
        table.append(self._store_page(builder))
        return Ingested(np.concatenate(table), total, data_bytes, zero_bytes, bytes_read)

    def _results(self, source: LayerSource, extents: Extents, below: Sequence[StoredLayer]) -> Generator[_Result]:
        """The workers' results in the order of the tasks."""
        pool = ThreadPoolExecutor(self._workers, "intake")
        under_way: deque[Future[_Result]] = deque()
        try:
            for task in tasks(extents, hot_leaves(extents)):
                under_way.append(pool.submit(self._work, source, extents, below, task))
                if len(under_way) > self._workers * _UNDER_WAY:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            # A worker may wait for a slow upload; after a Ctrl-C no thread waits for the worker.
            pool.shutdown(wait=False, cancel_futures=True)

    def _work(self, source: LayerSource, extents: Extents, below: Sequence[StoredLayer], task: Task) -> _Result:
        parts: list[_Part] = []
        numbers: list[int] = []
        hashes: list[bytes] = []
        bytes_read = 0
        views = self._views(task)
        read_pieces(source, [(item.start, view) for item, view in views.items()])
        for item in task:
            if not item.hot:
                parts.append(_Part(item.start, item.stop))
                continue
            view = views[item]
            bytes_read += len(view)
            leaves = [leaf_hash(view[at : at + LEAF_BYTES]) for at in range(0, len(view), LEAF_BYTES)]
            for at, digest in enumerate(leaves):
                if digest != ZERO_LEAF:
                    numbers.append(item.start // LEAF_BYTES + at)
                    hashes.append(digest)
            for begin, stop, val in pieces(extents, item, self._block):
                if val < DATA:
                    parts.append(_Part(begin, stop))
                    continue
                for first, end, zero in without_zeroes(begin, stop, item, leaves):
                    data = view[first - item.start : end - item.start]
                    if zero:
                        parts.append(_Part(first, end))
                    elif len(data) < SCRAP_BYTES:
                        parts.append(_Part(first, end, data))
                    else:
                        blob = self._id(data, _piece_hashes(first, item, leaves, data))
                        parts.append(_Part(first, end, data, blob))
        rows, packs = self._stored(parts).rows()
        fresh = np.zeros(len(numbers), LEAF_ROW)
        fresh["index"] = numbers
        fresh["hash"] = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
        return _Result(rows, packs, fresh, change_of(below, *spans(task), fresh), bytes_read)

    def _stored(self, parts: Sequence[_Part]) -> RunList:
        """The runs of these parts, once their bytes are stored."""
        self._index.prepare(part.blob for part in parts if part.blob is not None)
        runs = RunList(self._block, lambda data: self._store(self._id(data), data))
        for part in parts:
            if part.data is None:
                runs.zero(part.start, part.stop)
            elif part.blob is None:
                runs.scrap(part.start, part.stop, part.data)
            else:
                runs.data(part.start, part.stop, self._store(part.blob, part.data))
        return runs

    def _id(self, data: memoryview, piece_hashes: bytes | None = None) -> bytes:
        return self._keys.blob_id(b"".join(_hashes(data)) if piece_hashes is None else piece_hashes)

    def _store(self, blob: bytes, data: memoryview) -> Blob:
        """The location of these bytes in the repository; they are stored if they are new."""
        known = self._index.find(blob)
        if known is None:
            known = self._packer.add(blob, packed(self._compressor(), data), len(data))
        return blob, known

    def _store_page(self, builder: PageBuilder) -> Rows:
        return store_page(builder, keys=self._keys, packer=self._packer)

    def _views(self, task: Task) -> dict[Item, memoryview]:
        """A place in the thread's buffer for each item that is read: together they are at most WINDOW bytes."""
        views: dict[Item, memoryview] = {}
        at = 0
        for item in task:
            if item.hot:
                views[item] = self._buffer()[at : at + item.stop - item.start]
                at += item.stop - item.start
        return views

    def _buffer(self) -> memoryview:
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = memoryview(bytearray(WINDOW))
        return buffer

    def _compressor(self) -> zstandard.ZstdCompressor:
        level = self._level()
        compressors: dict[int, zstandard.ZstdCompressor] | None = getattr(self._local, "compressors", None)
        if compressors is None:
            compressors = self._local.compressors = {}
        if level not in compressors:
            compressors.clear()  # a high level takes megabytes
            compressors[level] = zstandard.ZstdCompressor(level=level)
        return compressors[level]


def store_page(builder: PageBuilder, *, keys: Keyring, packer: Packer) -> Rows:
    """Put what the builder holds into a pack; its PAGE_ROW, or none when it holds nothing."""
    taken = builder.take()
    return np.empty(0, PAGE_ROW) if taken is None else store_page_body(*taken, keys=keys, packer=packer)


def store_page_body(first: int, stop: int, page: Page, *, keys: Keyring, packer: Packer) -> Rows:
    """Put a page that speaks of [first, stop) into a pack, unless it is there; its PAGE_ROW."""
    body = page.encode()
    blob = keys.blob_id(b"".join(_hashes(memoryview(body))))
    where = packer.add(blob, packed(zstandard.ZstdCompressor(level=PAGE_LEVEL), body), len(body), stream=Stream.PAGES)
    row = np.zeros(1, PAGE_ROW)
    row["first"], row["stop"] = first, stop
    row["id"] = np.frombuffer(blob, np.uint8)
    row["pack"] = np.frombuffer(bytes.fromhex(where.pack), np.uint8)
    row["offset"], row["stored"], row["raw"] = where.offset, where.stored, where.raw
    row["data"], row["zero"] = page.data_bytes(), page.zero_bytes()
    return row


def _piece_hashes(first: int, item: Item, leaves: Sequence[bytes], data: memoryview) -> bytes | None:
    """The hashes that make the id of the blob at `first`, where those of its leaves are among them."""
    if first % LEAF_BYTES:
        return None
    begin, whole = (first - item.start) // LEAF_BYTES, len(data) // LEAF_BYTES
    return b"".join([*leaves[begin : begin + whole], *_hashes(data[whole * LEAF_BYTES :])])


def _hashes(data: memoryview) -> Iterator[bytes]:
    for at in range(0, len(data), LEAF_BYTES):
        yield blake3.blake3(data[at : at + LEAF_BYTES]).digest()


def change_of(below: Sequence[StoredLayer], first: Int64s, stop: Int64s, fresh: Rows) -> Sum:
    """The change of the content sum by the leaves of some guest ranges, less the leaves of the chain below there.

    first, stop: int64[n], ranges in bytes, ascending, apart; fresh: LEAF_ROWs inside them
    """
    index = fresh["index"].astype(np.int64)
    if not below or not len(first):
        return sum_of(index, fresh["hash"])
    old_index, old_hash = leaves_shown(below, int(first[0]), min(int(stop[-1]), below[-1].size))
    begin = np.searchsorted(old_index, first // LEAF_BYTES)
    end = np.searchsorted(old_index, -(-stop // LEAF_BYTES))
    steps = np.bincount(begin, minlength=len(old_index) + 1) - np.bincount(end, minlength=len(old_index) + 1)
    inside = np.cumsum(steps)[: len(old_index)] > 0
    old_index, old_hash = old_index[inside], old_hash[inside]
    # Leaves that did not change cancel out; most of them do where a guest rewrote what it had.
    _, mine, theirs = np.intersect1d(index, old_index, assume_unique=True, return_indices=True)
    same = (fresh["hash"][mine] == old_hash[theirs]).all(axis=1)
    stay_new, stay_old = np.ones(len(index), np.bool_), np.ones(len(old_index), np.bool_)
    stay_new[mine[same]] = False
    stay_old[theirs[same]] = False
    return sum_of(index[stay_new], fresh["hash"][stay_new]) - sum_of(old_index[stay_old], old_hash[stay_old])


def sum_beyond(below: Sequence[StoredLayer], size: int) -> Sum:
    """The sum of the leaves that lie wholly past `size`."""
    total = empty_sum()
    for first, stop in bounded_ranges(below, -(-size // LEAF_BYTES) * LEAF_BYTES, below[-1].size):
        index, hashes = leaves_shown(below, first, stop)
        total += sum_of(index, hashes)
    return total


# --- The runs of one task, collected in guest order: which guest bytes are ZERO, which are which bytes of which blob.
#
# A run of a leaf or more is a blob of its own, cut at blocks, so that it is found again wherever it was seen before.
# Shorter ones, as clusters of 4 KiB or the holes of a raw file leave them, share one blob for each block:
#
#     guest   |--run--|    |-run-|  |--run--|    |     cut at multiples of the block size
#     blob    |--run--|-run-|--run--|                  each run with its own `skip`
#
# A blob for each would cost more in tags, rows and index entries than the data of the smallest clusters.

SCRAP_BYTES = LEAF_BYTES
"""Runs shorter than this share a blob with their neighbours in the block."""

Blob = tuple[bytes, Location]
_ZERO = -1


class RunList:
    """Takes runs in ascending order. Not thread-safe.

    block: bytes at whose multiples scraps part; store: puts the bytes of shared blobs away
    """

    def __init__(self, block: int, store: Callable[[memoryview], Blob]) -> None:
        self._block, self._store = block, store
        self._start: list[int] = []
        self._length: list[int] = []
        self._skip: list[int] = []
        self._number: list[int] = []  # which blob each run is of; _ZERO for none
        self._blobs: list[Blob | None] = []  # None: its scraps are still being collected
        self._scraps = bytearray()
        self._at = 0  # the block that they are in

    def zero(self, start: int, stop: int) -> None:
        """[start, stop) is ZERO."""
        if self._number and self._number[-1] == _ZERO and self._start[-1] + self._length[-1] == start:
            self._length[-1] += stop - start
        else:
            self._add(start, stop, _ZERO, 0)

    def data(self, start: int, stop: int, blob: Blob) -> None:
        """[start, stop) is this blob."""
        self._settle()
        self._blobs.append(blob)
        self._add(start, stop, len(self._blobs) - 1, 0)

    def scrap(self, start: int, stop: int, data: memoryview) -> None:
        """[start, stop), less than SCRAP_BYTES within one block, is this data; it is copied."""
        at = start // self._block
        if at != self._at or not self._scraps:
            self._settle()
            self._at = at
            self._blobs.append(None)
        self._add(start, stop, len(self._blobs) - 1, len(self._scraps))
        self._scraps += data

    def rows(self) -> tuple[Rows, list[str]]:
        """All runs as RUN_ROWs, and the table of packs that their column `pack` indexes."""
        self._settle()
        blobs = [blob for blob in self._blobs if blob is not None]
        packs: dict[str, int] = {}
        table = np.zeros(len(blobs) + 1, RUN_ROW)  # the last row is ZERO, at place -1
        if blobs:
            found = table[:-1]
            found["id"] = np.frombuffer(b"".join(blob for blob, _ in blobs), np.uint8).reshape(-1, ID_BYTES)
            found["pack"] = [packs.setdefault(where.pack, len(packs)) for _, where in blobs]
            found["offset"] = [where.offset for _, where in blobs]
            found["stored"] = [where.stored for _, where in blobs]
            found["raw"] = [where.raw for _, where in blobs]
        rows = table[np.array(self._number, np.intp)]
        rows["start"], rows["length"], rows["skip"] = self._start, self._length, self._skip
        return rows, list(packs)

    def _add(self, start: int, stop: int, number: int, skip: int) -> None:
        self._start.append(start)
        self._length.append(stop - start)
        self._number.append(number)
        self._skip.append(skip)

    def _settle(self) -> None:
        if self._scraps:
            self._blobs[-1] = self._store(memoryview(self._scraps))
            self._scraps = bytearray()
