"""Keeps the indexes few, and sampled: who has shipped puts together what many small shipments have written.

    indexes without a sample: LOOSE of them, or LOOSE_BYTES     are read by each shipment; from then on
    the small ones                                              become one or a few, by their packs
    all of them                                                 are sampled, so that nobody has to read them

So a shipment reads as few objects in a repository of ten thousand disks as in one of ten.  Samples are put together as
in a log-structured merge: one takes in those that are at most twice as large.

What is written here is written under a writer's lease and from what its index knows, as what a shipment writes is; so
it counts, and misleads, no more than that.  Packs that are condemned are left out.
"""

from __future__ import annotations

import random
from collections.abc import Container, Iterable
from contextlib import suppress

from snapchain.errors import SnapchainError
from snapchain.objects.store import ObjectStore
from snapchain.repository import index as indexes, samples
from snapchain.repository.crypto import Keyring
from snapchain.repository.index import IndexedPack, IndexPart
from snapchain.repository.leases import count_writers
from snapchain.repository.samples import Ids
from snapchain.repository.sparse import SparseIndex

LOOSE = 64
LOOSE_BYTES = 4 * 1024 * 1024
"""Index objects without a sample, and the bytes of them, from which on they are tidied up."""
SMALL_BYTES = indexes.INDEX_BYTES // 4
"""Index objects below this are put together; for others a sample is enough."""


def tidy(store: ObjectStore, keys: Keyring, index: SparseIndex, *, pack_size: int | None) -> None:
    """Tidy up if it is time to. Many that are at work at once leave it to one of them, more or less.

    Raises the errors of the store; whatever was done by then does no harm.
    """
    loose = list(index.loose)
    if not _is_time(loose) or index.newest_era != index.era or index.condemned.unreadable:
        return
    if random.random() * count_writers(store) > 1:  # noqa: S311 - no secret
        return
    # One that lists a damaged pack stays as it is: the blobs there may have copies to be found, or be read again.
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
    useless = _useless(index)
    taken = _taken_in(index, useless, sum(map(len, lists.values())) // samples.EVERY)
    parts = [index.sampled[name] for name in taken]
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
        _delete(store, made)  # else each shipment would add some, until the disk is full
        raise
    return made


def _delete(store: ObjectStore, names: Iterable[str]) -> None:
    """Delete these, as far as the store lets us."""
    with suppress(SnapchainError):  # who may not delete leaves them to a gc; nobody reads them any more
        for name in names:
            store.delete(name)


def _is_time(loose: list[IndexPart]) -> bool:
    return len(loose) >= LOOSE or sum(map(_bytes, loose)) >= LOOSE_BYTES


def _bytes(part: IndexPart) -> int:
    """As they are in memory: an index compresses little."""
    return part.ids.nbytes + part.rows.nbytes


def _useless(index: SparseIndex) -> set[str]:
    """The objects of samples that tell of nothing but what others tell of, or what does not count any more."""
    useless: set[str] = set()
    told: set[str] = set()
    for name, part in sorted(index.sampled.items(), key=lambda item: (-len(item[1].ids), item[0])):
        tells = {*part.indexes, *part.replaced} & index.counting.keys()
        if tells <= told:
            useless.add(name)
        told |= tells
    return useless


def _taken_in(index: SparseIndex, useless: Container[str], ids: int) -> list[str]:
    """The samples that new ones of so many ids are put together with, the smallest first."""
    taken: list[str] = []
    for name, part in sorted(index.sampled.items(), key=lambda item: len(item[1].ids)):
        if name in useless:
            continue
        if len(part.ids) > 2 * ids:
            break
        taken.append(name)
        ids += len(part.ids)
    return taken
