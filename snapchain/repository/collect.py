"""The mark phase of gc: which objects are in use, and how much of each pack.

    the newest catalogue of each disk -> its layers -> their pages -> blobs, by place in packs

and so are the layers that somebody reads right now, whatever catalogue they are of.  Everything else is garbage, once
nobody else is at work (leases.py).  What is done about it: sweep.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from snapchain.errors import Corrupt
from snapchain.model.extents import Int64s
from snapchain.objects.exclusive import CLAIM_LIFE, is_claim
from snapchain.objects.store import ObjectInfo, ObjectStore
from snapchain.repository import catalogue as catalogues
from snapchain.repository.catalogue import Catalogue
from snapchain.repository.format import is_id, pack_name
from snapchain.repository.layers import StoredLayer
from snapchain.repository.repository import Repository

KEPT_GENERATIONS = 30
"""Of each disk, the newest: docs/decisions/0015-what-gc-may-delete.md."""


@dataclass(frozen=True, slots=True, eq=False)
class Usage:
    """One pack.

    size: bytes of the object; offsets, stored: int64[n], its blobs in use, ascending, each once
    is_read: whether a layer that somebody reads names it: then it stays where it is
    """

    pack: str
    size: int
    offsets: Int64s
    stored: Int64s
    is_read: bool

    @property
    def used_bytes(self) -> int:
        """Bytes of blobs that some record names."""
        return int(self.stored.sum())


@dataclass(slots=True)
class Marked:
    """What a mark phase found.

    newest: the newest catalogue of each disk and the hash of its object
    dead_generations, dead_claims, dead_layers: objects nobody needs, name -> bytes
    usage: every pack in the store, used or not
    """

    newest: list[tuple[Catalogue, str]] = field(default_factory=list)
    dead_generations: dict[str, int] = field(default_factory=dict)
    dead_claims: dict[str, int] = field(default_factory=dict)
    dead_layers: dict[str, int] = field(default_factory=dict)
    usage: list[Usage] = field(default_factory=list)

    @property
    def catalogues(self) -> list[Catalogue]:
        """The newest of each disk."""
        return [catalogue for catalogue, _ in self.newest]


def mark(repository: Repository, spared: Collection[str] = ()) -> Marked:
    """Find what is in use. spared: layers that somebody reads.

    Raises Corrupt, and so collects nothing, when any record in use is missing or unsound.
    """
    store = repository.store
    found = Marked()
    generations: dict[str, list[ObjectInfo]] = {}
    for info in store.list("disks/"):
        if catalogues.is_generation(info.name):
            generations.setdefault(info.name.split("/")[1], []).append(info)  # ascending
    for history in generations.values():
        # One more than are kept is what the last run has added itself: each would free one and add one, for ever.
        if len(history) > KEPT_GENERATIONS + 1:
            found.dead_generations.update((info.name, info.size) for info in history[:-KEPT_GENERATIONS])
        name = history[-1].name
        found.newest.append(catalogues.parse(repository.keys, name, store.get(name)))
    found.dead_claims.update((info.name, info.size) for info in _dead_claims(store))
    alive = {layer for catalogue in found.catalogues for layer in catalogue.parents}
    read = set()
    for info in store.list("layers/"):
        layer = info.name.rpartition("/")[2]
        if layer in spared:
            read.add(layer)  # one that is gone was gone before its reader had its lease
        elif layer not in alive:
            found.dead_layers[info.name] = info.size
    places = _Places()
    for layer in sorted(alive | read):
        places.add(repository.layer(layer), is_read=layer in read)
    used = places.by_pack()
    nothing = np.empty(0, np.int64)
    for info in store.list("packs/"):
        pack = info.name.rpartition("/")[2]
        if is_id(pack):
            offsets, stored = used.pop(pack, (nothing, nothing))
            found.usage.append(Usage(pack, info.size, offsets, stored, is_read=pack in places.read))
    if used:
        raise _missing(next(iter(used)))
    return found


def _dead_claims(store: ObjectStore) -> list[ObjectInfo]:
    """Claims (objects/exclusive.py) of writers that died, by the store's clock: as old as the youngest lease, ours."""
    now = max((info.modified for info in store.list("leases/") if info.modified is not None), default=None)
    claims = [info for prefix in ("config.", "disks/") for info in store.list(prefix) if is_claim(info.name)]
    return [info for info in claims if now and info.modified and now - info.modified > CLAIM_LIFE]


class _Places:
    """Blobs in use, as numbers: pack number, offset, stored bytes."""

    def __init__(self) -> None:
        self.read: set[str] = set()
        self._packs: dict[str, int] = {}
        self._columns: list[Int64s] = []

    def add(self, layer: StoredLayer, *, is_read: bool) -> None:
        """All blobs that a layer names, its own pages among them."""
        for row in layer.table:
            self._note([bytes(row["pack"]).hex()], np.zeros(1, np.int64), row["offset"], row["stored"])
            (page,) = layer.pages(int(row["first"]), min(int(row["stop"]), layer.size))
            if is_read:
                self.read.update([bytes(row["pack"]).hex()], page.packs)
            data = page.runs[page.runs["stored"] != 0]
            self._note(page.packs, data["pack"], data["offset"], data["stored"])

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


def _missing(pack: str) -> Corrupt:
    return Corrupt(
        "a record names this pack, and it is missing: nothing is collected from a damaged repository",
        subject=pack_name(pack),
        hint="snapchain verify tells which points are affected",
    )


def wasteful(usage: Sequence[Usage], limit: float, *, least: int) -> list[Usage]:
    """The packs in use that nobody reads, of which more than `limit` (0 to 1) is not, and more than `least` bytes."""
    return [
        pack
        for pack in usage
        if len(pack.offsets) and not pack.is_read and pack.size - pack.used_bytes > max(limit * pack.size, least)
    ]


def unused(usage: Sequence[Usage]) -> list[Usage]:
    """The packs of which nothing is in use."""
    return [pack for pack in usage if not len(pack.offsets)]
