"""What a shipment reads of the indexes: all of them while they are small, else those that its disk needs.

    indexes of up to WHOLE_BYTES              all are read at once
    more: indexes without samples             the newest are read at the first lookup
          indexes with samples                one is read when a sampled id in it is looked up: it has the neighbours
                                              of that id (samples.py)

A blob that is not found is stored again.  That costs space, and nothing else, so `find` may miss a blob that an index
lists.  `find_all` reads all indexes, for callers that need every copy of a blob.

The packs of a large repository are not listed.  Instead, each pack is looked up before something in it is relied on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from snapchain.errors import Corrupt, NotFound, SnapchainError, Unsupported
from snapchain.objects.store import ObjectInfo, ObjectStore
from snapchain.repository import samples
from snapchain.repository.crypto import Keyring
from snapchain.repository.eras import counting
from snapchain.repository.format import is_samples, pack_name
from snapchain.repository.index import BlobIndex, IndexPart, open_index, read_all, retried
from snapchain.repository.listed import ListedIndex
from snapchain.repository.packs import Location
from snapchain.repository.samples import Samples

WHOLE_BYTES = 16 * 1024 * 1024
"""Of index objects, which are read as a whole up to this: some 300,000 blobs, or 75 GiB of guest data."""
LOOSE_BYTES = 32 * 1024 * 1024
"""The most that is read of indexes without samples. After an upgrade there may be more, until the next gc."""
NEIGHBOUR_BLOBS = 4_000_000
"""From indexes that were read for a sampled id: 256 MB. When there are more, all of these are dropped from memory."""


class SparseIndex(ListedIndex):
    """Thread-safe, as a BlobIndex is.

    is_whole: whether it knows every blob that the index objects list
    loose: the index objects without samples, as far as they were read
    sampled: the samples that were read, by the names of their objects
    counting: the index objects that count, by name; newest_era: the highest era; both as of the last reading
    """

    def __init__(self, store: ObjectStore, keys: Keyring, listed: Sequence[ObjectInfo]) -> None:
        """listed: all below index/. Raises NotFound when that has changed meanwhile."""
        super().__init__(store, keys)
        self.counting = {info.name: info for info in open_index(store, keys, self, listed)}
        self.newest_era = self.era
        self.is_whole = sum(info.size for info in self.counting.values()) <= WHOLE_BYTES
        self.loose: list[IndexPart] = []
        self.sampled: dict[str, Samples] = {}
        self._looking = threading.Lock()
        self._is_read = False
        self._neighbours = BlobIndex()
        self._neighbour_blobs = 0
        self._asked: set[str] = set()  # index objects that were read for a sample
        self._there: set[str] = set()  # packs that were looked at
        if self.is_whole:
            self._read(listed)
            self._is_read = True

    def find(self, blob: bytes) -> Location | None:
        """As a BlobIndex does. Unless `is_whole` is set, it may miss a blob that an index lists."""
        if self.is_whole:
            return BlobIndex.find(self, blob)
        self._begin()
        while True:
            found = BlobIndex.find(self, blob) or self._neighbours.find(blob)
            if found is None and self._read_holders([blob]):
                continue
            if found is None or self._is_there(found.pack):
                return found

    def prepare(self, blobs: Iterable[bytes]) -> None:
        """Read the indexes that should have these blobs, neighbours on a disk, before they are looked up."""
        if not self.is_whole:
            self._begin()
            self._read_holders(blobs)

    def find_all(self, blob: bytes) -> list[Location]:
        """All places of the blob, those in packs that are to be avoided or deleted last."""
        if self.is_whole:
            return BlobIndex.find_all(self, blob)
        # The packs were not compared with the indexes before. One that is found missing here is remembered.
        found = super().find_all(blob)
        return sorted(found, key=lambda where: not (self.may_use(where.pack) and self._is_there(where.pack)))

    # --- Reading.

    def _begin(self) -> None:
        if self._is_read:
            return
        with self._looking:
            if not self._is_read:
                retried(lambda: self._read(list(self._store.list("index/"))))
                self._is_read = True

    def _read(self, listed: Sequence[ObjectInfo]) -> None:
        """Read the samples, and the index objects that every shipment reads. Raises NotFound.

        listed: all below index/, now. Objects that other writers have created since this index was opened can be relied
        on as well. A pack that they list was not condemned before then; a collector that has condemned it since waits
        for this session.
        """
        self.newest_era, found = counting(listed)
        self.counting = {info.name: info for info in found}
        self.sampled = {}
        for info in listed:
            if is_samples(info.name):
                with suppress(Corrupt, Unsupported):  # the next gc drops it
                    self.sampled[info.name] = samples.parse(self._keys, info.name, self._store.get(info.name))
        replaced = {name for part in self.sampled.values() for name in part.replaced}
        known = {name for part in self.sampled.values() for name in part.indexes}
        wanted = [info for name, info in self.counting.items() if name in known or name not in replaced]
        if not self.is_whole:
            wanted = list(_newest(info for info in wanted if info.name not in known))
        unreadable: list[SnapchainError] = []
        parts = list(read_all(self._store, self._keys, wanted, unreadable))
        # Nothing below raises NotFound, since a second attempt would take the same parts in twice.
        self.unreadable += unreadable
        for part in parts:
            self.take(part)
        self.loose = [part for part in parts if part.name not in known]

    def _read_holders(self, blobs: Iterable[bytes]) -> bool:
        """Read the index objects that have one of these by their samples. Returns whether any was read now."""
        sampled = [blob for blob in blobs if samples.is_sampled(blob)]
        if not sampled:
            return False
        parts = list(self.sampled.values())
        holders = {name for part in parts for blob in sampled for name in part.holders(blob)}
        fresh = (holders & self.counting.keys()) - self._asked
        if not fresh:
            return False
        with self._looking:
            wanted = [self.counting[name] for name in sorted(fresh - self._asked)]
            if self._neighbour_blobs > NEIGHBOUR_BLOBS:
                self._neighbours, self._neighbour_blobs, self._asked = BlobIndex(), 0, set()
            neighbours = self._neighbours
            neighbours.avoid = self.avoid
            neighbours.condemn(self.condemned)
            for info in wanted:
                with suppress(NotFound):  # others have put it together, or a collector
                    for part in read_all(self._store, self._keys, [info], self.unreadable):
                        self.sizes.update(part.packs)
                        neighbours.load(part.ids, part.rows, list(part.packs))
                        self._neighbour_blobs += len(part.ids)
                self._asked.add(info.name)
        return True

    def _is_there(self, pack: str) -> bool:
        """Whether a pack is there, of the size that the index lists. If not, it is avoided as a damaged one."""
        if pack in self.mine or pack in self._there:
            return True
        if self._store.size(pack_name(pack)) != self.sizes.get(pack):
            self.avoid.add(pack)
            return False
        self._there.add(pack)
        return True


def load(store: ObjectStore, keys: Keyring) -> SparseIndex:
    """What a shipment may rely on. Call it when the shipment has its lease."""
    return retried(lambda: SparseIndex(store, keys, list(store.list("index/"))))


def _newest(loose: Iterable[ObjectInfo]) -> Iterator[ObjectInfo]:
    """The newest ones, up to LOOSE_BYTES."""
    size = 0
    for info in sorted(loose, key=lambda info: info.modified or 0.0, reverse=True):
        size += info.size
        if size > LOOSE_BYTES:
            return
        yield info
