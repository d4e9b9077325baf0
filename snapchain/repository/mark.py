"""The mark phase of gc: which objects are in use, and how much of each pack.

    the newest catalogue of each disk -> its layers -> their pages -> blobs, by place in packs

and so are the layers that somebody reads right now, whatever catalogue they are of.  What is done about the rest:
sweep.py.

Others publish meanwhile, and may move what one disk names to another.  So each generation that was the newest of its
disk at any time from the beginning of the look to its end counts (`look_again`): whatever was named all the time is
seen, in whatever order the disks are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from snapchain.errors import Conflict, Corrupt, NotFound, SnapchainError
from snapchain.model.extents import Int64s
from snapchain.objects.exclusive import CLAIM_LIFE, is_claim
from snapchain.objects.store import ObjectInfo, ObjectStore
from snapchain.repository import catalogue as catalogues, damage
from snapchain.repository.blobs import BlobReader
from snapchain.repository.catalogue import Catalogue
from snapchain.repository.damage import list_packs
from snapchain.repository.format import is_damage, is_id, layer_name
from snapchain.repository.index import BlobIndex
from snapchain.repository.known import SeenGenerations
from snapchain.repository.layers import StoredLayer, page_location
from snapchain.repository.packs import Location
from snapchain.repository.repository import Repository
from snapchain.repository.soundness import check_present, find_readable, named_by_page
from snapchain.repository.unlisted import take_in

MOST_TOLD = 10_000
"""Errors that are kept of what is lost: each takes a hundred times the memory of the stored name that it is about."""
KEPT_GENERATIONS = 30
"""Of each disk, the newest: docs/decisions/0015-what-gc-may-delete.md."""


@dataclass(frozen=True, slots=True, eq=False)
class Usage:
    """One pack.

    size: bytes of the object; offsets, stored: int64[n], its blobs in use, ascending, each once
    is_read: whether a layer that somebody reads names it: then it stays where it is
    modified: by the store's clock, if it tells
    """

    pack: str
    size: int
    offsets: Int64s
    stored: Int64s
    is_read: bool
    modified: float | None = None

    @property
    def used_bytes(self) -> int:
        """Bytes of blobs that some record names."""
        return int(self.stored.sum())


@dataclass(slots=True)
class Marked:
    """What a mark phase found.

    newest: the newest catalogue of each disk and the hash of its object
    looked: folder of a disk -> the highest generation that was taken into account
    alive: layers in use
    dead_generations, dead_claims: objects nobody needs, name -> bytes; dead_layers: layers nobody needs, name -> object
    usage: every pack in the store, used or not
    index: of all blobs, with the packs that are missing or damaged
    replaced: blobs in such packs that have a copy: (pack, offset) -> the copy
    rescued: blobs in such packs that have none, and are whole: (pack, offset) -> id and place
    lost: what is gone, by layer; empty past the first MOST_TOLD errors of all
    unread: layers of which the record or a page is lost, so that nobody knows which packs
    they need: no pack may go
    pages: which blobs in use are pages: (pack, offset)
    movable: of replaced and rescued, those that a layer names which can be written anew
    suspect: packs that are missing or damaged, and named by a record
    stale: records of damage that name no such pack, name -> bytes
    """

    newest: list[tuple[Catalogue, str]] = field(default_factory=list)
    looked: dict[str, int] = field(default_factory=dict)
    alive: set[str] = field(default_factory=set)
    dead_generations: dict[str, int] = field(default_factory=dict)
    dead_claims: dict[str, int] = field(default_factory=dict)
    dead_layers: dict[str, ObjectInfo] = field(default_factory=dict)
    usage: list[Usage] = field(default_factory=list)
    index: BlobIndex = field(default_factory=BlobIndex)
    replaced: dict[tuple[str, int], Location] = field(default_factory=dict)
    rescued: dict[tuple[str, int], tuple[bytes, Location]] = field(default_factory=dict)
    lost: dict[str, list[SnapchainError]] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    pages: set[tuple[str, int]] = field(default_factory=set)
    movable: set[tuple[str, int]] = field(default_factory=set)
    suspect: frozenset[str] = frozenset()
    stale: dict[str, int] = field(default_factory=dict)
    _told: int = 0

    def lose(self, layer: str, error: SnapchainError) -> None:
        """Note that something of a layer is gone."""
        told = self.lost.setdefault(layer, [])
        if self._told < MOST_TOLD:
            self._told += 1
            told.append(error.detached())

    @property
    def catalogues(self) -> list[Catalogue]:
        """The newest of each disk."""
        return [catalogue for catalogue, _ in self.newest]


def mark(repository: Repository, spared: Collection[str] = ()) -> Marked:
    """Find what is in use. spared: layers that somebody reads.

    Works around packs and layers that are missing or damaged. Raises Corrupt, and so collects nothing, when the
    catalogue of a disk is unsound.
    """
    while True:
        index = repository.index()
        index.avoid |= repository.blobs.damaged
        known = len(repository.blobs.damaged)
        found = _marked(repository, spared, index)
        if len(repository.blobs.damaged) == known:
            return found


def _marked(repository: Repository, spared: Collection[str], index: BlobIndex) -> Marked:
    """One pass. It may find damage in a page that its beginning did not take into account."""
    store = repository.store
    found = Marked(index=index)
    floors = {} if repository.memory is None else repository.memory.floors()
    generations = _generations(store)
    _check_not_older(repository.memory, floors, generations)
    for history in generations.values():
        # The last run has added one itself: without this margin each run would delete one and add one, for ever.
        if len(history) > KEPT_GENERATIONS + 1:
            found.dead_generations.update((info.name, info.size) for info in history[:-KEPT_GENERATIONS])
        name = history[-1].name
        found.newest.append(_parsed(repository, name))
        found.looked[name.split("/")[1]] = _number(name)
    found.dead_claims.update((info.name, info.size) for info in _dead_claims(store))
    found.alive = alive = {layer for catalogue in found.catalogues for layer in catalogue.parents}
    read = set()
    for info in store.list("layers/"):
        layer = info.name.rpartition("/")[2]
        if layer in spared:
            read.add(layer)  # one that is gone was gone before its reader had its lease
        elif layer not in alive and is_id(layer) and info.name == layer_name(layer):
            found.dead_layers[info.name] = info
    listed = list_packs(store)
    sizes = {pack: info.size for pack, info in listed.items()}
    places = _Places(index.avoid, sizes)
    for layer in sorted(alive | read):
        try:
            places.add(repository.layer(layer), is_read=layer in read)
        except Corrupt as error:
            if layer in alive:
                found.lose(layer, error)
                found.unread.add(layer)
    found.pages = places.pages
    repository.blobs.damaged |= places.short
    if places.doubted:
        index.unlisted = {pack: info for pack, info in listed.items() if pack not in index.sizes}
        take_in(store, repository.keys, index)
    _look_for_copies(repository, found, places, sizes)
    used = places.by_pack()
    nothing = np.empty(0, np.int64)
    for pack, size in sizes.items():
        offsets, stored = used.pop(pack, (nothing, nothing))
        changed = listed[pack].modified
        found.usage.append(Usage(pack, size, offsets, stored, is_read=pack in places.read, modified=changed))
    for key in found.replaced.keys() | found.rescued.keys():
        if places.doubted[key][2] & alive - found.unread:
            found.movable.add(key)
    found.suspect = frozenset(pack for pack, _ in places.doubted)
    names = {info.name: info.size for info in store.list("index/") if is_damage(info.name)}
    for name, packs in damage.read(store, repository.keys, names).items():
        if not packs & found.suspect:
            found.stale[name] = names[name]
    return found


def look_again(repository: Repository, found: Marked, spared: Collection[str]) -> frozenset[str]:
    """The packs that others need by now, or did since the mark; `found` knows their layers as alive afterwards.

    spared: layers that somebody reads by now. Raises Conflict where that cannot be told.
    """
    layers = set(spared)
    for key, history in _generations(repository.store).items():
        for info in history:
            if _number(info.name) > found.looked.get(key, 0):
                layers.update(_parsed(repository, info.name)[0].parents)
        found.looked[key] = _number(history[-1].name)
    fresh = layers - found.alive
    found.alive |= layers
    # One that a reader names and that is gone was gone before the reader had its lease.
    there = {layer for layer in fresh if layer not in spared or repository.store.size(layer_name(layer)) is not None}

    def lose(layer: str, error: Corrupt) -> None:
        found.lose(layer, error)
        found.unread.add(layer)

    return named_packs(repository, there, lose)


def named_packs(
    repository: Repository, layers: Collection[str], lose: Callable[[str, Corrupt], None] = lambda _layer, _error: None
) -> frozenset[str]:
    """The packs that these layers name. lose: told of a layer of which the record or a page is lost."""
    places = _Places(frozenset(), None)
    for layer in sorted(layers):
        try:
            places.add(repository.layer(layer), is_read=False)
        except Corrupt as error:
            lose(layer, error)
    return frozenset(places.by_pack())


def _generations(store: ObjectStore) -> dict[str, list[ObjectInfo]]:
    """Folder of a disk -> its generations, ascending."""
    found: dict[str, list[ObjectInfo]] = {}
    for info in store.list("disks/"):
        if catalogues.is_generation(info.name):
            found.setdefault(info.name.split("/")[1], []).append(info)
    return found


def history(repository: Repository, found: Marked) -> list[str]:
    """Generations of which a newer one was looked at: they are for people alone (docs/decisions/0015)."""
    return [
        info.name
        for key, generations in _generations(repository.store).items()
        for info in generations[:-1]
        if _number(info.name) < found.looked.get(key, 0)
    ]


def _number(name: str) -> int:
    """The number of a generation, by its name."""
    return int(name.rpartition("/")[2])


def _parsed(repository: Repository, name: str) -> tuple[Catalogue, str]:
    """Raises Conflict where so many generations were made since it was listed that it was collected."""
    try:
        return catalogues.parse(repository.keys, name, repository.store.get(name))
    except NotFound as error:
        raise Conflict(
            "generations were collected while gc looked at them", subject=name, hint="run gc again"
        ) from error


def _check_not_older(
    memory: SeenGenerations | None, floors: Mapping[str, int], found: Mapping[str, Sequence[ObjectInfo]]
) -> None:
    """Raises Corrupt where this machine has seen a newer state of a disk: gc would delete data of that state.

    floors: as they were before the store was asked what is there
    """
    if memory is None:
        return
    for key, floor in floors.items():
        newest = int(found[key][-1].name.rpartition("/")[2]) if key in found else 0
        memory.note(key, newest, floor)


def _look_for_copies(repository: Repository, found: Marked, places: _Places, sizes: Mapping[str, int]) -> None:
    """Decide of each blob in a pack that is missing or damaged whether it has a copy, is whole, or is lost."""
    reader = BlobReader(repository.store, repository.keys)

    def read(blob: bytes, where: Location) -> None:
        if where.pack not in sizes:
            check_present(where, None)
        reader.read(blob, where)

    def is_sound(at: Location) -> bool:
        return (at.pack, at.offset) not in places.doubted and at.pack not in found.index.avoid

    for (pack, offset), (blob, where, layers) in places.doubted.items():
        try:
            place = find_readable(blob, where, is_sound=is_sound, copies=found.index.find_all, read=read)
        except Corrupt as error:
            for layer in layers:
                found.lose(layer, error)
            continue
        if place is where:
            found.rescued[pack, offset] = blob, where
        else:
            found.replaced[pack, offset] = place
            places.note(place)


def _dead_claims(store: ObjectStore) -> list[ObjectInfo]:
    """Claims (objects/exclusive.py) of writers that died, by the store's clock: as old as the youngest lease, ours."""
    now = max((info.modified for info in store.list("leases/") if info.modified is not None), default=None)
    claims = [info for prefix in ("config.", "disks/", "slots/") for info in store.list(prefix) if is_claim(info.name)]
    return [info for info in claims if now and info.modified and now - info.modified > CLAIM_LIFE]


