"""Fetches the ranges of packs that a restore will need next, several packs at once, each with one request.

    guest     |--task--|--task--|--task--|--task--|      a batch of tasks, in order of the disk
    pack A    [blob][blob]      [blob]                   one range, holes of up to `gap` bytes included
    pack B    [blob][blob][blob]                         another

What is not fetched ahead, or could not be, is read when it is asked for: nothing but the time differs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

from snapchain.errors import SnapchainError, Unavailable
from snapchain.repository.packs import Location

FETCHERS = 4
MOST_AHEAD = 32 * 1024 * 1024
"""Stored bytes that are held for one batch: a map whose blobs are larger than what it shows must not fill memory."""


class Range(NamedTuple):
    """Bytes [start, stop) of a pack."""

    pack: str
    start: int
    stop: int


def coalesced(wanted: Iterable[Location], *, gap: int, most: int) -> list[Range]:
    """Ranges that hold all of these blobs, by pack and offset, none of them twice.

    gap: no hole between two blobs of a range is larger; most: nor is a range, but for that of a larger blob
    """
    found: list[Range] = []
    for where in sorted(wanted, key=lambda each: (each.pack, each.offset)):
        stop = where.offset + where.stored
        last = found[-1] if found else None
        is_near = last is not None and last.pack == where.pack and where.offset <= last.stop + gap
        if last is not None and is_near and max(stop, last.stop) - last.start <= most:
            found[-1] = last._replace(stop=max(stop, last.stop))
        elif last is None or last.pack != where.pack or stop > last.stop:
            found.append(Range(where.pack, where.offset, stop))
    return found


def within(ranges: Sequence[Range], most: int) -> list[Range]:
    """The first of these ranges that are no more than `most` bytes together."""
    total, chosen = 0, list[Range]()
    for each in ranges:
        total += each.stop - each.start
        if total > most:
            break
        chosen.append(each)
    return chosen


Get = Callable[[str, int, int], bytes | memoryview]
"""Reads a range of a pack: (pack, offset, length). Raises NotFound, Unavailable."""


class ReadAhead:
    """Thread-safe; a context manager, whose end waits for nobody. read: what is asked where nothing was fetched."""

    def __init__(self, read: Get) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(FETCHERS, "read ahead")
        self._lock = threading.Lock()
        self._held: dict[str, list[tuple[Range, Future[bytes | memoryview]]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def fetch(self, ranges: Sequence[Range]) -> None:
        """Begin to fetch these ranges, in their order; they are held until they are dropped."""
        for each in ranges:
            try:
                future = self._pool.submit(self._read, each.pack, each.start, each.stop - each.start)
            except RuntimeError:  # the restore was given up meanwhile
                return
            with self._lock:
                self._held.setdefault(each.pack, []).append((each, future))

    def drop(self, ranges: Sequence[Range]) -> None:
        """Forget these ranges: each once, since the next batch may have fetched it too."""
        with self._lock:
            for each in ranges:
                held = self._held.get(each.pack, [])
                place = next((at for at, (known, _) in enumerate(held) if known == each), None)
                if place is not None:
                    del held[place]
                if not held:
                    self._held.pop(each.pack, None)

    def get(self, pack: str, offset: int, length: int) -> bytes | memoryview:
        """Bytes of a pack, as `read` gives them; waits for them where they are on their way."""
        with self._lock:
            found = next(
                (
                    held
                    for held in self._held.get(pack, ())
                    if held[0].start <= offset and offset + length <= held[0].stop
                ),
                None,
            )
        if found is not None:
            place, future = found
            try:
                body = memoryview(future.result())
            except Unavailable:
                raise
            except SnapchainError:  # of the whole range: a part of it may be there
                return self._read(pack, offset, length)
            return body[offset - place.start : offset - place.start + length]
        return self._read(pack, offset, length)


__all__ = ["FETCHERS", "MOST_AHEAD", "Get", "Range", "ReadAhead", "coalesced", "within"]
