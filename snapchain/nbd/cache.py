"""Unpacked blobs of all exports, as many as the size of the cache allows, and the threads that fetch what is missing.

    export --+                     +-- loader of one destination: its threads, and who waits for which blob
    export --+--> one BlockCache --+
    export --+                     +-- loader of another one: a store that hangs delays no other

A blob is one object for all that refer to it, whether its bytes are here or not. Eviction takes the bytes away and
leaves the object, so looking for bytes takes no lock. A blob is fetched once, however many wait for it.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from itertools import islice
from weakref import WeakValueDictionary

from snapchain.destination.reading import StoredBlob
from snapchain.errors import Corrupt, SnapchainError, Unavailable

JOB_BYTES = 4 << 20
"""Unpacked bytes that are fetched together."""
GAP_BYTES = 128 << 10
"""Stored bytes between two blobs that are cheaper to fetch than to ask again."""
_LOOKED_AT = 256
WORKERS = 6
_FOR_THOSE_WHO_WAIT = 2
"""Threads that fetch nothing ahead: a client does not wait until a request that nobody waits for is through."""
_MOST_AHEAD = 32 << 20


class Blob:
    """data: its bytes while the cache holds them; used: since eviction last came to it; loading: who fetches it"""

    __slots__ = ("__weakref__", "data", "loading", "stored", "used")

    def __init__(self, stored: StoredBlob) -> None:
        self.stored = stored
        self.data: bytes | None = None
        self.used = False
        self.loading: Future[bytes] | None = None


class BlockCache:
    """Bytes of blobs, `limit` at most. Thread-safe. A blob that was used since eviction last came to it is
    spared once.

    held: bytes that are here
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._lock = threading.Lock()
        self._blobs: deque[Blob] = deque()

    def keep(self, blob: Blob, data: bytes) -> None:
        """Hold the bytes of a blob; evict others where there is no room."""
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
        self._wanted: dict[bytes, Blob] = {}
        self._later: dict[bytes, Blob] = {}
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
        """Begin to fetch the blobs that are neither in the cache nor being fetched.

        ahead: nobody waits for them: they come after blobs that somebody waits for, and are dropped when there are many
        Raises Unavailable at the end.
        """
        count = 0
        most = min(_MOST_AHEAD, self.cache.limit // 4)
        with self._lock:
            if self._closed:
                raise Unavailable("the server ends")
            for blob in blobs:
                size = blob.stored.size
                if blob.data is not None:
                    continue
                if blob.loading is not None:
                    if ahead or self._later.pop(blob.stored.id, None) is None:
                        continue
                    self._ahead -= size  # somebody waits for it by now
                elif ahead and self._ahead + size > most:
                    break
                else:
                    blob.loading = Future()
                self._ahead += size if ahead else 0
                (self._later if ahead else self._wanted)[blob.stored.id] = blob
                count += 1
        for _ in range(count):
            self._crew.submit(partial(self._fetch_some, ahead=ahead), ahead=ahead)

    def soon(self, work: Callable[[], None]) -> None:
        """Do something, before all work that nobody waits for. The errors of snapchain that it raises are dropped."""
        self._crew.submit(partial(_unheard, work), ahead=False)

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

    def _fetch_some(self, *, ahead: bool) -> None:
        """Fetch the first wanted blob with its wanted neighbours: what piled up meanwhile becomes one request."""
        with self._lock:
            queue = self._later if ahead else self._wanted
            some = neighbours(list(islice(queue.values(), _LOOKED_AT)))
            for blob in some:
                del queue[blob.stored.id]
        if some:
            self._fetch(some)
        if ahead:
            with self._lock:
                self._ahead -= sum(blob.stored.size for blob in some)

    def _fetch(self, blobs: Sequence[Blob]) -> None:
        left = {blob.stored.id: blob for blob in blobs}
        error: Exception = Corrupt("the map contradicts itself about the size of a blob")
        try:
            for stored, data in self._load([blob.stored for blob in blobs]):
                if len(data) == stored.size:
                    self._arrived(left.pop(stored.id), data)
        except Corrupt as found:
            error = found
            while left and len(blobs) > 1:  # which of them it is
                self._fetch([left.popitem()[1]])
        except Exception as found:  # noqa: BLE001 - whoever waits gets it, whatever it is
            error = found
        finally:
            for blob in left.values():
                self._failed(blob, error)

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
        self._free = max(1, count - _FOR_THOSE_WHO_WAIT)
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
                while not (self._urgent or (self._ahead and self._free) or self._closed):
                    self._ready.wait()
                if self._closed:
                    return
                is_ahead = not self._urgent
                work = (self._urgent or self._ahead).popleft()
                self._free -= is_ahead
            work()
            del work  # it may hold bytes
            if is_ahead:
                with self._ready:
                    self._free += 1


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


def neighbours(blobs: Sequence[Blob]) -> list[Blob]:
    """The first of these, and those around it that one request fetches with it, in the order in which they are stored.

    No more than JOB_BYTES unpacked, but for the first.
    """
    if not blobs:
        return []
    place, offset, stored = blobs[0].stored.where[:3]
    near = sorted((each for each in blobs[1:] if each.stored.where[0] == place), key=lambda each: each.stored.where[1])
    low, high, left = offset, offset + stored, JOB_BYTES - blobs[0].stored.size
    chosen = [blobs[0]]
    after = bisect_left(near, offset, key=lambda each: each.stored.where[1])
    for each in near[after:]:
        if each.stored.where[1] > high + GAP_BYTES or each.stored.size > left:
            break
        high = max(high, each.stored.where[1] + each.stored.where[2])
        left -= each.stored.size
        chosen.append(each)
    for each in reversed(near[:after]):
        if each.stored.where[1] + each.stored.where[2] + GAP_BYTES < low or each.stored.size > left:
            break
        low = min(low, each.stored.where[1])
        left -= each.stored.size
        chosen.insert(0, each)
    return chosen
