"""Samples of the indexes: which index has the neighbours of a blob, without reading all of them.

The indexes of 100 million blobs have 3.3 GiB.  Where a disk resembles another one, it does so for long stretches, and
blobs that were stored together are looked up together again.  So every 32nd id, chosen by its last byte, is stored
apart, with the index that lists it.  A shipment that meets such an id reads that index, and finds the neighbours there
(sparse.py).

    u32     indexes     u32     replaced     u32     ids
    indexes  * INDEX_ROW     all of their sampled ids follow below
    replaced * INDEX_ROW     were put together (tidying.py): other indexes list the same
    ids      * u64           upper 40 bits: the first 5 bytes of a blob id; lower 24: place in the table of indexes

Samples only decide how much is stored twice.  The index itself says where a blob is.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snapchain.errors import Corrupt
from snapchain.objects.store import ObjectStore
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import seal, unseal
from snapchain.repository.format import PACK_ID_BYTES, fresh_id, index_era, index_name, samples_name
from snapchain.repository.index import IndexedPack

KIND = b"S"
EVERY = 32
"""One id in so many is sampled. A disk is recognised after 8 MiB on average; 100 million blobs have 25 MB of them."""
_PLACE_BITS = 24
_PREFIX_BYTES = 5
_MOST_IDS = 4_000_000
"""In one object: 32 MiB, of the 64 MiB that readers accept."""
_COUNTS = struct.Struct("<III")
_INDEX_ROW = np.dtype([("era", "<u8"), ("name", "u1", (PACK_ID_BYTES,))])
_ID = np.dtype("<u8")

Ids = npt.NDArray[np.uint8]
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """The content of one object.

    indexes: names of index objects, of each of which all sampled ids are here
    replaced: names of index objects that need not be read
    ids: uint64[n], ascending: prefix of an id and place in `indexes`
    """

    indexes: tuple[str, ...]
    replaced: tuple[str, ...]
    ids: Keys

    def holders(self, blob: bytes) -> Iterator[str]:
        """Names of the indexes that list this id, or another one with the same first 5 bytes."""
        prefix = int.from_bytes(blob[:_PREFIX_BYTES], "big")
        first, stop = np.searchsorted(self.ids, np.array([prefix, prefix + 1], np.uint64) << np.uint64(_PLACE_BITS))
        for key in self.ids[first:stop].tolist():
            yield self.indexes[key & ((1 << _PLACE_BITS) - 1)]


def is_sampled(blob: bytes) -> bool:
    """Whether an id is one of those that are sampled."""
    return blob[-1] % EVERY == 0


def of(lists: Mapping[str, Ids], replaced: Iterable[str] = ()) -> Samples:
    """The samples of these indexes. lists: name -> uint8[n, 32], the ids that it has"""
    found = [_prefixes(ids) | np.uint64(place) for place, ids in enumerate(lists.values())]
    return Samples(tuple(lists), tuple(replaced), np.sort(np.concatenate([np.empty(0, np.uint64), *found])))


def ids_of(packs: Sequence[IndexedPack]) -> Ids:
    """uint8[n, 32]: the ids of the blobs in these packs."""
    return np.concatenate([pack.ids for pack in packs])


def together(parts: Sequence[Samples], counting: Collection[str]) -> list[Samples]:
    """All of these in as few as possible, without the indexes that are not in `counting`."""
    names: dict[str, int] = {}
    replaced: dict[str, None] = {}
    found = [np.empty(0, np.uint64)]
    for part in parts:
        places = np.full(len(part.indexes), -1, np.int64)
        for place, name in enumerate(part.indexes):
            if name in counting and name not in names:
                places[place] = names.setdefault(name, len(names))
        moved = places[(part.ids & np.uint64((1 << _PLACE_BITS) - 1)).astype(np.int64)]
        stays = moved >= 0
        prefixes = part.ids[stays] >> np.uint64(_PLACE_BITS) << np.uint64(_PLACE_BITS)
        found.append(prefixes | moved[stays].astype(np.uint64))
        replaced.update((name, None) for name in part.replaced if name in counting)
    whole = Samples(tuple(names), tuple(name for name in replaced if name not in names), np.sort(np.concatenate(found)))
    return [whole] if len(whole.ids) <= _MOST_IDS else list(_halves(whole))


def write(store: ObjectStore, keys: Keyring, samples: Samples) -> str:
    """Store them; the name of the object."""
    name = samples_name(fresh_id())
    counts = _COUNTS.pack(len(samples.indexes), len(samples.replaced), len(samples.ids))
    tables = (_table(samples.indexes), _table(samples.replaced), samples.ids.astype(_ID).tobytes())
    store.put(name, seal(keys, KIND, name, b"".join((counts, *tables))))
    return name


def parse(keys: Keyring, name: str, data: bytes) -> Samples:
    """The samples in an object. Raises Corrupt, or Unsupported for a newer format."""
    body = unseal(keys, KIND, name, data)
    if len(body) < _COUNTS.size:
        raise Corrupt("the samples are too short", subject=name)
    indexes, replaced, count = _COUNTS.unpack_from(body)
    at_replaced = _COUNTS.size + indexes * _INDEX_ROW.itemsize
    at_ids = at_replaced + replaced * _INDEX_ROW.itemsize
    if len(body) != at_ids + count * _ID.itemsize:
        raise Corrupt("the samples do not have the length that follows from their counts", subject=name)
    ids = np.frombuffer(body, _ID, count, at_ids).astype(np.uint64)
    places = ids & np.uint64((1 << _PLACE_BITS) - 1)
    if count and (int(places.max()) >= indexes or bool((ids[1:] < ids[:-1]).any())):
        raise Corrupt("the samples name an index that they do not list, or are not in order", subject=name)
    return Samples(_names(body, indexes, _COUNTS.size), _names(body, replaced, at_replaced), ids)


def _prefixes(ids: Ids) -> Keys:
    """uint64[n]: the prefixes of the sampled ids, as upper 40 bits."""
    chosen = ids[ids[:, -1] % EVERY == 0][:, :_PREFIX_BYTES]
    wide = np.zeros((len(chosen), 8), np.uint8)
    wide[:, :_PREFIX_BYTES] = chosen
    return wide.view(">u8").ravel().astype(np.uint64)


def _halves(samples: Samples) -> Iterator[Samples]:
    """Split by the order of the indexes, so that neighbours stay together, until each part is small enough."""
    if len(samples.ids) <= _MOST_IDS or len(samples.indexes) < 2:
        yield samples
        return
    middle = len(samples.indexes) // 2
    places = samples.ids & np.uint64((1 << _PLACE_BITS) - 1)
    low = places < middle
    yield from _halves(Samples(samples.indexes[:middle], samples.replaced, samples.ids[low]))
    yield from _halves(Samples(samples.indexes[middle:], (), samples.ids[~low] - np.uint64(middle)))


def _table(names: Sequence[str]) -> bytes:
    rows = np.zeros(len(names), _INDEX_ROW)
    for row, name in zip(rows, names, strict=True):
        row["era"] = index_era(name) or 0
        row["name"] = np.frombuffer(bytes.fromhex(name.rpartition("-")[2]), np.uint8)
    return rows.tobytes()


def _names(body: bytes, count: int, at: int) -> tuple[str, ...]:
    rows = np.frombuffer(body, _INDEX_ROW, count, at)
    return tuple(index_name(int(row["era"]), bytes(row["name"]).hex()) for row in rows)
