"""Reads a stored layer back as its chain shows it, and proves every leaf against the record on the way.

Restoring is a replay with a sink that writes; verifying is one without.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np

from snapchain.destination.reading import Sink
from snapchain.errors import Corrupt, SnapchainError
from snapchain.model.content import LEAF_BYTES, ZERO_LEAF, Sum, content_id, empty_sum, leaf_hash
from snapchain.model.extents import DATA, Extents
from snapchain.repository.blobs import GAP_BYTES, GROUP_BYTES
from snapchain.repository.chain import ChainView
from snapchain.repository.format import LEAF_ROW, layer_name
from snapchain.repository.gate import Gate
from snapchain.repository.ingest import change_of, sum_beyond
from snapchain.repository.layers import StoredLayer, bounded_ranges, leaves_shown
from snapchain.repository.lost_maps import LostMap
from snapchain.repository.pages import Rows
from snapchain.repository.read_ahead import MOST_AHEAD, Range, ReadAhead, coalesced, within
from snapchain.repository.tasks import WINDOW, Item, Task, hot_leaves, pieces, spans, tasks, without_zeroes

WORKERS = 4
"""More than cores: on object storage the wait is for the network."""
BATCH_BYTES = 32 * 1024 * 1024
"""Guest bytes that are fetched together: some 12 MB of one or two packs. Another batch is on its way meanwhile."""
_MOST_TASKS = 64
SAMPLE_BYTES = 64 * 1024 * 1024
"""Guest bytes that are read to tell how long all of them will take: two batches, half a second of two cores."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Bad:
    """A guest range [start, stop) that cannot be read right, and why."""

    start: int
    stop: int
    error: SnapchainError


@dataclass(frozen=True, slots=True)
class _Done:
    stop: int
    change: Sum
    bytes_read: int
    bad: tuple[Bad, ...]


