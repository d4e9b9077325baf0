"""Unpacked blobs of all exports, as many as the size of the cache allows, and the threads that fetch what is missing.

    export --+                     +-- loader of one destination: its threads, and who waits for which blob
    export --+--> one BlockCache --+
    export --+                     +-- loader of another one: a store that hangs delays no other

A blob is one object for all that refer to it, whether its bytes are here or not. Eviction takes the bytes away and
leaves the object, so looking for bytes takes no lock. A blob is fetched once, however many wait for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from weakref import WeakValueDictionary

from snapchain.destination.reading import StoredBlob
from snapchain.errors import Corrupt, SnapchainError, Unavailable

JOB_BYTES = 4 << 20
"""Unpacked bytes that are fetched together: neighbours in a pack come with one request."""
WORKERS = 6
_MOST_AHEAD = 32 << 20


class Blob:
    """data: its bytes while the cache holds them; used: since the cache last looked; loading: who fetches it"""

    __slots__ = ("__weakref__", "data", "loading", "stored", "used")

    def __init__(self, stored: StoredBlob) -> None:
        self.stored = stored
        self.data: bytes | None = None
        self.used = False
        self.loading: Future[bytes] | None = None


class BlockCache:
    """Bytes of blobs, `limit` at most. Thread-safe. What was used since it was last looked at stays for another turn.

    held: bytes that are here
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._lock = threading.Lock()
        self._blobs: deque[Blob] = deque()

    def keep(self, blob: Blob, data: bytes) -> None:
        """Hold the bytes of a blob, and let go of others instead."""
        with self._lock:
            if blob.data is not None:
                return
            blob.data, blob.used = data, False
            self._blobs.append(blob)
            self.held += len(data)
            turns = len(self._blobs)  # in the second round nothing is spared
            while self.held > self.limit:
                old = self._blobs.popleft()
                turns -= 1
                if old.used and turns > 0:
                    old.used = False
                    self._blobs.append(old)
                    continue
                self.held -= len(old.data or b"")
                old.data = None


Load = Callable[[Sequence[StoredBlob]], Iterator[tuple[StoredBlob, bytes]]]
"""Reads blobs: each with its bytes, in any order. Raises Corrupt, Unavailable, NotFound."""


