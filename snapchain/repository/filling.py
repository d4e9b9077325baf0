"""Gives a layer's data to a sink blob by blob, for a caller who reads back and proves all that it was given.

A replay proves each leaf before it hands it over. Where the caller proves everything again, that copies and hashes each
byte in vain. Here a blob is decrypted, which authenticates it, unpacked, and written:

    guest   |------------- batch -------------|------------- batch ---
    pack A  [blob][blob]      [blob]                  a portion: read with one request, then
    pack B  [blob][blob][blob]                        unpacked and written blob by blob, by one thread

After an error a replay finds out what is damaged, and which guest range needs it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from operator import attrgetter

from snapchain.destination.reading import Sink
from snapchain.model.extents import DATA, Extents
from snapchain.repository.blobs import neighbours
from snapchain.repository.chain import ChainView, Target
from snapchain.repository.gate import Gate
from snapchain.repository.packs import Location

WORKERS = 4
"""More than cores: on object storage the wait is for the network. Each holds the stored bytes of one portion."""
BATCH_BYTES = 256 * 1024 * 1024
"""Guest bytes whose blobs are asked for in the order of packs: each generation of a disk is in packs of its own."""
PORTION_BYTES = 8 * 1024 * 1024
"""Stored bytes that are asked for at once: most of what a request can bring of a pack, and an often noted progress."""
_MOST_RANGES = 1 << 14


@dataclass(frozen=True, slots=True)
class _Portion:
    """Blobs that one request fetches. first: the lowest guest offset that they show

    blobs: in order of the pack; pieces: of each, (guest offset, offset in it, length), ascending
    """

    first: int
    blobs: Sequence[tuple[bytes, Location]]
    pieces: Sequence[Sequence[tuple[int, int, int]]]

    @property
    def shown(self) -> int:
        """Guest bytes."""
        return sum(length for some in self.pieces for _, _, length in some)

    @property
    def stored(self) -> int:
        """Bytes to fetch."""
        return max(where.offset + where.stored for _, where in self.blobs) - self.blobs[0][1].offset


class Filling:
    """The DATA of `extents` at or above guest offset `start`, as `view` shows it."""

    def __init__(self, view: ChainView, extents: Extents, *, start: int = 0) -> None:
        self._view, self._extents, self._start = view, extents, start
        self._steps: deque[int] = deque()
        self.done = start
        """Guest offset below which all was given."""

    def run(self, sink: Sink, on_copied: Callable[[int, int], None]) -> None:
        """Give all of it to the sink.

        on_copied: as of LayerReader.copy
        Raises Corrupt when a blob is damaged, which names no guest range. Nothing is given after an error.
        """
        gate = Gate()
        under_way: dict[Future[None], int] = {}
        pool = ThreadPoolExecutor(WORKERS, "fill")

        def work(portion: _Portion) -> None:
            for number, plain in self._view.blobs(portion.blobs, shown=portion.shown):
                body = memoryview(plain)
                found = [(at, body[skip : skip + length]) for at, skip, length in portion.pieces[number]]
                with gate as is_open:
                    if not is_open:
                        return
                    sink.write(found)

        def collect(unbegun: int) -> None:
            """Wait for a portion, and report how far everything is done. unbegun: guest offset where the rest begins"""
            for each in wait(under_way, return_when=FIRST_COMPLETED).done:
                del under_way[each]
                each.result()
            self._advance(min([unbegun, *under_way.values()]), on_copied)

        try:
            for blank, portions, stop in self._batches():
                for offset, length in blank:
                    sink.zero(offset, length)
                waiting = deque(portions)
                while waiting:
                    if len(under_way) < 2 * WORKERS:
                        portion = waiting.popleft()
                        under_way[pool.submit(work, portion)] = portion.first
                        self._steps.append(portion.first)
                    else:
                        collect(waiting[0].first)
                unbegun = stop
            while under_way:
                collect(unbegun)
            self._steps.append(self._extents.size)
            self._advance(self._extents.size, on_copied)
        finally:
            gate.shut()
            pool.shutdown(wait=False, cancel_futures=True)

    def cost(self) -> tuple[int, int]:
        """(requests, stored bytes) that fetch all of it."""
        portions = [portion for _, some, _ in self._batches() for portion in some]
        return len(portions), sum(portion.stored for portion in portions)

    def _advance(self, offset: int, on_copied: Callable[[int, int], None]) -> None:
        """Report that all below a guest offset was given, portion by portion."""
        while self._steps and self._steps[0] <= offset:
            step = self._steps.popleft()
            if step > self.done:
                count = self._extents.window(self.done, step).data_bytes
                self.done = step
                on_copied(step, count)

    def _batches(self) -> Iterator[tuple[list[tuple[int, int]], list[_Portion], int]]:
        """Of each batch: (offset, length) of what is zero, portions in order of their first byte, and its end."""
        for ranges in self._ranges():
            empty, targets = self._view.sources([(start, stop - start) for start, stop in ranges])
            blank = [(ranges[place][0] + at, length) for place, at, length in empty]
            wanted = [(blob, where) for where, (blob, _) in targets.items()]
            groups = neighbours(wanted, most=PORTION_BYTES)
            portions = [self._portion(ranges, [wanted[at] for at in group], targets) for group in groups]
            yield blank, sorted(portions, key=attrgetter("first")), ranges[-1][1]

    def _portion(
        self,
        ranges: Sequence[tuple[int, int]],
        blobs: Sequence[tuple[bytes, Location]],
        targets: dict[Location, tuple[bytes, list[Target]]],
    ) -> _Portion:
        pieces = [
            sorted((ranges[place][0] + at, skip, length) for place, at, skip, length in targets[where][1])
            for _, where in blobs
        ]
        return _Portion(min(each[0][0] for each in pieces), blobs, pieces)

    def _ranges(self) -> Iterator[list[tuple[int, int]]]:
        """(start, stop) of the DATA of each batch."""
        ranges: list[tuple[int, int]] = []
        room = BATCH_BYTES
        for begin, length, val in self._extents.runs():
            at, end = max(begin, self._start), begin + length
            while val >= DATA and at < end:
                stop = min(end, at + room)
                ranges.append((at, stop))
                room -= stop - at
                at = stop
                if not room or len(ranges) == _MOST_RANGES:
                    yield ranges
                    ranges, room = [], BATCH_BYTES
        if ranges:
            yield ranges
