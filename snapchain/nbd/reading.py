"""How an export is read: in pieces, from blobs that are cached, or as it is.

    a disk of blobs    [block 0][block 1]      256 KiB of the guest each, made of parts of blobs
                          |    /    |
                        blob  blob  blob       in the cache, or fetched by the loader
    any other disk     its files are in the page cache of this host already

Bytes are never made up: a range that cannot be read is an error of that range.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, TypeVar

from snapchain.destination.reading import BlobDisk, WholeDisk
from snapchain.errors import Corrupt, SnapchainError, Unavailable
from snapchain.model.content import LEAF_BYTES
from snapchain.model.extents import DATA, Extents
from snapchain.model.first_reads import FirstReads, portions
from snapchain.nbd.cache import Blob, Loader
from snapchain.nbd.data_blocks import DataBlocks
from snapchain.nbd.protocol import Piece

T = TypeVar("T")

SHIFT = 18
BLOCK = 1 << SHIFT
PORTION = 1 << 20
"""Bytes of an answer that are in memory for one client at a time."""
_MOST_BLOCKS = 1 << 16
"""Of which an export remembers what they are made of: some 30 MiB for 16 GiB."""
_FETCHED_TOGETHER = 16
_LEAVES_OF_A_STEP, _STEPS_AT_ONCE = 32, 4
"""Of what is fetched because an earlier client has read it: few enough that what clients wait for comes soon."""
_PAUSE, _LONGEST_PAUSE = 0.5, 5.0


class Notes(Protocol):
    """Takes down what clients read. is_open: whether more is taken"""

    is_open: bool

    def note(self, offset: int, length: int, /) -> None:
        """A client reads this range."""
        ...

    def close(self) -> None:
        """Take down no more."""
        ...


class Reading(Protocol):
    """An opened export. Thread-safe.

    size: bytes; extents: its map
    data: which blocks of `BLOCK` bytes hold data; most_ahead: how many of them may be fetched ahead for a client
    recorder: what is told of each read, None for nothing
    """

    size: int
    extents: Extents
    data: DataBlocks
    most_ahead: int
    recorder: Notes | None

    def ready(self, offset: int, length: int, /) -> list[Piece] | None:
        """The pieces of a range that can be given at once; None where it must be waited for, or is long."""
        ...

    def wait(self, offset: int, length: int, /) -> Iterator[list[Piece]]:
        """The pieces of a range, in order, some at a time. Raises what keeps the next ones from being read."""
        ...

    def ahead(self, first: int, stop: int, /) -> None:
        """Begin to fetch the blocks that `data` numbers [first, stop), as far as there is room; returns at once."""
        ...

    def soon(self, offset: int, length: int, /) -> None:
        """A range will be waited for: begin to fetch the first of it; returns at once."""
        ...

    def end(self) -> None:
        """The server ends: whoever waits gets Unavailable."""
        ...


class FileReading:
    """Reads a disk whose files are on this host."""

    most_ahead = 0

    def __init__(self, disk: WholeDisk) -> None:
        self.recorder: Notes | None = None
        self.size, self.extents, self._disk = disk.size, disk.extents, disk
        self.data = DataBlocks(disk.extents, BLOCK)

    def ready(self, offset: int, length: int) -> list[Piece] | None:
        """See `Reading`."""
        return self._pieces(offset, length) if length <= PORTION else None

    def wait(self, offset: int, length: int) -> Iterator[list[Piece]]:
        """See `Reading`."""
        stop = offset + length
        while offset < stop:
            some = min(PORTION, stop - offset)
            yield self._pieces(offset, some)
            offset += some

    def ahead(self, first: int, stop: int) -> None:
        """The kernel reads ahead."""

    def soon(self, offset: int, length: int) -> None:
        """It is here."""

    def end(self) -> None:
        """Nobody waits."""

    def _pieces(self, offset: int, length: int) -> list[Piece]:
        found: list[Piece] = []
        for start, some, value in self.extents.window(offset, offset + length).runs():
            if value < DATA:
                found.append((offset + start, some, None))
                continue
            view = memoryview(bytearray(some))
            self._disk.read_into(offset + start, view)
            found.append((offset + start, some, view))
        return found


_Segment = tuple[int, int, Blob | None, int, SnapchainError | None]
"""(start, stop) in the block, and the blob and the offset in it; no blob: zeroes; an error: lost."""


class BlobReading:
    """Reads a disk that is made of blobs.

    patience: seconds for which a request waits for a store that does not answer
    """

    def __init__(self, disk: WholeDisk, blobs: BlobDisk, loader: Loader, *, patience: float) -> None:
        self.size, self.extents = disk.size, disk.extents
        self.data = DataBlocks(disk.extents, BLOCK)
        self.most_ahead = max(1, min(32 << 20, loader.cache.limit // 4) >> SHIFT)
        self._blobs, self._loader, self._patience = blobs, loader, patience
        self._lock = threading.Lock()
        self._table: dict[int, tuple[_Segment, ...]] = {}
        self._closing = threading.Event()
        self.recorder: Notes | None = None

    def end(self) -> None:
        """See `Reading`."""
        self._closing.set()
        self._loader.close()

    def ready(self, offset: int, length: int) -> list[Piece] | None:
        """See `Reading`. Every request whose bytes are in the cache takes this path, so it must be fast."""
        if length > PORTION:
            return None
        found: list[Piece] = []
        stop = offset + length
        at = offset
        while at < stop:
            number = at >> SHIFT
            segments = self._table.get(number)
            if segments is None:
                return None
            base = number << SHIFT
            skip, end = at - base, min(stop - base, BLOCK)
            for first, last, blob, place, lost in segments:
                if last <= skip:
                    continue
                last = min(last, end)  # noqa: PLW2901
                some = last - skip
                if blob is not None and lost is None:
                    data = blob.data
                    if data is None:
                        return None
                    blob.used = True
                    place += skip - first  # noqa: PLW2901
                    whole = some == len(data)
                    found.append((base + skip, some, data if whole else memoryview(data)[place : place + some]))
                elif lost is None:
                    found.append((base + skip, some, None))
                else:
                    return None
                skip = last
                if skip == end:
                    break
            at = base + end
        return found

    def wait(self, offset: int, length: int) -> Iterator[list[Piece]]:
        """See `Reading`."""
        deadline = time.monotonic() + self._patience
        stop = offset + length
        self._begin(offset, stop, deadline)
        while offset < stop:
            end = min(offset + PORTION - offset % BLOCK, stop)
            pieces = self._waited(offset, end, min(stop, offset + _FETCHED_TOGETHER * BLOCK), deadline)
            yield pieces
            offset = pieces[-1][0] + pieces[-1][1]

    def ahead(self, first: int, stop: int) -> None:
        """See `Reading`."""
        for begin, end in self.data.runs(first, min(stop, first + self.most_ahead)):
            work = partial(self._fetch, begin << SHIFT, min(end << SHIFT, self.size), ahead=True)
            self._loader.later(work)

    def prefetch(self, reads: FirstReads) -> None:
        """Fetch these leaves in their order when nobody waits for others, until half of the cache is theirs."""
        at_once = max(1, min(_LEAVES_OF_A_STEP, self.most_ahead // _STEPS_AT_ONCE))
        left = deque(portions(reads, at_once))
        room = self._loader.cache.limit // 2
        lock = threading.Lock()

        def step() -> None:
            """Begin with the next ones. Those after them come when these are no longer waiting."""
            nonlocal room
            try:
                runs = left.popleft()
            except IndexError:
                return
            for first, count in runs:
                start, stop = first * LEAF_BYTES, min((first + count) * LEAF_BYTES, self.size)
                if start >= stop:
                    continue
                self._resolve(start, stop)
                shown = dict.fromkeys(self._shown(start, stop))
                missing = [blob for blob in shown if blob.data is None and blob.loading is None]
                with lock:
                    room -= sum(blob.stored.size for blob in missing)
                    if room < 0:
                        left.clear()
                        return
                self._loader.fetch(missing, ahead=True)
            self._loader.later(step)

        for _ in range(_STEPS_AT_ONCE):
            self._loader.later(step)

    def soon(self, offset: int, length: int) -> None:
        """See `Reading`."""
        stop = min(offset + length, offset + _FETCHED_TOGETHER * BLOCK)
        self._loader.soon(partial(self._fetch, offset, stop))

    def _begin(self, offset: int, stop: int, deadline: float) -> None:
        """Find out what the range is made of, and begin to fetch the first of it."""
        self._tried(lambda: self._resolve(offset, stop), deadline)
        self._fetch(offset, min(stop, offset + _FETCHED_TOGETHER * BLOCK))

    def _waited(self, offset: int, stop: int, reach: int, deadline: float) -> list[Piece]:
        """The pieces of a portion, or those before the first that cannot be read. Raises when that is the first."""
        self._fetch(stop, reach)
        found: list[Piece] = []
        for base, segments in self._segments(offset, stop):
            for first, last, blob, place, lost in segments:
                begin, end = max(base + first, offset), min(base + last, stop)
                if begin >= end:
                    continue
                try:
                    if lost is not None:
                        raise lost.detached()
                    data = None if blob is None else self._bytes(blob, deadline)
                except SnapchainError:
                    if found:
                        return found
                    raise
                skip = place + begin - base - first
                found.append((begin, end - begin, data and memoryview(data)[skip : skip + end - begin]))
        return found

    def _bytes(self, blob: Blob, deadline: float) -> bytes:
        data = blob.data
        if data is not None:
            blob.used = True
            return data
        return self._tried(lambda: self._loader.bytes_of(blob, timeout=max(0.1, deadline - time.monotonic())), deadline)

    def _tried(self, work: Callable[[], T], deadline: float) -> T:
        """Do it, again and again while the store is away and there is time."""
        pause = _PAUSE
        while True:
            try:
                return work()
            except Unavailable:
                if time.monotonic() + pause >= deadline or self._closing.wait(pause):
                    raise
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _fetch(self, offset: int, stop: int, *, ahead: bool = False) -> None:
        """Find out what a range is made of, and begin to fetch what is not here."""
        self._resolve(offset, stop)
        wanted = self._shown(offset, stop)
        if wanted:
            self._loader.fetch(wanted, ahead=ahead)

    def _shown(self, offset: int, stop: int) -> list[Blob]:
        """The blobs that a range shows, whose blocks are looked up already."""
        return [
            blob
            for base, segments in self._segments(offset, stop)
            for first, last, blob, _, _ in segments
            if blob is not None and base + first < stop and base + last > offset
        ]

    def _segments(self, offset: int, stop: int) -> Iterator[tuple[int, tuple[_Segment, ...]]]:
        """(offset, segments) of the blocks of a range."""
        for number in range(offset >> SHIFT, -(-stop // BLOCK) if offset < stop else 0):
            # Where there are many, a block may have been forgotten since it was looked up.
            yield number << SHIFT, self._table.get(number) or self._look(number, number + 1)[number]

    def _resolve(self, offset: int, stop: int) -> None:
        """Find out what the blocks of a range are made of, where that is not known."""
        unknown = [number for number in range(offset >> SHIFT, -(-stop // BLOCK)) if number not in self._table]
        if unknown and offset < stop:
            self._look(unknown[0], unknown[-1] + 1)

    def _look(self, first: int, after: int) -> dict[int, tuple[_Segment, ...]]:
        """What blocks [first, after) are made of. Raises Corrupt for a map with gaps."""
        found: dict[int, list[_Segment]] = {number: [] for number in range(first, after)}
        at, end = first << SHIFT, min(after << SHIFT, self.size)
        for part in self._blobs.parts(at, end):
            if part.start != at or part.stop > end:
                break
            blob = None if part.blob is None else self._loader.blob(part.blob)
            lost: SnapchainError | None = part.lost
            if blob is not None and part.skip + part.stop - part.start > blob.stored.size:
                lost = Corrupt("the map contradicts itself about the size of a blob")
            while at < part.stop:
                number = at >> SHIFT
                base = number << SHIFT
                some = min(part.stop, base + BLOCK)
                found[number].append((at - base, some - base, blob, part.skip + at - part.start, lost))
                at = some
        if at != end:
            raise Corrupt(f"the map contradicts itself at guest byte {at}")
        segments = {number: tuple(each) for number, each in found.items()}
        with self._lock:
            self._table.update(segments)
            while len(self._table) > _MOST_BLOCKS:
                del self._table[next(iter(self._table))]
        return segments
