"""gc: packs that are mostly waste are rewritten, and what nobody needs is deleted.

    mark     what is in use, or being read (collect.py)
    fence    from here on nobody publishes who began before (fence.py)
    move     blobs in use leave the wasteful packs for new ones; the layer records that name them are written anew and
             the catalogues switched to them, each by its next generation
    sweep    old generations; one new index for all old ones; a last look whether we are still alone; layers; packs

Until the last look a writer that takes us for dead may read an old index, and rely on a pack that is about to go; after
it nobody can, since the old indexes are gone: so deletions may come however late.

Deletion runs against the order of writing: nothing that is left ever names what is gone, wherever a run is cut off.
Running again finishes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from snapchain.errors import Conflict
from snapchain.repository import index as indexes, layers as records
from snapchain.repository.catalogue import ATTEMPTS, Catalogue
from snapchain.repository.collect import Marked, Usage, mark, unused, wasteful
from snapchain.repository.fence import fence
from snapchain.repository.format import PAGE_ROW, fresh_id, index_era, pack_name
from snapchain.repository.index import BlobIndex, IndexedPack
from snapchain.repository.intake import store_page_body
from snapchain.repository.layers import StoredLayer
from snapchain.repository.leases import Lease
from snapchain.repository.packer import Packer
from snapchain.repository.packs import Location, PackReader, read_directory
from snapchain.repository.pages import Page, Rows
from snapchain.repository.repository import Repository

WASTE = 0.25
"""The share of a pack that may be waste. Below it, moving costs more requests than the space is worth."""

LEAST_WASTE = 64 * 1024
"""Bytes. Head and directory make up much of a small pack; moved for their sake, it would be moved by every gc."""

MOST_INDEXES = 32
"""Objects; more are put together, for the sake of whoever reads them without a cache."""

_INDEX_BLOBS = 500_000

Moves = dict[tuple[str, int], Location]


@dataclass(slots=True)
class Swept:
    """What gc did, or would do, in stored bytes.

    bytes_freed: less than before, new records counted; bytes_added: more than before, where these cost more than what
    was deleted; bytes_moved: blobs copied into new packs
    """

    bytes_freed: int = 0
    bytes_added: int = 0
    bytes_moved: int = 0
    objects_deleted: int = 0
    packs_deleted: int = 0
    packs_moved: int = 0
    layers_rewritten: int = 0


def index_objects(repository: Repository) -> dict[str, int]:
    """The index objects that a run replaces by new ones when packs go, with their sizes."""
    return {info.name: info.size for info in repository.store.list("index/") if index_era(info.name) is not None}


def estimate(marked: Marked, indexes: Mapping[str, int] | None = None) -> Swept:
    """What `sweep` would do, without the new records that moving costs. indexes: see `index_objects`."""
    wasted, empty = wasteful(marked.usage, WASTE, least=LEAST_WASTE), unused(marked.usage)
    moved = sum(pack.used_bytes for pack in wasted)
    freed = sum(pack.size for pack in (*wasted, *empty)) - moved
    records_gone = marked.dead_generations | marked.dead_claims | marked.dead_layers
    goes = [*wasted, *empty]
    replaced = indexes or {} if goes else {}
    # The new index is smaller by what it no longer lists: about as much as its packs are of all.
    share = sum(pack.size for pack in goes) / max(1, sum(pack.size for pack in marked.usage))
    return Swept(
        bytes_freed=max(0, freed + sum(records_gone.values()) + int(share * sum(replaced.values()))),
        bytes_moved=moved,
        objects_deleted=len(records_gone) + len(wasted) + len(empty) + len(replaced),
        packs_deleted=len(wasted) + len(empty),
        packs_moved=len(wasted),
    )


def sweep(repository: Repository, lease: Lease, *, on_object: Callable[[], None]) -> Swept:
    """Mark and collect under a collector's lease. on_object: told of each deletion.

    Raises Conflict when others took this run for dead; then what was deleted is what nobody needs all the same.
    """
    store = repository.store
    done = Swept()
    held = _stored_bytes(repository)
    marked = _marked_and_fenced(repository, lease)
    if marked is None:
        return done
    wasted = wasteful(marked.usage, WASTE, least=LEAST_WASTE)
    if wasted:
        _move(repository, marked, wasted, done, lease.check)
        marked = mark(repository, lease.spared)
    stay = {pack.pack for pack in marked.usage if len(pack.offsets)}
    gone = {pack.pack: pack.size for pack in unused(marked.usage)}
    lease.check()

    def delete(objects: Iterable[str]) -> None:
        for name in objects:
            store.delete(name)
            done.objects_deleted += 1
            on_object()

    delete(marked.dead_generations)
    delete(marked.dead_claims)
    before = list(index_objects(repository))
    if gone or len(before) > MOST_INDEXES:
        _write_index(repository, before, stay)
        delete(before)
        lease.check()
    delete(marked.dead_layers)
    delete([pack_name(pack) for pack in gone])
    done.packs_deleted = len(gone)
    less = held - _stored_bytes(repository)
    done.bytes_freed, done.bytes_added = max(0, less), max(0, -less)
    return done


def _marked_and_fenced(repository: Repository, lease: Lease) -> Marked | None:
    """What is in use, and will be the same until we are done; None when there is nothing to do."""
    dead_disks = {disk for holder in lease.dead.values() if holder is not None for disk in holder.disks}
    for attempt in range(ATTEMPTS):
        marked = mark(repository, lease.spared)
        would = estimate(marked)
        if not (would.objects_deleted or lease.dead or len(indexes.newest(repository.store)[1]) > MOST_INDEXES):
            return None
        try:
            fence(repository, marked, dead_disks, lease.check)
        except Conflict:  # somebody's last act arrived in between
            if attempt == ATTEMPTS - 1:
                raise
        else:
            lease.bury()
            return marked
    raise AssertionError("the loop returns or raises")


def _stored_bytes(repository: Repository) -> int:
    """Bytes of all objects that gc may touch."""
    prefixes = ("disks/", "index/", "layers/", "packs/")
    return sum(info.size for prefix in prefixes for info in repository.store.list(prefix))


def _write_index(repository: Repository, names: Sequence[str], stay: Collection[str]) -> None:
    """A new era: one index of the packs that stay, instead of `names`. A pack that the store has lost is none of them.

    Raises Conflict when another collector has begun that era.
    """
    store, keys = repository.store, repository.keys
    era = indexes.begin_era(store, keys, names, conditional=repository.conditional)
    pending: list[IndexedPack] = []
    seen: set[str] = set()
    blobs = 0

    def flush() -> None:
        nonlocal blobs
        if pending:
            indexes.write(store, keys, pending, era=era)
            pending.clear()
            blobs = 0

    for name in names:
        packs, ids, rows = indexes.parse(keys, name, store.get(name))
        order = np.argsort(rows["pack"], kind="stable")
        edges = np.searchsorted(rows["pack"][order], np.arange(len(packs) + 1))
        for place, (pack, size) in enumerate(packs.items()):
            if pack not in stay or pack in seen:
                continue
            seen.add(pack)
            mine = order[edges[place] : edges[place + 1]]
            pending.append(IndexedPack(pack, size, ids[mine], rows[mine]))
            blobs += len(mine)
            if blobs >= _INDEX_BLOBS:
                flush()
    flush()


def _move(
    repository: Repository, marked: Marked, wasted: Sequence[Usage], done: Swept, check: Callable[[], None]
) -> None:
    """Copy the blobs in use out of the wasted packs, and let all records name the copies."""
    # Its index knows nothing, so that what is moved is stored although the old packs have it.
    with Packer(repository.store, repository.keys, BlobIndex(indexes.newest(repository.store)[0])) as packer:
        moves: Moves = {}
        for usage in wasted:
            for offset, location in _copied(repository, usage, packer):
                moves[usage.pack, offset] = location
            done.bytes_moved += usage.used_bytes
            done.packs_moved += 1
        packs = {usage.pack for usage in wasted}
        renamed: dict[str, str] = {}
        for layer in {layer for catalogue in marked.catalogues for layer in catalogue.parents}:
            table = _moved_table(repository.layer(layer), packs, moves, packer, repository)
            if table is None:
                continue
            packer.flush()
            header = repository.layer(layer).header.model_copy(update={"id": fresh_id()})
            records.write(repository.store, repository.keys, header, table)
            renamed[layer] = header.id
            done.layers_rewritten += 1
        packer.flush()
    for current in marked.newest:
        if renamed.keys() & current[0].parents.keys():
            check()
            _switch(repository, current, renamed)


def _copied(repository: Repository, usage: Usage, packer: Packer) -> Iterator[tuple[int, Location]]:
    """(old offset, new place) of each blob in use of a pack, which is read once, as a whole."""
    store = repository.store
    reader, ids, rows = read_directory(store, repository.keys, usage.pack, usage.size)
    data = memoryview(store.get(pack_name(usage.pack)))
    used = set(usage.offsets.tolist())
    for blob, (_, offset, stored, raw) in zip(ids, rows.tolist(), strict=True):
        if offset in used:
            yield offset, _copy(reader, bytes(blob), Location(usage.pack, offset, stored, raw), data, packer)


def _copy(reader: PackReader, blob: bytes, where: Location, data: memoryview, packer: Packer) -> Location:
    text = data[where.offset : where.offset + where.stored]
    reader.blob(blob, where.offset, where.raw, text)  # what is damaged is not passed on as if it were sound
    return packer.add(blob, reader.payload(blob, where.offset, where.raw, text), where.raw)


def _moved_table(
    layer: StoredLayer, packs: set[str], moves: Moves, packer: Packer, repository: Repository
) -> Rows | None:
    """The layer's page table with all moved blobs at their new places; None when nothing of it moved."""
    rows: list[Rows] = []
    changed = False
    for row in layer.table:
        (page,) = layer.pages(int(row["first"]), min(int(row["stop"]), layer.size))
        moved = _moved_page(page, packs, moves)
        if moved is not None or bytes(row["pack"]).hex() in packs:
            row = store_page_body(  # noqa: PLW2901
                int(row["first"]), int(row["stop"]), moved or page, keys=repository.keys, packer=packer
            )[0]
            changed = True
        rows.append(np.array([row], PAGE_ROW))
    return np.concatenate(rows) if changed else None


