"""What a shipment reads of the indexes: all while they are small, else what its disk and its relatives need.

    indexes of up to WHOLE_BYTES                       read as a whole
    more: those that no sample is of, the newest       read at the first question
          those of which a sample has the id asked for read then, for the neighbours of that id (samples.py)

A blob of which nothing tells is stored again; that costs space, and nothing else.  So `find` may miss what some index
lists.  Who has to find every copy of a blob asks `find_all`, which reads everything.

The packs of a large repository are not listed.  Each pack is looked at before something in it is relied on.
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
"""The most that is read of indexes without a sample. There are more after an upgrade, until a gc."""
NEIGHBOUR_BLOBS = 4_000_000
"""Of indexes that were read for a sample: 256 MB. After more, those read so far are forgotten."""


class SparseIndex(ListedIndex):
    """Thread-safe, as a BlobIndex is.

    is_whole: whether it knows all that the index objects say
    loose: index objects without a sample, as far as they were read
    sampled: the samples that were read, by the names of their objects; counting: index objects, by name
    newest_era: the highest when they were read
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
        """As a BlobIndex does, except that it does not know all where `is_whole` is not set."""
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
        """Read what helps to find these, which lie side by side on a disk, before they are asked for."""
        if not self.is_whole:
            self._begin()
            self._read_holders(blobs)

    def find_all(self, blob: bytes) -> list[Location]:
        """All places of the blob, those in packs that are to be avoided or deleted last."""
        if self.is_whole:
            return BlobIndex.find_all(self, blob)
        # Nobody has compared the packs with the indexes: one that is missing is known to be from here on.
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
        """Read the samples, and the index objects that are read without being asked for. Raises NotFound.

        listed: all below index/, now. Objects that others have written since this index began are as good as the
        others: what they list was there, and was not condemned, or is about to wait for this session.
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
        # From here on nothing is gone: what is called again after that would be taken in twice.
        self.unreadable += unreadable
        for part in parts:
            self.take(part)
        self.loose = [part for part in parts if part.name not in known]

    def _read_holders(self, blobs: Iterable[bytes]) -> bool:
        """Read the index objects that a sample tells of, for one of these; whether there were any."""
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
        """Whether a pack is there and has the size that the index says. One that is not is damaged."""
        if pack in self.mine or pack in self._there:
            return True
        if self._store.size(pack_name(pack)) != self.sizes.get(pack):
            self.avoid.add(pack)
            return False
        self._there.add(pack)
        return True


def load(store: ObjectStore, keys: Keyring) -> SparseIndex:
    """What a shipment that has its lease may rely on."""
    return retried(lambda: SparseIndex(store, keys, list(store.list("index/"))))


def _newest(loose: Iterable[ObjectInfo]) -> Iterator[ObjectInfo]:
    """As many as are read, the newest first."""
    size = 0
    for info in sorted(loose, key=lambda info: info.modified or 0.0, reverse=True):
        size += info.size
        if size > LOOSE_BYTES:
            return
        yield info
