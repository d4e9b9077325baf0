"""Reads a stored layer back as its chain shows it, and proves every leaf against the record on the way.

Restoring is a replay with a sink that writes; verifying is one without.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import TracebackType

import numpy as np

from snapchain.destination.reading import Sink
from snapchain.errors import Corrupt, SnapchainError
from snapchain.model.content import LEAF_BYTES, ZERO_LEAF, Sum, empty_sum, leaf_hash
from snapchain.model.extents import DATA, Extents
from snapchain.repository.chain import ChainView
from snapchain.repository.format import LEAF_ROW, layer_name
from snapchain.repository.ingest import change_of, sum_beyond
from snapchain.repository.layers import StoredLayer, bounded_ranges, leaves_shown
from snapchain.repository.pages import Rows
from snapchain.repository.tasks import WINDOW, Item, Task, hot_leaves, pieces, spans, tasks, without_zeroes

WORKERS = 4
"""More than cores: on object storage the wait is for the network."""


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


class _Gate:
    """Lets writes through until it is shut, and is shut only between writes.

    After an error nobody waits for workers that wait for a slow store, but none of them may write any more: the
    output is about to be closed, and its descriptor's number will be another file's.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._writing = 0
        self._shut = False

    def __enter__(self) -> bool:
        """True when the caller may write."""
        with self._changed:
            self._writing += 1
            return not self._shut

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._writing -= 1
            self._changed.notify_all()

    def shut(self) -> None:
        """Wait for the writes under way, and allow no more."""
        with self._changed:
            self._shut = True
            self._changed.wait_for(lambda: self._writing <= 0)