class _Places:
    """Blobs in use, as numbers: pack number, offset, stored bytes.

    avoid: packs that are damaged; sizes: bytes of those that are there, None where that is not asked
    doubted: the blobs in packs that are damaged or missing, (pack, offset) -> id, place, layers
    short: packs that end before a blob that somebody names, and are not among those to avoid
    pages: (pack, offset) of those that are pages
    """

    def __init__(self, avoid: Container[str], sizes: Mapping[str, int] | None) -> None:
        self.read: set[str] = set()
        self.short: set[str] = set()
        self.pages: set[tuple[str, int]] = set()
        self.doubted: dict[tuple[str, int], tuple[bytes, Location, set[str]]] = {}
        self._avoid, self._sizes = avoid, sizes
        self._packs: dict[str, int] = {}
        self._columns: list[Int64s] = []

    def add(self, layer: StoredLayer, *, is_read: bool) -> None:
        """All blobs that a layer names, its own pages among them. Raises Corrupt when a page is lost, at the end."""
        lost: Corrupt | None = None
        for row in layer.table:
            here = page_location(row)
            self.note(here)
            self.pages.add((here.pack, here.offset))
            self._doubt(bytes(row["id"]), here, layer.id)
            try:
                (page,) = layer.pages(int(row["first"]), min(int(row["stop"]), layer.size))
            except Corrupt as error:
                lost = lost or error
                continue
            if is_read:
                self.read.update([here.pack], page.packs)
            data = page.runs[page.runs["stored"] != 0]
            self._note(page.packs, data["pack"], data["offset"], data["stored"])
            reach = np.zeros(len(page.packs), np.int64)
            np.maximum.at(reach, data["pack"], data["offset"].astype(np.int64) + data["stored"])
            if any(self._is_bad(pack, end) for pack, end in zip(page.packs, reach.tolist(), strict=True)):
                for blob, where in named_by_page(page):
                    self._doubt(blob, where, layer.id)
        if lost is not None:
            raise lost

    def note(self, where: Location) -> None:
        """One blob."""
        self._note([where.pack], np.zeros(1, np.int64), where.offset, where.stored)

    def _is_bad(self, pack: str, end: int) -> bool:
        """Whether a pack of which bytes up to `end` are named is damaged or missing."""
        if self._sizes is None:
            return False
        if pack in self._avoid or pack not in self._sizes:
            return True
        if self._sizes[pack] < end:
            self.short.add(pack)
        return False

    def _doubt(self, blob: bytes, where: Location, layer: str) -> None:
        if self._is_bad(where.pack, where.offset + where.stored):
            self.doubted.setdefault((where.pack, where.offset), (blob, where, set()))[2].add(layer)

    def _note(self, packs: Sequence[str], place: object, offset: object, stored: object) -> None:
        numbers = np.array([self._packs.setdefault(pack, len(self._packs)) for pack in packs], np.int64)
        rows = np.stack(np.broadcast_arrays(numbers[np.asarray(place)], np.asarray(offset), np.asarray(stored)))
        self._columns.append(np.unique(rows.astype(np.int64), axis=1))

    def by_pack(self) -> dict[str, tuple[Int64s, Int64s]]:
        """pack -> (offsets ascending, stored bytes)."""
        if not self._columns:
            return {}
        rows = np.unique(np.concatenate(self._columns, axis=1), axis=1)
        names = list(self._packs)
        found: dict[str, tuple[Int64s, Int64s]] = {}
        cuts = np.flatnonzero(np.diff(rows[0])) + 1
        for part in np.split(rows, cuts, axis=1):
            found[names[int(part[0, 0])]] = part[1], part[2]
        return found


def wasteful(
    usage: Sequence[Usage], limit: float, *, least: int, avoid: Container[str] = (), emptied: Container[str] = ()
) -> list[Usage]:
    """The packs in use, but not being read, of which more than `limit` (0 to 1) and more than `least` bytes are unused.

    avoid: packs that are damaged; emptied: packs that are to be emptied in any case
    """
    return [
        pack
        for pack in usage
        if len(pack.offsets)
        and not pack.is_read
        and pack.pack not in avoid
        and (pack.pack in emptied or pack.size - pack.used_bytes > max(limit * pack.size, least))
    ]


def unused(usage: Sequence[Usage]) -> list[Usage]:
    """The packs of which nothing is in use."""
    return [pack for pack in usage if not len(pack.offsets)]
