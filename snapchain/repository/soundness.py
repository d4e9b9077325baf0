"""Is everything in order that restoring does not look at: indexes and older catalogues? And which blobs are lost?

Shipping relies on it: it names what an index lists and a pack holds, without reading it again.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping

import blake3
import numpy as np

from snapchain.errors import Corrupt, NotFound, SnapchainError
from snapchain.repository import catalogue as catalogues, damage, index as indexes
from snapchain.repository.catalogue import Catalogue
from snapchain.repository.format import pack_name
from snapchain.repository.index import BlobIndex
from snapchain.repository.layers import StoredLayer, page_location
from snapchain.repository.packs import Location
from snapchain.repository.pages import Page
from snapchain.repository.repository import Repository

_MOST_TOLD = 100
"""Packs of one index: an index of nothing but lies has a million."""


def find_readable(
    blob: bytes,
    where: Location,
    *,
    is_sound: Callable[[Location], bool],
    copies: Callable[[bytes], Iterable[Location]],
    read: Callable[[bytes, Location], object],
) -> Location:
    """Where the bytes of a blob are: at `where`, or in a copy. The one place that decides whether a blob is lost.

    is_sound: whether the pack of a place is there, reaches that far, and is not known to be damaged
    copies: the other places of the blob that an index lists
    read: reads the blob at a place, when nothing else shows that it is whole
    Raises Corrupt, as `read` does, when the blob is lost.
    """
    if is_sound(where):
        return where
    others = list(copies(blob))
    for copy in others:
        if is_sound(copy):
            return copy
    first: Corrupt | None = None
    for place in (where, *others):  # a pack that was missing or unreadable for a while is in doubt, and may be whole
        try:
            read(blob, place)
        except Corrupt as error:
            first = first or error
        else:
            return place
    assert first is not None
    raise first


def check_present(where: Location, size: int | None) -> None:
    """Raises Corrupt unless a pack of `size` bytes (None: there is none) reaches as far as a place in it."""
    name, end = pack_name(where.pack), where.offset + where.stored
    if size is None:
        raise Corrupt("the pack is missing from the store", subject=name)
    if size < end:
        raise Corrupt(f"the pack has {size} bytes, and a record names byte {end}", subject=name)


def check_there(
    repository: Repository, blob: bytes, where: Location, sizes: Mapping[str, int], doubted: Container[str]
) -> None:
    """Raises Corrupt when a blob is lost, as far as can be told without reading undoubted packs.

    sizes: object name -> bytes, of the packs that were there; doubted: packs in which damage was found before
    """

    def is_sound(at: Location) -> bool:
        name = pack_name(at.pack)
        size = sizes.get(name)
        if size is None and at is not where:
            size = repository.store.size(name)  # written since the packs were listed
        reaches = size is not None and size >= at.offset + at.stored
        if not reaches and at is where:
            repository.blobs.damaged.add(at.pack)
        return reaches and at.pack not in doubted

    def read(blob: bytes, at: Location) -> None:
        check_present(at, sizes.get(pack_name(at.pack)))
        repository.blobs.read(blob, at)

    find_readable(blob, where, is_sound=is_sound, copies=lambda blob: repository.blobs.copies(blob, where), read=read)


def is_whole(layer: StoredLayer, index: BlobIndex) -> bool:
    """Whether each blob that a layer names lies in a sound pack, or has a copy in one. Reads no data."""

    def read(_: bytes, at: Location) -> None:
        raise Corrupt("the pack is damaged", subject=pack_name(at.pack))

    return not any(True for _ in _lost(layer, index, read))


def lost(repository: Repository, layer: StoredLayer, index: BlobIndex) -> Iterator[SnapchainError]:
    """An error for each blob of a layer that is lost, of those in packs that are not sound."""
    return _lost(layer, index, repository.blobs.read)


def _lost(layer: StoredLayer, index: BlobIndex, read: Callable[[bytes, Location], object]) -> Iterator[SnapchainError]:
    try:
        doubted = [each for each in named(layer) if each[1].pack in index.avoid]
    except Corrupt as error:  # a page
        yield error
        return

    def is_sound(at: Location) -> bool:
        return at.pack not in index.avoid

    for blob, where in doubted:
        try:
            find_readable(blob, where, is_sound=is_sound, copies=index.find_all, read=read)
        except Corrupt as error:
            yield error


def damaged_points(repository: Repository, catalogue: Catalogue, index: BlobIndex) -> tuple[int, ...]:
    """The points of a disk of which bytes are lost, as far as `index` knows which packs to look into."""

    def is_damaged(layer: str) -> bool:
        try:
            return any(True for _ in lost(repository, repository.layer(layer), index))
        except Corrupt:  # its record
            return True

    lengths = catalogue.lengths()
    damaged: dict[str | None, bool] = {None: False}  # whether something of the chain up to a layer is
    found: list[int] = []
    for point in catalogue.points:
        if point.layer not in lengths:
            found.append(point.point)
            continue
        way: list[str] = []
        at: str | None = point.layer
        while at not in damaged:
            assert at is not None
            way.append(at)
            at = catalogue.parents[at]
        is_bad = damaged[at]
        for layer in reversed(way):
            is_bad = damaged[layer] = is_bad or is_damaged(layer)
        if is_bad:
            found.append(point.point)
    return tuple(found)


def named(layer: StoredLayer) -> Iterator[tuple[bytes, Location]]:
    """Each blob that a layer names, once a page: its pages, and those of its runs. Raises Corrupt for a lost page."""
    for row in layer.table:
        yield bytes(row["id"]), page_location(row)
        for page in layer.pages(int(row["first"]), min(int(row["stop"]), layer.size)):
            yield from named_by_page(page)


def named_by_page(page: Page) -> Iterator[tuple[bytes, Location]]:
    """Each blob of a page's runs, once."""
    data = page.runs[page.runs["stored"] != 0]
    _, first = np.unique(np.stack([data["pack"], data["offset"]]), axis=1, return_index=True)
    for row in data[first]:
        where = page.packs[int(row["pack"])], int(row["offset"]), int(row["stored"]), int(row["raw"])
        yield bytes(row["id"]), Location(*where)


def check_indexes(repository: Repository, names: list[str], packs: Mapping[str, int]) -> Iterator[SnapchainError]:
    """What is wrong with these index objects, and with packs that they list, unless that is known and recorded.

    packs: object name -> bytes, listed after `names` were.
    """
    store = repository.store
    known = damage.recorded(store, repository.keys)
    for name in names:
        try:
            listed = indexes.parse(repository.keys, name, store.get(name))[0]
        except NotFound:
            continue  # collected meanwhile
        except SnapchainError as error:
            yield error
            continue
        told = untold = 0
        for pack, size in listed.items():
            found = packs.get(pack_name(pack))
            # What a layer misses of it is told already, and told each time.
            if found == size or pack in known or pack in repository.blobs.damaged:
                continue
            repository.blobs.damaged.add(pack)
            if told >= _MOST_TOLD:
                untold += 1
                continue
            told += 1
            if found is None:
                yield Corrupt(f"{name} lists the pack, and it is missing from the store", subject=pack_name(pack))
            else:
                yield Corrupt(f"the pack has {found} bytes, and {name} says {size}", subject=pack_name(pack))
        if untold:
            yield Corrupt(f"it lists {untold} further packs that are missing or have another size", subject=name)


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
