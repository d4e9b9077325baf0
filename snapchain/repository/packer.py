"""Fills packs from many threads and uploads them in the background, in bounded memory.

    add(blob) -> into the open pack -> full? -> upload queue (bounded) -> durable -> index object, now and then

A blob that two threads bring at once is stored once.  A pack is listed in an index only when it is durable, so
a crash leaves packs that nobody lists (the next `gc` takes them), never a listed pack that is not there.

A pack that no index lists when a shipment ends early is sent again by the next one.  So small indexes are written on
the way, one for every INDEX_BYTES, and one more when the shipment is interrupted; SMALL of them are put together into
one, so that a long shipment leaves few objects.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from enum import Enum
from types import TracebackType
from typing import Self

from snapchain.errors import SnapchainError
from snapchain.objects.store import ObjectStore
from snapchain.repository import index as indexes
from snapchain.repository.crypto import Keyring
from snapchain.repository.format import pack_name
from snapchain.repository.index import BlobIndex, IndexedPack
from snapchain.repository.packs import ClosedPack, Location, OpenPack

UPLOADS = 3
"""Packs in flight. Two cores fill about one pack in 20 ms; three hide the latency of an fsync or a PUT."""

INDEX_BYTES = 64 * 1024 * 1024
"""Durable packs after which an index is written: after a kill, so much is sent again, and the packs on their way."""

SMALL = 16
"""Small indexes (1 GiB of packs) of which one is made."""

_LAST_WORDS = 5.0
"""Seconds that an interrupted shipment may take to list its packs: the network may have failed."""


class Stream(Enum):
    """What goes into one pack together: data and pages lie apart, so that reading records reads no data."""

    DATA = "data"
    PAGES = "pages"


class Packer:
    """A context manager; on leaving without an error nothing is flushed: call `flush`.

    pack_size: bytes that a pack or an index has at most; None: the default
    on_durable: called in a thread of an upload when a pack is in the store; what it raises ends the work
    on_waited: called with the seconds that a full pack has waited until the store took it
    """

    def __init__(
        self,
        store: ObjectStore,
        keys: Keyring,
        index: BlobIndex,
        *,
        pack_size: int | None = None,
        on_durable: Callable[[], None] = lambda: None,
        on_waited: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        self._on_waited = on_waited
        self._store, self._keys, self._index = store, keys, index
        self._pack_size, self._on_durable = pack_size, on_durable
        # Filling blocks, with its lock held, while too many packs are in flight; what the uploads note needs another.
        self._filling = threading.Lock()
        self._noting = threading.Lock()
        self._open: dict[Stream, OpenPack] = {}
        self._pool = ThreadPoolExecutor(UPLOADS, "upload")
        self._slots = threading.BoundedSemaphore(UPLOADS + 1)
        self._uploads: list[Future[None]] = []
        self._durable: list[IndexedPack] = []
        self._durable_bytes = 0
        self._small: dict[str, list[IndexedPack]] = {}  # indexes of this session that are to be put together
        self._raw: dict[str, int] = {}  # of each pack that is not in the store yet
        self._failed: BaseException | None = None
        self.bytes_stored = 0
        self.bytes_pending = 0
        """Of data that was given and is not in the store yet, before compression."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error or a Ctrl-C nobody needs what is in flight: a slow upload must not hold up the end.
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        if isinstance(error, Exception | KeyboardInterrupt):
            self._list_in_haste()

    def add(self, blob: bytes, payload: bytes, raw: int, *, stream: Stream = Stream.DATA) -> Location:
        """Store a blob unless it is there already. Blocks while too many packs are in flight.

        Raises what an earlier upload raised.
        """
        with self._filling:
            if self._failed is not None:
                raise self._failed
            known = self._index.find(blob)
            if known is not None:
                return known
            pack = self._open.get(stream)
            if pack is not None and not pack.has_room(len(payload)):
                del self._open[stream]
                self._upload(pack.close())
                pack = None
            if pack is None:
                pack = self._open[stream] = OpenPack(self._keys, limit=self._pack_size)
            location = pack.add(blob, payload, raw)
            self._index.add(blob, location)
            if stream is Stream.DATA:
                with self._noting:
                    self.bytes_pending += raw
                    self._raw[location.pack] = self._raw.get(location.pack, 0) + raw
            return location

    def adopt(self, packs: Iterable[IndexedPack]) -> None:
        """Use what these packs hold, which are in the store and which no index lists; and list them."""
        for pack in packs:
            self._index.load(pack.ids, pack.rows, [pack.pack])
            with self._noting:
                self._durable.append(pack)

    def flush(self) -> None:
        """Close the open packs, wait until all are durable, and list them in an index."""
        with self._filling:
            for pack in self._open.values():
                self._upload(pack.close())
            self._open = {}
            pending, self._uploads = self._uploads, []
        for upload in pending:
            upload.result()
        self._list(self._taken(0))

    def _taken(self, least: int) -> list[IndexedPack]:
        """The durable packs that no index lists, when they are more than `least` bytes; they are the caller's then."""
        with self._noting:
            if self._durable_bytes < least:
                return []
            listed, self._durable, self._durable_bytes = self._durable, [], 0
            return listed

    def _list(self, packs: list[IndexedPack]) -> None:
        """Write an index of these packs, and make one of SMALL such indexes."""
        if not packs:
            return
        written = {
            indexes.write(self._store, self._keys, group, era=self._index.era): group
            for group in indexes.split(packs, self._pack_size)
        }
        with self._noting:
            self._small |= written
            if len(self._small) < SMALL:
                return
            small, self._small = self._small, {}
        together = [pack for some in small.values() for pack in some]
        for group in indexes.split(together, self._pack_size):
            indexes.write(self._store, self._keys, group, era=self._index.era)
        for each in small:
            with suppress(SnapchainError):  # one that stays lists nothing wrong
                self._store.delete(each)

    def _list_in_haste(self) -> None:
        """List what is durable, unless the store takes too long."""
        packs = self._taken(0)
        if not packs:
            return

        def write() -> None:
            with suppress(SnapchainError):  # the error that has ended the shipment is the one to report
                for group in indexes.split(packs, self._pack_size):
                    indexes.write(self._store, self._keys, group, era=self._index.era)

        writer = threading.Thread(target=write, name="last index", daemon=True)
        writer.start()
        writer.join(_LAST_WORDS)

    def _upload(self, pack: ClosedPack) -> None:
        began = time.monotonic()
        self._slots.acquire()
        self._on_waited(time.monotonic() - began)
        try:
            upload = self._pool.submit(self._put, pack)
        except RuntimeError:  # given up: the next one who waits for a slot shall learn it as well
            self._slots.release()
            raise
        self.bytes_stored += pack.size
        self._uploads = [upload for upload in self._uploads if not upload.done() or upload.exception()]
        self._uploads.append(upload)

    def _put(self, pack: ClosedPack) -> None:
        try:
            self._store.put(pack_name(pack.pack), pack.parts)
            with self._noting:
                self.bytes_pending -= self._raw.pop(pack.pack, 0)
                self._durable.append(IndexedPack(pack.pack, pack.size, pack.ids, pack.rows))
                self._durable_bytes += pack.size
            self._list(self._taken(INDEX_BYTES))
            self._on_durable()
        except BaseException as error:
            self._failed = self._failed or error
            raise
        finally:
            self._slots.release()
