"""Reads blobs through a cache that processes of this host share: as they are stored, so encrypted as in the store.

in the cache              ->  decrypted and proven, as what comes from the store is
fetched by another one    ->  waited for, for some seconds
else                      ->  fetched, and kept there
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from snapchain.errors import Corrupt
from snapchain.host.shared_cache import SharedCache
from snapchain.repository.blobs import BlobReader
from snapchain.repository.packs import Location


def read_shared(
    blobs: BlobReader, cache: SharedCache, wanted: Sequence[tuple[bytes, Location]]
) -> Iterator[tuple[int, bytes]]:
    """(place in `wanted`, plain bytes) of each blob, in any order. Raises as `BlobReader.read_all`."""
    fetching = blobs.heard_by(lambda where, text: cache.keep(_name(where), text))

    def kept(places: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        for place in places:
            blob, where = wanted[place]
            text = cache.take(_name(where), size=where.stored)
            if text is None:
                continue
            try:
                yield place, blobs.opened(blob, where, text)
            except Corrupt:
                cache.drop(_name(where))

    def fetched(places: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        for number, plain in fetching.read_all([wanted[place] for place in places]):
            yield places[number], plain

    left = dict.fromkeys(range(len(wanted)))

    def without(found: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        for place, plain in found:
            del left[place]
            yield place, plain

    yield from without(kept(list(left)))
    if not left:
        return
    with cache.claimed([_name(wanted[place][1]) for place in left]) as names:
        ours = [place for place in left if _name(wanted[place][1]) in names]
        yield from without(kept(ours))  # another process was faster
        yield from without(fetched([place for place in ours if place in left]))
    for place in left:
        cache.wait(_name(wanted[place][1]))
    yield from without(kept(list(left)))
    yield from without(fetched(list(left)))


def _name(where: Location) -> str:
    return f"{where.pack}-{where.offset:08x}"
