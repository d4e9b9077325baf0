"""Packs that are in the store and that no index lists.

A shipment lists its packs now and then (packer.py), and one that is killed leaves some that it had not listed.  A
collector leaves packs out of its new index that are to go, and that stay for now.  Each pack has a directory of its
own, so what they hold can be told all the same:

- the next shipment uses what a killed one had sent, and lists it (`adoptable`), unless the indexes are so large that it
  does not know all that they list (sparse.py);
- who looks for a copy of a damaged blob looks here, too (`take_in`).

A shipment must not rely on what a collector is about to delete.  One that works beside writers condemned it before, and
whoever finds a pack not condemned after it has its lease is awaited (condemned.py).  One that works alone, as programs
before this did, says nothing of the kind; but it had listed the packs before it began its era.  So only packs that are
younger than the beginning of the newest era are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from snapchain.errors import Corrupt, NotFound
from snapchain.objects.store import ObjectInfo, ObjectStore, settle
from snapchain.repository.crypto import Keyring
from snapchain.repository.format import pack_name
from snapchain.repository.index import BlobIndex, IndexedPack
from snapchain.repository.packs import read_directory

MOST = 64
"""Packs. What a killed shipment leaves is less. Of more the oldest are read: the youngest are of those who are at work,
and who will list them themselves."""
MOST_LOOKED_AT = 10_000
"""Packs whose directories are read for a copy of what is damaged; of more the youngest."""


def adoptable(store: ObjectStore, keys: Keyring, index: BlobIndex) -> Iterator[IndexedPack]:
    """Packs that `index` does not list and that new records may rely on, made durable."""
    if index.condemned.unreadable:
        return  # nobody knows whether they are to go
    usable = {pack: info for pack, info in index.unlisted.items() if index.may_use(pack) and _is_newer(info, index)}
    for found in _directories(store, keys, sorted(usable.items(), key=_by_age)[:MOST]):
        settle(store, pack_name(found.pack))
        yield found


def take_in(store: ObjectStore, keys: Keyring, index: BlobIndex) -> None:
    """Let `index` find blobs in `index.unlisted`, too: for who looks for copies, and does not store by it."""
    for found in _directories(store, keys, sorted(index.unlisted.items(), key=_by_age)[-MOST_LOOKED_AT:]):
        index.load(found.ids, found.rows, [found.pack])


def _directories(store: ObjectStore, keys: Keyring, packs: Iterable[tuple[str, ObjectInfo]]) -> Iterator[IndexedPack]:
    """What these packs hold. One that is damaged or gone is passed over."""
    for pack, info in packs:
        try:
            _, ids, rows = read_directory(store, keys, pack, info.size)
        except (Corrupt, NotFound):
            continue
        yield IndexedPack(pack, info.size, ids, rows)


def _by_age(each: tuple[str, ObjectInfo]) -> tuple[float, str]:
    return each[1].modified or 0.0, each[0]


def _is_newer(info: ObjectInfo, index: BlobIndex) -> bool:
    began = index.era_began
    return began is None or (info.modified is not None and info.modified > began)
