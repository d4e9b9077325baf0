"""Is everything in order that restoring does not look at: indexes, older catalogues, and packs as wholes?

Shipping relies on it: it names what an index lists and a pack holds, without reading it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import blake3
import numpy as np

from snapchain.errors import Corrupt, NotFound, SnapchainError
from snapchain.model.extents import Int64s
from snapchain.repository import catalogue as catalogues, index as indexes
from snapchain.repository.catalogue import Catalogue
from snapchain.repository.format import pack_name
from snapchain.repository.packs import FIRST_BLOB, TRAILER, Location, read_directory
from snapchain.repository.repository import Repository


def check_indexes(repository: Repository, names: list[str], packs: Mapping[str, int]) -> Iterator[SnapchainError]:
    """What is wrong with these index objects. packs: object name -> bytes, listed after `names` were."""
    store = repository.store
    for name in names:
        try:
            listed = indexes.parse(repository.keys, name, store.get(name))[0]
        except NotFound:
            continue  # collected meanwhile
        except SnapchainError as error:
            yield error
            continue
        for pack, size in listed.items():
            found = packs.get(pack_name(pack))
            if found is None:
                yield Corrupt(f"{name} lists the pack, and it is missing from the store", subject=pack_name(pack))
            elif found != size:
                yield Corrupt(f"the pack has {found} bytes, and {name} says {size}", subject=pack_name(pack))


def check_history(repository: Repository, disk_key: str) -> Iterator[SnapchainError]:
    """What is wrong with the older catalogues of a disk, as far as they are still there."""
    store, keys = repository.store, repository.keys
    before: tuple[Catalogue, str] | None = None
    for name in catalogues.generation_names(store, disk_key):
        try:
            data = store.get(name)
            current = catalogues.parse(keys, name, data)[0]
        except NotFound:
            before = None
            continue
        except SnapchainError as error:
            yield error
            before = None
            continue
        if before and before[0].generation + 1 == current.generation and before[1] != current.previous:
            yield Corrupt("it does not follow the generation that is stored before it", subject=name)
        before = current, blake3.blake3(data).hexdigest()


def check_pack(repository: Repository, pack: str, size: int, read: Int64s) -> Iterator[SnapchainError]:
    """What is wrong with a pack. read: offsets of the blobs in it that somebody has read and found right."""
    try:
        _, ids, rows = read_directory(repository.store, repository.keys, pack, size)
    except NotFound:
        return  # collected meanwhile; what somebody needs of it, its layers miss
    except SnapchainError as error:
        yield error
        return
    offset, stored = rows["offset"].astype(np.int64), rows["stored"].astype(np.int64)
    ends = np.append(FIRST_BLOB, offset + stored)
    if not np.array_equal(ends[:-1], offset) or ends[-1] > size - TRAILER.size:
        yield Corrupt("the pack's directory does not fit the pack", subject=pack_name(pack))
        return
    for at in np.flatnonzero(~np.isin(offset, read)).tolist():
        where = Location(pack, int(offset[at]), int(stored[at]), int(rows["raw"][at]))
        try:
            repository.blobs.read(ids[at].tobytes(), where)
        except SnapchainError as error:
            if repository.store.size(pack_name(pack)) is None:
                return
            yield error