class Replay:
    """One layer, seen through the chain below it.

    extents: what to read, DATA and ZERO; holds at least what the layer holds.  sink: gets the DATA ranges;
    without one they are only checked.
    """

    def __init__(self, view: ChainView, extents: Extents, sink: Sink | None = None) -> None:
        self._view, self._extents, self._sink = view, extents, sink
        self._below: Sequence[StoredLayer] = ()
        self._layer = view.layers[-1]
        self._gate = _Gate()

    def on(self, below: Sequence[StoredLayer]) -> Replay:
        """Count the content sum from that of the chain `below`, which was replayed already."""
        self._below = below
        return self

    def run(self, on_copied: Callable[[int, int], None], *, start: int = 0) -> str:
        """Replay all of it, or what lies at or above guest offset `start`; the content id that is recorded.

        on_copied: called in guest order with (offset below which all is read, bytes since the last call)
        Raises Corrupt naming the guest range that is damaged, or when the content id is not the recorded one.
        """
        total = self._below[-1].header.sum().copy() if self._below else empty_sum()
        if self._below and self._layer.size < self._below[-1].size:
            total -= sum_beyond(self._below, self._layer.size)
        # Closed at once when something is raised: its exception would keep the workers' generator alive.
        wanted = (task for task in self._tasks() if task[-1].stop > start)
        with closing(self._results(wanted)) as results:
            for done in results:
                if done.bad:
                    raise _lost(done.bad[0]) from done.bad[0].error
                total += done.change
                on_copied(done.stop, done.bytes_read)
        # In the middle each leaf was compared with its record, as everywhere; their sum is that of the whole only.
        if not start and not np.array_equal(total, self._layer.header.sum()):
            raise Corrupt("what was read has not the content id that was recorded", subject=layer_name(self._layer.id))
        return self._layer.header.content_id

    def find_bad(self) -> list[Bad]:
        """All damaged ranges."""
        with closing(self._results(self._tasks())) as results:
            return [bad for done in results for bad in done.bad]

    def _tasks(self) -> Iterator[Task]:
        layers = self._view.layers
        return tasks(self._extents, hot_leaves(self._extents), partial(bounded_ranges, layers))

    def _results(self, work: Iterator[Task]) -> Generator[_Done]:
        pool = ThreadPoolExecutor(WORKERS, "replay")
        under_way: deque[Future[_Done]] = deque()
        try:
            under_way.extend(pool.submit(self._work, task) for task in islice(work, 2 * WORKERS))
            while under_way:
                yield under_way.popleft().result()
                under_way.extend(pool.submit(self._work, task) for task in islice(work, 1))
        finally:
            self._gate.shut()
            pool.shutdown(wait=False, cancel_futures=True)

    def _work(self, task: Task) -> _Done:
        numbers: list[int] = []
        hashes: list[bytes] = []
        bytes_read = 0
        views, bad = self._read([item for item in task if item.hot])
        found: list[tuple[int, memoryview]] = []
        zeroes: list[tuple[int, int]] = []
        for item, view in views:
            bytes_read += len(view)
            leaves = [leaf_hash(view[at : at + LEAF_BYTES]) for at in range(0, len(view), LEAF_BYTES)]
            for at, digest in enumerate(leaves):
                if digest != ZERO_LEAF:
                    numbers.append(item.start // LEAF_BYTES + at)
                    hashes.append(digest)
            for begin, stop, val in pieces(self._extents, item, WINDOW) if self._sink else ():
                for first, end, zero in without_zeroes(begin, stop, item, leaves) if val >= DATA else ():
                    if zero:
                        zeroes.append((first, end - first))
                    else:
                        found.append((first, view[first - item.start : end - item.start]))
        if self._sink:
            with self._gate as is_open:
                if is_open:
                    self._sink.write(found)
                    for offset, length in zeroes:
                        self._sink.zero(offset, length)
        fresh = np.zeros(len(numbers), LEAF_ROW)
        fresh["index"] = numbers
        fresh["hash"] = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
        if not bad:
            bad.extend(self._unlike(task, fresh))
        change = empty_sum() if bad else change_of(self._below, *spans(task), fresh)
        return _Done(task[-1].stop, change, bytes_read, tuple(bad))

    def _read(self, items: Sequence[Item]) -> tuple[list[tuple[Item, memoryview]], list[Bad]]:
        """The items that can be read, with their bytes, and the ranges that cannot."""
        views = [(item, memoryview(bytearray(item.stop - item.start))) for item in items]
        try:
            self._view.read_pieces([(item.start, view) for item, view in views])
        except Corrupt as error:
            if len(items) == 1:
                return [], list(self._narrowed(items[0])) or [Bad(items[0].start, items[0].stop, error)]
            parts = [self._read([item]) for item in items]
            return [view for good, _ in parts for view in good], [bad for _, bads in parts for bad in bads]
        except SnapchainError as error:
            return [], [Bad(item.start, item.stop, error) for item in items]
        return views, []

    def _narrowed(self, item: Item) -> Iterator[Bad]:
        """Which leaves of an item that cannot be read as a whole it is that cannot be read."""
        found: Bad | None = None
        for at in range(item.start, item.stop, LEAF_BYTES):
            stop = min(at + LEAF_BYTES, item.stop)
            try:
                self._view.read_into(at, memoryview(bytearray(stop - at)))
            except SnapchainError as error:
                if found is not None and found.stop == at and str(found.error) == str(error):
                    found = Bad(found.start, stop, found.error)
                    continue
                if found is not None:
                    yield found
                found = Bad(at, stop, error)
        if found is not None:
            yield found

    def _unlike(self, task: Task, fresh: Rows) -> Iterator[Bad]:
        """Leaves whose hash is not the recorded one; all zero has none, be that read or what the map says."""
        index, hashes = leaves_shown(self._view.layers, task[0].start, task[-1].stop)
        known = dict(zip(index.tolist(), map(bytes, hashes), strict=True))
        found = dict(zip(fresh["index"].tolist(), map(bytes, fresh["hash"]), strict=True))
        differ = np.array(sorted(leaf for leaf in known.keys() | found.keys() if known.get(leaf) != found.get(leaf)))
        for item in task if len(differ) else ():
            begin, end = np.searchsorted(differ * LEAF_BYTES, (item.start, item.stop))
            for leaf in differ[begin:end].tolist():
                wrong = Corrupt("the bytes are not those that were shipped", subject=layer_name(self._layer.id))
                yield Bad(leaf * LEAF_BYTES, min((leaf + 1) * LEAF_BYTES, item.stop), wrong)


def _lost(bad: Bad) -> SnapchainError:
    """The error of who needs the bytes. A store that does not answer has lost nothing: then it is the store's own."""
    if not isinstance(bad.error, Corrupt):
        return bad.error
    return Corrupt(
        f"guest bytes {bad.start} to {bad.stop} are lost: {bad.error.message}",
        subject=bad.error.subject,
        hint="snapchain verify --read-data tells which points are affected",
    )
