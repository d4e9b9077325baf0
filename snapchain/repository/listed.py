"""Which packs the indexes list; and all their blobs, once one is looked up.

A collector and a repair need the sizes of all packs.  They look up blobs only where there is damage, so
they seldom need the 5 GiB that 100 million blobs take in memory.
"""

from __future__ import annotations

import threading

from snapchain.objects.store import ObjectStore
from snapchain.repository import index as indexes
from snapchain.repository.crypto import Keyring
from snapchain.repository.index import BlobIndex, open_index, read_all, retried
from snapchain.repository.packs import Location


class ListedIndex(BlobIndex):
    """A BlobIndex that reads what the indexes list when the first blob is looked up. Thread-safe."""

    def __init__(self, store: ObjectStore, keys: Keyring) -> None:
        super().__init__()
        self._store, self._keys = store, keys
        self._reading = threading.Lock()
        self._all: BlobIndex | None = None

    def find(self, blob: bytes) -> Location | None:
        """See BlobIndex."""
        return next((where for where in self.find_all(blob) if self.may_use(where.pack)), None)

    def find_all(self, blob: bytes) -> list[Location]:
        """See BlobIndex."""
        with self._reading:
            if self._all is None:
                self._all = indexes.load(self._store, self._keys)
                for pack, size in self._all.sizes.items():
                    self.sizes.setdefault(pack, size)
        found = super().find_all(blob)
        found += [where for where in self._all.find_all(blob) if where not in found]
        return sorted(found, key=lambda where: not self.may_use(where.pack))


def load(store: ObjectStore, keys: Keyring) -> ListedIndex:
    """The packs that all indexes list. An index object that cannot be read is left out: see `unreadable`."""
    # Each index is read once, however often others put some together meanwhile.
    packs_of: dict[str, dict[str, int]] = {}

    def attempt() -> ListedIndex:
        index = ListedIndex(store, keys)
        found = open_index(store, keys, index, list(store.list("index/")))
        for part in read_all(store, keys, [info for info in found if info.name not in packs_of], index.unreadable):
            packs_of[part.name] = part.packs
        for info in found:
            index.sizes.update(packs_of.get(info.name, {}))
        return index

    return retried(attempt)
