"""Points opened to be read at any offset, through one cache; and the notes of what went wrong, each once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Self

from snapchain.destination.reading import BlobDisk, ReadableDestination, RecordsFirstReads, SharesBlobs
from snapchain.destination.records import PointRecord
from snapchain.errors import Corrupt, InvalidInput, NotFound
from snapchain.host.shared_cache import SharedCache
from snapchain.model.events import Notice, OnEvent
from snapchain.nbd.cache import BlockCache, Load, Loader
from snapchain.nbd.exports import Export
from snapchain.nbd.first_reads import first_reads
from snapchain.nbd.reading import BlobReading, FileReading, Reading

CACHE_BYTES = 256 << 20
LEAST_CACHE = 16 << 20
PATIENCE = 120.0
"""Seconds for which a read waits for a store that does not answer, before it fails."""
_MOST_NOTED = 1000
_AFTER_DAMAGE = (
    "`snapchain verify --read-data` tells which points are affected, and `snapchain repair` stores lost data again"
)


class PointReadings:
    """Opens points of any destinations. A context manager: at its end nothing is fetched any more. Thread-safe.

    cache: bytes, for all points; patience: seconds for which a read waits for a store that does not answer
    prefetch: fetch what was read first of the disk before; records: record what is read first now
    shared: what processes of this host share
    """

    def __init__(
        self,
        *,
        cache: int,
        patience: float,
        on_event: OnEvent,
        prefetch: bool = False,
        records: bool = True,
        shared: SharedCache | None = None,
    ) -> None:
        """Raises InvalidInput for a cache that is too small."""
        check_cache(cache)
        self._cache, self._patience, self._on_event = BlockCache(cache), patience, on_event
        self._prefetch, self._records, self._shared = prefetch, records, shared
        self._lock = threading.Lock()
        self._loaders: dict[str, Loader] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def export(
        self,
        name: str,
        destination: ReadableDestination,
        disk: str,
        record: PointRecord,
        *,
        stays: bool = True,
        block_status: bool = True,
    ) -> Export:
        """A point under a name; it is opened when the export is. stays, block_status: as of an Export"""
        words = f"{destination.url}::{disk}@{record.point} of {record.time:%Y-%m-%d %H:%M:%S}"
        opens = partial(self.opened, destination, disk, record)
        return Export(name, record.virtual_size, words, opens, stays=stays, block_status=block_status)

    @contextmanager
    def opened(self, destination: ReadableDestination, disk: str, record: PointRecord) -> Iterator[Reading]:
        """A point, and all that it needs, for the length of the block. Raises NotFound, as `whole`."""
        whole = destination.whole(
            disk, str(record.point), damaged=destination.traits.names_damage, on_event=self._on_event
        )
        with whole as found:
            if found.content_id != record.content_id:
                raise NotFound(f"point {record.point} is another one by now", subject=f"{destination.url}::{disk}")
            if not isinstance(found, BlobDisk):
                yield FileReading(found)
                return
            with self._lock:
                loader = self._loaders.get(destination.url)
                if loader is None:
                    loader = self._loaders[destination.url] = Loader(self._cache, self._load(found))
                    self._stack.callback(loader.close)
            reading = BlobReading(found, found, loader, patience=self._patience)
            if not (self._prefetch and isinstance(found, RecordsFirstReads)):
                yield reading
                return
            with first_reads(found, reading, records=self._records):
                yield reading

    def _load(self, disk: BlobDisk) -> Load:
        shared = self._shared
        if shared is None or not isinstance(disk, SharesBlobs):
            return disk.load
        return lambda blobs: disk.load_shared(blobs, shared)


def check_cache(size: int) -> None:
    """Raises InvalidInput for a cache that is too small. size: bytes"""
    if size < LEAST_CACHE:
        raise InvalidInput(f"the cache has at least {LEAST_CACHE >> 20} MiB", hint="--cache-size 64M")


class ReadLog:
    """Words for the user, from any thread; the same ones once, and some kinds of it only."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._lock = threading.Lock()
        self._noted: set[str] = set()

    def fault(self, name: str, offset: int, length: int, error: Exception) -> None:
        """A read failed. name: of what was read"""
        self.note(f"{name}: bytes {offset} to {offset + length} could not be read: {error}")
        if isinstance(error, Corrupt):
            self.note(_AFTER_DAMAGE)

    def note(self, words: str) -> None:
        """Something that is worth a line."""
        with self._lock:
            if words in self._noted or len(self._noted) > _MOST_NOTED:
                return
            if len(self._noted) == _MOST_NOTED:
                words = f"{_MOST_NOTED} different notes were made, and no more are"
            self._noted.add(words)
        self._on_event(Notice(words))