class Replay:
    """One layer, seen through the chain below it.

    extents: what to read, DATA and ZERO; holds at least what the layer holds.  sink: gets the DATA ranges;
    without one they are only checked.  lost: ranges of which the map is lost, ascending, for a sink that takes these
    """

    def __init__(
        self, view: ChainView, extents: Extents, sink: Sink | None = None, *, lost: Sequence[LostMap] = ()
    ) -> None:
        self._view, self._extents, self._sink, self._lost = view, extents, sink, lost
        self._below: Sequence[StoredLayer] = ()
        self._layer = view.layers[-1]
        self._gate = Gate()

    def on(self, below: Sequence[StoredLayer]) -> Replay:
        """Count the content sum from that of the chain `below`, which was replayed already."""
        self._below = below
        return self

    def run(self, on_copied: Callable[[int, int], None], *, start: int = 0) -> str:
        """Replay all of it, or what lies at or above guest offset `start`; the content id that is recorded.

        on_copied: called in guest order with (offset below which all is read, bytes since the last call)
        A sink that takes what is lost gets zeroes there, and the id is that of what it got then.
        Raises Corrupt naming the guest range that is damaged, or when the content id is not the recorded one.
        """
        lost = None if self._sink is None else self._sink.lost
        unread = deque(self._lost)
        is_whole = not unread
        total = self._below[-1].header.sum().copy() if self._below else empty_sum()
        if self._below and self._layer.size < self._below[-1].size:
            total -= sum_beyond(self._below, self._layer.size)
        # Closed at once when something is raised: its exception would keep the workers' generator alive.
        wanted = (task for task in self._tasks() if task[-1].stop > start)
        with closing(self._results(wanted)) as results:
            for done in results:
                for bad in _merged(done.bad, unread, done.stop):
                    if lost is None or not isinstance(bad.error, Corrupt):
                        raise _lost(bad) from bad.error
                    lost(bad.start, bad.stop, bad.error)
                    is_whole = False
                total += done.change
                on_copied(done.stop, done.bytes_read)
        header = self._layer.header
        if lost is not None and not is_whole:  # each leaf besides was compared with its record
            for each in unread:
                lost(*each)
            return content_id(header.size, total)
        # In the middle each leaf was compared with its record, as everywhere; their sum is that of the whole only.
        if not start and not np.array_equal(total, header.sum()):
            raise Corrupt("what was read has not the content id that was recorded", subject=layer_name(self._layer.id))
        return header.content_id

    def find_bad(self) -> list[Bad]:
        """All damaged ranges."""
        with closing(self._results(self._tasks())) as results:
            return [bad for done in results for bad in done.bad]

    def seconds(self) -> float | None:
        """How long all of it will take: as fast as its first SAMPLE_BYTES were read now; None where they cannot."""
        hot = sum(item.stop - item.start for task in self._tasks() for item in task if item.hot)
        begun, read = time.monotonic(), 0
        with closing(self._results(self._tasks())) as results:
            for done in results:
                if done.bad:
                    return None
                read += done.bytes_read
                if read >= SAMPLE_BYTES:
                    break
        return (time.monotonic() - begun) * hot / read if read else 0.0

    def _tasks(self) -> Iterator[Task]:
        layers = self._view.layers
        return tasks(self._extents, hot_leaves(self._extents), partial(bounded_ranges, layers))

    def _results(self, work: Iterator[Task]) -> Generator[_Done]:
        pool = ThreadPoolExecutor(WORKERS, "replay")
        planner = ThreadPoolExecutor(1, "replay plan")
        under_way: deque[tuple[Future[_Done], Future[list[Range]] | None]] = deque()
        with ReadAhead(self._view.read_range) as ahead:
            view = self._view.through(ahead.get)
            try:
                begun = self._submitted(pool, view, _ahead_of(_batches(work), partial(self._begin, planner, ahead)))
                under_way.extend(islice(begun, 2 * WORKERS))
                while under_way:
                    done, ended = under_way.popleft()
                    yield done.result()
                    if ended is not None:
                        ahead.drop(ended.result())
                    under_way.extend(islice(begun, 1))
            finally:
                self._gate.shut()
                pool.shutdown(wait=False, cancel_futures=True)
                planner.shutdown(wait=False, cancel_futures=True)

    def _begin(
        self, planner: ThreadPoolExecutor, ahead: ReadAhead, batch: Sequence[Task]
    ) -> tuple[Sequence[Task], Future[list[Range]]]:
        return batch, planner.submit(self._fetch, ahead, batch)

    def _fetch(self, ahead: ReadAhead, batch: Sequence[Task]) -> list[Range]:
        """Begin to fetch what a batch needs; which ranges these are. What is wrong with its map, its tasks find."""
        try:
            ranges = self._needed(batch)
        except SnapchainError:
            return []
        chosen = within(ranges, MOST_AHEAD)
        ahead.fetch(chosen)
        return chosen

    def _needed(self, batch: Sequence[Task]) -> list[Range]:
        """The ranges of packs that hold what a batch needs."""
        hot = [(item.start, item.stop - item.start) for task in batch for item in task if item.hot]
        return coalesced(self._view.locations(hot), gap=GAP_BYTES, most=GROUP_BYTES)

    def _submitted(
        self, pool: ThreadPoolExecutor, view: ChainView, batches: Iterator[tuple[Sequence[Task], Future[list[Range]]]]
    ) -> Iterator[tuple[Future[_Done], Future[list[Range]] | None]]:
        """The workers' results in the order of the tasks; with the last one of a batch, the ranges that it needed."""
        for batch, fetched in batches:
            for number, task in enumerate(batch, 1):
                yield pool.submit(self._work, view, task, fetched), fetched if number == len(batch) else None

    def _work(self, view: ChainView, task: Task, fetched: Future[list[Range]]) -> _Done:
        fetched.result()  # all ranges are on their way
        numbers: list[int] = []
        hashes: list[bytes] = []
        views, bad = self._read(view, [item for item in task if item.hot])
        bytes_read = sum(len(view) for _, view in views) - sum(each.stop - each.start for each in bad)
        leaves = [
            [leaf_hash(view[at : at + LEAF_BYTES]) for at in range(0, len(view), LEAF_BYTES)] for _, view in views
        ]
        for (item, _), digests in zip(views, leaves, strict=True):
            for at, digest in enumerate(digests):
                if digest != ZERO_LEAF:
                    numbers.append(item.start // LEAF_BYTES + at)
                    hashes.append(digest)
        fresh = np.zeros(len(numbers), LEAF_ROW)
        fresh["index"] = numbers
        fresh["hash"] = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
        # What could not be read is zero here, and has no hash.
        unlike = list(self._unlike(task, fresh, bad))
        # Nothing leaves here that is not as it is recorded.
        if self._sink and (self._sink.lost is not None or not (bad or unlike)):
            for each in unlike:
                _blank(views, leaves, each)
                fresh = fresh[
                    (fresh["index"] < each.start // LEAF_BYTES) | (fresh["index"] >= -(-each.stop // LEAF_BYTES))
                ]
            self._give(views, leaves, self._sink)
        bad = sorted([*bad, *unlike], key=lambda each: each.start)
        is_counted = not bad or (self._sink is not None and self._sink.lost is not None)
        change = change_of(self._below, *spans(task), fresh) if is_counted else empty_sum()
        return _Done(task[-1].stop, change, bytes_read, tuple(bad))

    def _give(self, views: Sequence[tuple[Item, memoryview]], leaves: Sequence[Sequence[bytes]], sink: Sink) -> None:
        """Give the DATA of some items to the sink. leaves: the hashes of each one's leaves"""
        found: list[tuple[int, memoryview]] = []
        zeroes: list[tuple[int, int]] = []
        for (item, view), digests in zip(views, leaves, strict=True):
            for begin, stop, val in pieces(self._extents, item, WINDOW):
                for first, end, zero in without_zeroes(begin, stop, item, digests) if val >= DATA else ():
                    if zero:
                        zeroes.append((first, end - first))
                    else:
                        found.append((first, view[first - item.start : end - item.start]))
        with self._gate as is_open:
            if is_open:
                sink.write(found)
                for offset, length in zeroes:
                    sink.zero(offset, length)

    def _read(self, view: ChainView, items: Sequence[Item]) -> tuple[list[tuple[Item, memoryview]], list[Bad]]:
        """The items with their bytes, and the ranges that cannot be read: these are zero."""
        views = [(item, memoryview(bytearray(item.stop - item.start))) for item in items]
        try:
            view.read_pieces([(item.start, buffer) for item, buffer in views])
        except Corrupt as error:
            if len(items) == 1:
                buffer = memoryview(bytearray(items[0].stop - items[0].start))
                bad = list(self._narrowed(view, items[0], buffer))
                return [(items[0], buffer)], bad or [Bad(items[0].start, items[0].stop, error)]
            parts = [self._read(view, [item]) for item in items]
            return [each for good, _ in parts for each in good], [bad for _, bads in parts for bad in bads]
        except SnapchainError as error:
            blank = [(item, memoryview(bytearray(item.stop - item.start))) for item in items]
            return blank, [Bad(item.start, item.stop, error) for item in items]
        return views, []

    def _narrowed(self, view: ChainView, item: Item, buffer: memoryview) -> Iterator[Bad]:
        """Which leaves of an item cannot be read, where the whole cannot; `buffer` gets the others."""
        found: Bad | None = None
        for at in range(item.start, item.stop, LEAF_BYTES):
            stop = min(at + LEAF_BYTES, item.stop)
            leaf = bytearray(stop - at)
            try:
                view.read_into(at, memoryview(leaf))
            except SnapchainError as error:
                if found is not None and found.stop == at and str(found.error) == str(error):
                    found = Bad(found.start, stop, found.error)
                    continue
                if found is not None:
                    yield found
                found = Bad(at, stop, error)
            else:
                buffer[at - item.start : stop - item.start] = leaf
        if found is not None:
            yield found

    def _unlike(self, task: Task, fresh: Rows, unread: Sequence[Bad]) -> Iterator[Bad]:
        """Leaves whose hash is not the recorded one; all zero has none, be that read or what the map says.

        unread: those of the task that could not be read
        """
        index, hashes = leaves_shown(self._view.layers, task[0].start, task[-1].stop)
        known = dict(zip(index.tolist(), map(bytes, hashes), strict=True))
        found = dict(zip(fresh["index"].tolist(), map(bytes, fresh["hash"]), strict=True))
        differ = np.array(sorted(leaf for leaf in known.keys() | found.keys() if known.get(leaf) != found.get(leaf)))
        for each in unread:
            differ = differ[(differ < each.start // LEAF_BYTES) | (differ >= -(-each.stop // LEAF_BYTES))]
        for item in task if len(differ) else ():
            begin, end = np.searchsorted(differ * LEAF_BYTES, (item.start, item.stop))
            for leaf in differ[begin:end].tolist():
                wrong = Corrupt("the bytes are not those that were shipped", subject=layer_name(self._layer.id))
                yield Bad(leaf * LEAF_BYTES, min((leaf + 1) * LEAF_BYTES, item.stop), wrong)


def _batches(work: Iterator[Task]) -> Iterator[list[Task]]:
    """Tasks that are fetched together."""
    batch: list[Task] = []
    size = 0
    for task in work:
        batch.append(task)
        size += sum(item.stop - item.start for item in task if item.hot)
        if size >= BATCH_BYTES or len(batch) >= _MOST_TASKS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ahead_of(batches: Iterator[list[Task]], begin: Callable[[Sequence[Task]], _T]) -> Iterator[_T]:
    """Begins each batch when the one before it is taken."""
    waiting: deque[_T] = deque()
    for batch in batches:
        waiting.append(begin(batch))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _merged(bad: Sequence[Bad], lost: deque[LostMap], stop: int) -> list[Bad]:
    """Damaged ranges of a task, and the lost maps that begin below guest offset `stop`, which are taken; ascending."""
    found = list(bad)
    while lost and lost[0].start < stop:
        found.append(Bad(*lost.popleft()))
    return sorted(found, key=lambda each: each.start)


def _blank(views: Sequence[tuple[Item, memoryview]], leaves: Sequence[list[bytes]], bad: Bad) -> None:
    """Make a range zero in the items that were read, and in the hashes of their leaves."""
    for (item, view), digests in zip(views, leaves, strict=True):
        if item.start <= bad.start < item.stop:
            view[bad.start - item.start : bad.stop - item.start] = bytes(bad.stop - bad.start)
            for at in range((bad.start - item.start) // LEAF_BYTES, -(-(bad.stop - item.start) // LEAF_BYTES)):
                digests[at] = ZERO_LEAF


def _lost(bad: Bad) -> SnapchainError:
    """The error of who needs the bytes. A store that does not answer has lost nothing: then it is the store's own."""
    if not isinstance(bad.error, Corrupt):
        return bad.error
    return Corrupt(
        f"guest bytes {bad.start} to {bad.stop} are lost: {bad.error.message}",
        subject=bad.error.subject,
        hint="snapchain verify --read-data tells which points are affected; restore --allow-damaged writes zeroes for "
        "what is lost",
    )