class Loader:
    """Fetches the blobs of one destination, with threads of its own. Thread-safe.

    load: as a disk of that destination does
    """

    def __init__(self, cache: BlockCache, load: Load, *, workers: int = WORKERS) -> None:
        self.cache = cache
        self._load = load
        self._lock = threading.Lock()
        self._blobs: WeakValueDictionary[bytes, Blob] = WeakValueDictionary()
        self._ahead = 0
        self._closed = False
        self._crew = Crew(workers)

    def blob(self, stored: StoredBlob) -> Blob:
        """The one object for a blob."""
        with self._lock:
            found = self._blobs.get(stored.id)
            if found is None:
                found = self._blobs[stored.id] = Blob(stored)
            return found

    def fetch(self, blobs: Iterable[Blob], *, ahead: bool = False) -> None:
        """Begin to fetch those that are not here and that nobody fetches.

        ahead: nobody waits for them: they come after those that are waited for, and not at all when there are many
        Raises Unavailable at the end.
        """
        chosen: list[Blob] = []
        most = min(_MOST_AHEAD, self.cache.limit // 4)
        with self._lock:
            if self._closed:
                raise Unavailable("the server ends")
            for blob in blobs:
                if blob.data is not None or blob.loading is not None:
                    continue
                if ahead and self._ahead + blob.stored.size > most:
                    break
                blob.loading = Future()
                self._ahead += blob.stored.size if ahead else 0
                chosen.append(blob)
        for job in _jobs(chosen):
            self._crew.submit(partial(self._fetch, job, ahead=ahead), ahead=ahead)

    def later(self, work: Callable[[], None]) -> None:
        """Do something when a thread has nothing else to do. The errors of snapchain that it raises are dropped."""
        self._crew.submit(partial(_unheard, work), ahead=True)

    def bytes_of(self, blob: Blob, *, timeout: float) -> bytes:
        """The bytes of a blob, fetched where need be. timeout: seconds

        Raises what kept it from being fetched, and Unavailable after that time.
        """
        while True:
            data = blob.data
            if data is not None:
                blob.used = True
                return data
            waiting = blob.loading
            if waiting is None:
                self.fetch([blob])
                continue
            try:
                return waiting.result(timeout)
            except TimeoutError as error:
                raise Unavailable(f"the store did not answer for {timeout:.0f} s") from error

    def close(self) -> None:
        """Fetch nothing any more, and wait for nobody: a store may hang. Who waits gets Unavailable. Idempotent."""
        self._crew.close()
        with self._lock:
            self._closed = True
            waiting = [blob.loading for blob in self._blobs.values()]
        for each in waiting:
            _settle(each, Unavailable("the server ends"))

    def _fetch(self, blobs: Sequence[Blob], *, ahead: bool) -> None:
        left = {blob.stored.id: blob for blob in blobs}
        error: Exception = Corrupt("the map contradicts itself about the size of a blob")
        try:
            for stored, data in self._load([blob.stored for blob in blobs]):
                if len(data) == stored.size:
                    self._arrived(left.pop(stored.id), data)
        except Corrupt as found:
            error = found
            while left and len(blobs) > 1:  # which of them it is
                self._fetch([left.popitem()[1]], ahead=False)
        except Exception as found:  # noqa: BLE001 - whoever waits gets it, whatever it is
            error = found
        finally:
            for blob in left.values():
                self._failed(blob, error)
            if ahead:
                with self._lock:
                    self._ahead -= sum(blob.stored.size for blob in blobs)

    def _arrived(self, blob: Blob, data: bytes) -> None:
        self.cache.keep(blob, data)
        with self._lock:
            waiting, blob.loading = blob.loading, None
        _settle(waiting, data)

    def _failed(self, blob: Blob, error: Exception) -> None:
        with self._lock:
            waiting, blob.loading = blob.loading, None
        _settle(waiting, error.detached() if isinstance(error, SnapchainError) else error)


class Crew:
    """Threads that do what is submitted. Thread-safe.

    No pool of the standard library: the interpreter waits for the threads of those at its end, and a store may hang.
    """

    def __init__(self, count: int) -> None:
        self._ready = threading.Condition()
        self._urgent: deque[Callable[[], None]] = deque()
        self._ahead: deque[Callable[[], None]] = deque()
        self._closed = False
        for number in range(count):
            threading.Thread(target=self._run, name=f"nbd fetch {number}", daemon=True).start()

    def submit(self, work: Callable[[], None], *, ahead: bool) -> None:
        """Do it soon; ahead: when there is nothing else to do."""
        with self._ready:
            (self._ahead if ahead else self._urgent).append(work)
            self._ready.notify()

    def close(self) -> None:
        """Begin nothing any more."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()

    def _run(self) -> None:
        while True:
            with self._ready:
                while not (self._urgent or self._ahead or self._closed):
                    self._ready.wait()
                if self._closed:
                    return
                work = (self._urgent or self._ahead).popleft()
            work()
            del work  # it may hold bytes


def _unheard(work: Callable[[], None]) -> None:
    with suppress(SnapchainError):  # who wants it gets the error when it is asked for
        work()


def _settle(waiting: Future[bytes] | None, outcome: bytes | Exception) -> None:
    if waiting is None:
        return
    with suppress(InvalidStateError):  # the end of the server was faster
        if isinstance(outcome, Exception):
            waiting.set_exception(outcome)
        else:
            waiting.set_result(outcome)


def _jobs(blobs: Sequence[Blob]) -> Iterator[list[Blob]]:
    """Blobs in the order in which they are stored, cut into portions."""
    portion: list[Blob] = []
    total = 0
    for blob in sorted(blobs, key=lambda each: each.stored.where):
        if portion and total + blob.stored.size > JOB_BYTES:
            yield portion
            portion, total = [], 0
        portion.append(blob)
        total += blob.stored.size
    if portion:
        yield portion
