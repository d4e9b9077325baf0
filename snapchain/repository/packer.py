"""Fills packs from many threads and uploads them behind their backs, in bounded memory.

    add(blob) -> into the open pack -> full? -> upload queue (bounded) -> durable -> index object, now and then

A blob that two threads bring at once is stored once.  A pack is listed in an index only when it is durable, so
a crash leaves packs that nobody lists (the next `gc` takes them), never a listed pack that is not there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from types import TracebackType
from typing import Self

from snapchain.objects.store import ObjectStore
from snapchain.repository import index as indexes
from snapchain.repository.crypto import Keyring
from snapchain.repository.format import pack_name
from snapchain.repository.index import BlobIndex, IndexedPack
from snapchain.repository.packs import ClosedPack, Location, OpenPack

UPLOADS = 3
"""Packs in flight. Two cores fill about one pack in 20 ms; three hide the latency of an fsync or a PUT."""

INDEX_EVERY = 64
"""Packs (1 GiB) after which an index is written, so that a killed shipment need not upload them again."""


class Stream(Enum):
    """What goes into one pack together: data and pages lie apart, so that reading records reads no data."""

    DATA = "data"
    PAGES = "pages"


class Packer:
    """A context manager; on leaving without an error nothing is flushed: call `flush`."""

    def __init__(
        self, store: ObjectStore, keys: Keyring, index: BlobIndex, *, on_durable: Callable[[], None] = lambda: None
    ) -> None:
        """on_durable: called in a thread of an upload when a pack is in the store; what it raises ends the work."""
        self._store, self._keys, self._index = store, keys, index
        self._on_durable = on_durable
        # Filling blocks, with its lock held, while too many packs are in flight; what the uploads note needs another.
        self._filling = threading.Lock()
        self._noting = threading.Lock()
        self._open: dict[Stream, OpenPack] = {}
        self._pool = ThreadPoolExecutor(UPLOADS, "upload")
        self._slots = threading.BoundedSemaphore(UPLOADS + 1)
        self._uploads: list[Future[None]] = []
        self._durable: list[IndexedPack] = []
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
            if pack is None:
                pack = self._open[stream] = OpenPack(self._keys)
            location = pack.add(blob, payload, raw)
            self._index.add(blob, location)
            if stream is Stream.DATA:
                with self._noting:
                    self.bytes_pending += raw
                    self._raw[location.pack] = self._raw.get(location.pack, 0) + raw
            if pack.is_full:
                del self._open[stream]
                self._upload(pack.close())
            return location

    def flush(self) -> None:
        """Close the open packs, wait until all are durable, and list them in an index."""
        with self._filling:
            for pack in self._open.values():
                self._upload(pack.close())
            self._open = {}
            pending, self._uploads = self._uploads, []
        for upload in pending:
            upload.result()
        with self._noting:
            listed, self._durable = self._durable, []
        if listed:
            indexes.write(self._store, self._keys, listed, era=self._index.era)

    def _upload(self, pack: ClosedPack) -> None:
        self._slots.acquire()
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
            listed: list[IndexedPack] = []
            with self._noting:
                self.bytes_pending -= self._raw.pop(pack.pack, 0)
                self._durable.append(IndexedPack(pack.pack, pack.size, pack.ids, pack.rows))
                if len(self._durable) >= INDEX_EVERY:
                    listed, self._durable = self._durable, []
            if listed:
                indexes.write(self._store, self._keys, listed, era=self._index.era)
            self._on_durable()
        except BaseException as error:
            self._failed = self._failed or error
            raise
        finally:
            self._slots.release()
