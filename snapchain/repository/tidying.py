"""Keeps the indexes few, and sampled: a shipment that ends puts together what many small shipments have written.

    indexes without samples              each shipment reads them. When there are LOOSE of them, or LOOSE_BYTES:
    the small ones among them            are put together into one or a few
    all of them                          are sampled, so that no shipment has to read them without need

So a shipment reads as few objects in a repository of ten thousand disks as in one of ten.  Samples are put together as
in a log-structured merge: new ones take in those that are at most twice as large.

A writer does this under its lease, from what its own index lists.  So the new index can be relied on as much as any
that the writer stores for its own packs.  Condemned packs are left out.
"""

from __future__ import annotations

import random
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress

from snapchain.errors import SnapchainError
from snapchain.objects.store import ObjectStore
from snapchain.repository import index as indexes, samples
from snapchain.repository.crypto import Keyring
from snapchain.repository.format import index_era
from snapchain.repository.index import IndexedPack, IndexPart
from snapchain.repository.leases import count_writers
from snapchain.repository.samples import Ids, Samples
from snapchain.repository.sparse import SparseIndex

LOOSE = 64
LOOSE_BYTES = 4 * 1024 * 1024
"""So many index objects without samples, or so many bytes of them, are tidied up."""
SMALL_BYTES = indexes.INDEX_BYTES // 4
"""Index objects below this are put together; larger ones are only sampled."""


def tidy(store: ObjectStore, keys: Keyring, index: SparseIndex, *, pack_size: int | None) -> None:
    """Tidy up if there is enough to do. Of n writers at work each does it with a chance of 1/n.

    Raises the errors of the store. Whatever was done until then does no harm.
    """
    loose = list(index.loose)
    if not _is_time(loose) or index.newest_era != index.era or index.condemned.unreadable:
        return
    if random.random() * count_writers(store) > 1:  # noqa: S311 - no secret
        return
    # An index that lists a damaged pack stays as it is: a copy of a blob may be found through it.
    small = [part for part in loose if _bytes(part) < SMALL_BYTES and not part.packs.keys() & index.avoid]
    packs: dict[str, IndexedPack] = {}
    for part in small if len(small) > 1 else ():
        packs.update((each.pack, each) for each in part.by_pack() if index.may_use(each.pack))
    lists: dict[str, Ids] = {part.name: part.ids for part in loose}
    replaced = [part.name for part in small] if packs else []
    for name in replaced:
        del lists[name]
    lists |= _written(store, keys, packs.values(), era=index.era, pack_size=pack_size)
    _delete(store, replaced)
    # Where a listing was made in pieces, there may be samples of indexes that did not exist yet: those stay.
    known = {name: part for name, part in index.sampled.items() if not _is_of_later_era(part, index.era)}
    useless = _useless(known, index.counting)
    taken = _taken_in(known, useless, sum(map(len, lists.values())) // samples.EVERY)
    parts = [known[name] for name in taken]
    for whole in samples.together([samples.of(lists, replaced), *parts], {*index.counting, *lists}):
        samples.write(store, keys, whole)
    _delete(store, [*useless, *taken])


def _written(
    store: ObjectStore, keys: Keyring, packs: Iterable[IndexedPack], *, era: int, pack_size: int | None
) -> dict[str, Ids]:
    """Indexes of these packs, by name: the ids in each. All of them, or none."""
    made: dict[str, Ids] = {}
    try:
        for group in indexes.split(packs, pack_size):
            made[indexes.write(store, keys, group, era=era)] = samples.ids_of(group)
    except SnapchainError:
        _delete(store, made)  # else each further shipment would add some, until the disk is full
        raise
    return made


def _delete(store: ObjectStore, names: Iterable[str]) -> None:
    """Delete these, up to the first one that the store refuses to delete."""
    with suppress(SnapchainError):  # then they are left to a gc; nobody reads them any more
        for name in names:
            store.delete(name)


def _is_time(loose: list[IndexPart]) -> bool:
    return len(loose) >= LOOSE or sum(map(_bytes, loose)) >= LOOSE_BYTES


def _bytes(part: IndexPart) -> int:
    """As they are in memory: an index compresses little."""
    return part.ids.nbytes + part.rows.nbytes


def _is_of_later_era(part: Samples, era: int) -> bool:
    return any((index_era(name) or 0) > era for name in part.indexes)


def _useless(sampled: Mapping[str, Samples], counting: Container[str]) -> set[str]:
    """Names of the objects of samples that are not needed: others list all of their indexes that still count."""
    useless: set[str] = set()
    covered: set[str] = set()
    for name, part in sorted(sampled.items(), key=lambda item: (-len(item[1].ids), item[0])):
        covers = {each for each in (*part.indexes, *part.replaced) if each in counting}
        if covers <= covered:
            useless.add(name)
        covered |= covers
    return useless


def _taken_in(sampled: Mapping[str, Samples], useless: Container[str], ids: int) -> list[str]:
    """The samples to put together with new ones, the smallest first. ids: of the new ones."""
    taken: list[str] = []
    for name, part in sorted(sampled.items(), key=lambda item: len(item[1].ids)):
        if name in useless:
            continue
        if len(part.ids) > 2 * ids:
            break
        taken.append(name)
        ids += len(part.ids)
    return taken