def _moved_page(page: Page, packs: set[str], moves: Moves) -> Page | None:
    hit = np.isin(page.runs["pack"], [place for place, pack in enumerate(page.packs) if pack in packs])
    hit &= page.runs["stored"] != 0
    if not hit.any():
        return None
    runs = page.runs.copy()
    table = {pack: place for place, pack in enumerate(page.packs)}
    for at in np.flatnonzero(hit).tolist():
        new = moves[page.packs[int(runs["pack"][at])], int(runs["offset"][at])]
        runs["pack"][at] = table.setdefault(new.pack, len(table))
        runs["offset"][at], runs["stored"][at] = new.offset, new.stored
    used = sorted({int(place) for place in runs["pack"][runs["stored"] != 0]})
    names = list(table)
    places = np.zeros(len(names), np.uint32)
    places[used] = np.arange(len(used), dtype=np.uint32)
    data = runs["stored"] != 0
    runs["pack"] = places[np.where(data, runs["pack"], 0)] * data
    return Page(runs, page.leaves, [names[place] for place in used])


def _switch(repository: Repository, current: tuple[Catalogue, str], renamed: Mapping[str, str]) -> None:
    """Publish the catalogue's next generation, which names the new records. Raises Conflict when it has one already."""
    catalogue = current[0]

    def new(layer: str) -> str:
        return renamed.get(layer, layer)

    repository.disk(catalogue.disk).advance(
        current,
        time=datetime.now(UTC),
        points=tuple(point.model_copy(update={"layer": new(point.layer)}) for point in catalogue.points),
        parents={new(layer): None if below is None else new(below) for layer, below in catalogue.parents.items()},
    )
