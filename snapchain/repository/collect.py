"""The mark phase of gc: which objects are in use, and how much of each pack.

    the newest catalogue of each disk -> its layers -> their pages -> blobs, by place in packs

Everything else is garbage, once nobody else is at work (leases.py).  What is done about it: sweep.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from snapchain.errors import Corrupt
from snapchain.model.extents import Int64s
from snapchain.repository import catalogue as catalogues
from snapchain.repository.catalogue import Catalogue
from snapchain.repository.format import is_id, pack_name
from snapchain.repository.layers import StoredLayer
from snapchain.repository.repository import Repository


@dataclass(frozen=True, slots=True, eq=False)
class Usage:
    """One pack. size: bytes of the object; offsets, stored: int64[n], its blobs in use, ascending, each once."""

    pack: str
    size: int
    offsets: Int64s
    stored: Int64s

    @property
    def used_bytes(self) -> int:
        """Bytes of blobs that some record names."""
        return int(self.stored.sum())


@dataclass(slots=True)
class Marked:
    """What a mark phase found.

    catalogues: the newest of each disk; dead_generations, dead_layers: objects nobody needs, name -> bytes
    usage: every pack in the store, used or not
    """

    catalogues: list[Catalogue] = field(default_factory=list)
    dead_generations: dict[str, int] = field(default_factory=dict)
    dead_layers: dict[str, int] = field(default_factory=dict)
    usage: list[Usage] = field(default_factory=list)


def mark(repository: Repository) -> Marked:
    """Find what is in use. Raises Corrupt, and so collects nothing, when any record in use is missing or unsound."""
    store = repository.store
    found = Marked()
    newest: dict[str, str] = {}
    for info in store.list("disks/"):
        if catalogues.is_generation(info.name):
            newest[info.name.split("/")[1]] = info.name  # ascending: the last one of each disk stays
            found.dead_generations[info.name] = info.size
    for name in newest.values():
        del found.dead_generations[name]
        found.catalogues.append(catalogues.parse(repository.keys, name, store.get(name))[0])
    alive = {layer for catalogue in found.catalogues for layer in catalogue.parents}
    for info in store.list("layers/"):
        if info.name.rpartition("/")[2] not in alive:
            found.dead_layers[info.name] = info.size
    places = _Places()
    for layer in sorted(alive):
        places.add(repository.layer(layer))
    used = places.by_pack()
    nothing = np.empty(0, np.int64)
    for info in store.list("packs/"):
        pack = info.name.rpartition("/")[2]
        if is_id(pack):
            offsets, stored = used.pop(pack, (nothing, nothing))
            found.usage.append(Usage(pack, info.size, offsets, stored))
    if used:
        raise _missing(next(iter(used)))
    return found


class _Places:
    """Blobs in use, as numbers: pack number, offset, stored bytes."""

    def __init__(self) -> None:
        self._packs: dict[str, int] = {}
        self._columns: list[Int64s] = []

    def add(self, layer: StoredLayer) -> None:
        """All blobs that a layer names, its own pages among them."""
        for row in layer.table:
            self._note([bytes(row["pack"]).hex()], np.zeros(1, np.int64), row["offset"], row["stored"])
            (page,) = layer.pages(int(row["first"]), min(int(row["stop"]), layer.size))
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
    """The packs in use of which more than `limit` (0 to 1) is not, and more than `least` bytes."""
    return [pack for pack in usage if len(pack.offsets) and pack.size - pack.used_bytes > max(limit * pack.size, least)]


def unused(usage: Sequence[Usage]) -> list[Usage]:
    """The packs of which nothing is in use."""
    return [pack for pack in usage if not len(pack.offsets)]
