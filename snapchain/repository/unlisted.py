"""Packs that are in the store and that no index lists: what a shipment had sent when it was killed.

A shipment lists its packs now and then (packer.py).  What it has sent since then, the next one would send again.  But
each pack has a directory of its own, so the next one reads those, and lists the packs.

That is safe beside a collector: a pack that is to go was condemned before, and whoever finds it not condemned after it
has its lease is awaited (condemned.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from snapchain.errors import Corrupt, NotFound
from snapchain.objects.store import settle
from snapchain.repository.format import pack_name
from snapchain.repository.index import BlobIndex, IndexedPack
from snapchain.repository.packs import read_directory
from snapchain.repository.repository import Repository

MOST = 64
"""Packs. What a killed shipment leaves is less. Of more the oldest are read: the youngest are of those who are at work,
and who will list them themselves."""


def unlisted(repository: Repository, index: BlobIndex) -> Iterator[IndexedPack]:
    """The blobs of packs that `index` does not list, made durable. One that is damaged or gone is passed over."""
    if index.condemned.unreadable:
        return  # nobody knows whether they are to go
    usable = {pack: info for pack, info in index.unlisted.items() if index.may_use(pack)}
    for pack, info in sorted(usable.items(), key=lambda each: (each[1].modified or 0.0, each[0]))[:MOST]:
        try:
            _, ids, rows = read_directory(repository.store, repository.keys, pack, info.size)
            settle(repository.store, pack_name(pack))
        except (Corrupt, NotFound):
            continue
        yield IndexedPack(pack, info.size, ids, rows)
