"""gc: packs that are mostly waste are rewritten, and what nobody needs is deleted.

    mark     what is in use, or being read, and what of it is damaged (mark.py)
    fence    from here on nobody publishes who began before (`fence` below)
    move     blobs in use leave the wasteful packs, and those that are damaged, for new ones; the layer records that
             name them are written anew, also where a damaged blob has a copy already, and the catalogues switched to
             them, each by its next generation
    sweep    old generations; one new index for all old ones; a last look whether we are still alone; layers; packs

Until the last look, a writer that takes us for dead may read an old index, and rely on a pack that is about to be
deleted.  After it no writer can, since the old indexes are gone: deletions may be delayed for any time.

Deletion runs in the reverse order of writing: wherever a run is interrupted, nothing that is left names a deleted
object.  Another run finishes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from snapchain.errors import Conflict, Corrupt
from snapchain.objects.store import ObjectInfo, Refused
from snapchain.repository import index as indexes, layers as records
from snapchain.repository.catalogue import ATTEMPTS, Catalogue
from snapchain.repository.format import PACK_BYTES, PAGE_ROW, fresh_id, index_era, pack_name
from snapchain.repository.index import BlobIndex, IndexedPack
from snapchain.repository.ingest import store_page_body
from snapchain.repository.layers import StoredLayer
from snapchain.repository.leases import Lease
from snapchain.repository.mark import Marked, Usage, mark, unused, wasteful
from snapchain.repository.packer import Packer
from snapchain.repository.packs import Location, PackReader, read_directory
from snapchain.repository.pages import Page, Rows
from snapchain.repository.repository import Repository

WASTE = 0.25
"""The share of a pack that may be waste. Below it, moving costs more requests than the space is worth."""

LEAST_WASTE = 64 * 1024
"""Bytes. Head and directory make up much of a small pack; moved for their sake, it would be moved by every gc."""

MOST_INDEXES = 32
"""Objects beyond those that their size demands; more are put together, for readers without a cache."""

_INDEX_BLOBS = 500_000

Moves = dict[str, dict[int, Location]]
"""pack -> offset in it -> where the blob lies now."""


@dataclass(slots=True)
class Swept:
    """What gc did, or would do, in stored bytes.

    bytes_freed: less than before, new records counted; bytes_added: more than before, where these cost more than what
    was deleted; bytes_moved: blobs copied into new packs
    marked: what was in use at the end, and what of it is lost
    """

    bytes_freed: int = 0
    bytes_added: int = 0
    bytes_moved: int = 0
    objects_deleted: int = 0
    packs_deleted: int = 0
    packs_moved: int = 0
    marked: Marked | None = None


def index_objects(repository: Repository) -> list[ObjectInfo]:
    """The index objects that a run replaces by new ones when packs go."""
    return [info for info in repository.store.list("index/") if index_era(info.name) is not None]


def estimate(marked: Marked, indexes: Sequence[ObjectInfo] = ()) -> Swept:
    """What `sweep` would do, without the new records that moving costs. indexes: see `index_objects`."""
    wasted, empty = _wasteful(marked), _unused(marked)
    rescued = sum(where.stored for key, (_, where) in marked.rescued.items() if key in marked.movable)
    moved = sum(pack.used_bytes for pack in wasted) + rescued
    freed = sum(pack.size for pack in (*wasted, *empty)) - moved
    records_gone = marked.dead_generations | marked.dead_claims | marked.dead_layers | marked.stale
    goes = [*wasted, *empty]
    replaced = indexes if goes else ()
    # The new index is smaller by what it no longer lists: about as much as its packs are of all.
    share = sum(pack.size for pack in goes) / max(1, sum(pack.size for pack in marked.usage))
    return Swept(
        bytes_freed=max(0, freed + sum(records_gone.values()) + int(share * sum(info.size for info in replaced))),
        bytes_moved=moved,
        objects_deleted=len(records_gone) + len(wasted) + len(empty) + len(replaced),
        packs_deleted=len(wasted) + len(empty),
        packs_moved=len(wasted),
    )


def _wasteful(marked: Marked) -> list[Usage]:
    if marked.unread:
        return []
    return wasteful(marked.usage, WASTE, least=LEAST_WASTE, avoid=marked.suspect)


def _unused(marked: Marked) -> list[Usage]:
    """Packs that may go. Without the map of a layer it is not known which packs it needs."""
    return [] if marked.unread else unused(marked.usage)


def sweep(repository: Repository, lease: Lease, *, on_object: Callable[[], None]) -> Swept:
    """Mark and collect under a collector's lease. on_object: told of each deletion.

    Raises Conflict when others took this run for dead; then what was deleted is what nobody needs all the same.
    """
    store = repository.store
    done = Swept()
    held = _stored_bytes(repository)
    marked = _marked_and_fenced(repository, lease)
    done.marked = marked
    if marked.lost or marked.suspect:
        lease.check()  # after another collection meanwhile, a missing object is no damage
    if not _is_work(repository, lease, marked):
        _note_damage(repository, marked)
        return done
    wasted = _wasteful(marked)
    if wasted or marked.movable:
        with suppress(Refused):  # a full disk: deleting waste makes room to move next time
            _move(repository, marked, wasted, done, lease.check)
        done.marked = marked = mark(repository, lease.spared)
    gone = {pack.pack for pack in _unused(marked)}
    avoid = marked.suspect | marked.index.avoid | gone
    stay = {pack.pack: pack.size for pack in marked.usage if pack.pack not in avoid}
    _note_damage(repository, marked)
    lease.check()

    def delete(objects: Iterable[str]) -> None:
        for name in objects:
            store.delete(name)
            done.objects_deleted += 1
            on_object()

    delete(marked.dead_generations)
    delete(marked.dead_claims)
    listed = index_objects(repository)
    before = [info.name for info in listed]
    unwritten: list[list[IndexedPack]] = []
    if gone or _too_many(repository, listed) or _misleads(marked):
        era, unwritten = _write_index(repository, before, stay)
        delete(before)
        lease.check()
    delete(marked.dead_layers)
    delete([pack_name(pack) for pack in gone])
    delete(marked.stale)
    for group in unwritten:
        indexes.write(store, repository.keys, group, era=era)
    done.packs_deleted = len(gone)
    less = held - _stored_bytes(repository)
    done.bytes_freed, done.bytes_added = max(0, less), max(0, -less)
    return done


def _marked_and_fenced(repository: Repository, lease: Lease) -> Marked:
    """What is in use, and will be the same until we are done; not fenced when there is nothing to do."""
    dead_disks = {disk for holder in lease.dead.values() if holder is not None for disk in holder.disks}
    for attempt in range(ATTEMPTS):
        marked = mark(repository, lease.spared)
        if not _is_work(repository, lease, marked):
            return marked
        try:
            _fence(repository, marked, dead_disks, lease)
        except Conflict:  # somebody's last act arrived in between
            if attempt == ATTEMPTS - 1:
                raise
        else:
            lease.bury()
            return marked
    raise AssertionError("the loop returns or raises")


def _fence(repository: Repository, marked: Marked, dead_disks: set[str], lease: Lease) -> None:
    try:
        fence(repository, marked, dead_disks, lease.check)
    except Refused:  # a full disk: what may go at any time makes room
        gone = [*marked.dead_generations, *marked.dead_claims]
        if not gone:
            raise
        for name in gone:
            repository.store.delete(name)
        fence(repository, marked, dead_disks, lease.check)


def _is_work(repository: Repository, lease: Lease, marked: Marked) -> bool:
    would = estimate(marked)
    if would.objects_deleted or lease.dead or marked.movable or _misleads(marked):
        return True
    return _too_many(repository, indexes.newest(repository.store)[1])


def _too_many(repository: Repository, listed: Sequence[ObjectInfo]) -> bool:
    """Whether these index objects are many more than would do, of the size that they may have."""
    needed = 2 * sum(info.size for info in listed) // (repository.pack_size or PACK_BYTES)
    return len(listed) > MOST_INDEXES + needed


def _misleads(marked: Marked) -> bool:
    """Whether an index lists packs that are missing or damaged, or cannot be read."""
    return bool(marked.index.unreadable) or any(pack in marked.index.avoid for pack in marked.index.sizes)


def _note_damage(repository: Repository, marked: Marked) -> None:
    """Record the damaged packs that records name: the next index no longer lists their sizes."""
    repository.blobs.damaged |= marked.suspect
    repository.record_damage()


def _stored_bytes(repository: Repository) -> int:
    """Bytes of all objects that gc may touch."""
    prefixes = ("disks/", "index/", "layers/", "packs/")
    return sum(info.size for prefix in prefixes for info in repository.store.list(prefix))


def _write_index(
    repository: Repository, names: Sequence[str], sizes: Mapping[str, int]
) -> tuple[int, list[list[IndexedPack]]]:
    """A new era: one index of the packs that stay, instead of `names`, whichever of these can be read.

    sizes: bytes of the packs that stay; none of them is missing or damaged.
    Gives the era, and what is still to be written, since the disk is full: once the old indexes, which no longer count,
    and unused packs are gone.
    Raises Conflict when another collector has begun that era.
    """
    store, keys = repository.store, repository.keys
    era = indexes.begin_era(store, keys, names, conditional=repository.conditional)
    stay = set(sizes)
    pending: list[IndexedPack] = []
    seen: set[str] = set()
    blobs = 0

    unwritten: list[list[IndexedPack]] = []

    def flush() -> None:
        nonlocal blobs, pending
        for group in indexes.split(pending, repository.pack_size):
            try:
                indexes.write(store, keys, group, era=era)
            except Refused:
                unwritten.append(group)
        pending, blobs = [], 0

    def add(pack: str, size: int, ids: indexes.Ids, rows: Rows) -> None:
        nonlocal blobs
        seen.add(pack)
        pending.append(IndexedPack(pack, size, ids, rows))
        blobs += len(rows)
        if blobs >= _INDEX_BLOBS:
            flush()

    damaged = False
    for name in names:
        try:
            packs, ids, rows = indexes.parse(keys, name, store.get(name))
        except Corrupt:
            damaged = True
            continue
        order = np.argsort(rows["pack"], kind="stable")
        edges = np.searchsorted(rows["pack"][order], np.arange(len(packs) + 1))
        for place, (pack, size) in enumerate(packs.items()):
            if pack in stay and pack not in seen:
                mine = order[edges[place] : edges[place + 1]]
                add(pack, size, ids[mine], rows[mine])
    for pack in sorted(stay - seen) if damaged else ():
        with suppress(Corrupt):  # then its blobs are stored again when they are shipped
            add(pack, sizes[pack], *read_directory(store, keys, pack, sizes[pack])[1:])
    flush()
    return era, unwritten


def _move(
    repository: Repository, marked: Marked, wasted: Sequence[Usage], done: Swept, check: Callable[[], None]
) -> None:
    """Copy the blobs in use out of wasted and damaged packs, and let all records name the copies."""
    # Its index knows nothing, so that what is moved is stored although the old packs have it.
    index = BlobIndex(indexes.newest(repository.store)[0])
    with Packer(repository.store, repository.keys, index, pack_size=repository.pack_size) as packer:
        moves: Moves = {}
        for pack, offset in marked.movable & marked.replaced.keys():
            moves.setdefault(pack, {})[offset] = marked.replaced[pack, offset]
        for usage in wasted:
            try:
                moves[usage.pack] = dict(_copied(repository, usage, marked.pages, packer))
            except Corrupt:  # it stays where it is, and is not trusted any more
                repository.blobs.damaged.add(usage.pack)
                continue
            done.bytes_moved += usage.used_bytes
            done.packs_moved += 1
        for key in sorted(marked.movable & marked.rescued.keys() - marked.pages):
            blob, where = marked.rescued[key]
            moves.setdefault(where.pack, {})[where.offset] = _rescued(repository, blob, where, packer)
            done.bytes_moved += where.stored
        vacated = moves.keys() | {pack for pack, _ in marked.movable}
        renamed: dict[str, str] = {}
        for layer in {layer for catalogue in marked.catalogues for layer in catalogue.parents} - marked.unread:
            table = _moved_table(repository.layer(layer), moves, vacated, packer, repository)
            if table is None:
                continue
            packer.flush()
            header = repository.layer(layer).header.model_copy(update={"id": fresh_id()})
            records.write(repository.store, repository.keys, header, table)
            renamed[layer] = header.id
        packer.flush()
    for current in marked.newest:
        if renamed.keys() & current[0].parents.keys():
            check()
            _switch(repository, current, renamed)


def _copied(
    repository: Repository, usage: Usage, pages: Container[tuple[str, int]], packer: Packer
) -> Iterator[tuple[int, Location]]:
    """(old offset, new place) of each blob in use of a pack, but for pages. Reads it once, as a whole.

    Pages are written when it is known where what they name has gone. Raises Corrupt.
    """
    store = repository.store
    reader, ids, rows = read_directory(store, repository.keys, usage.pack, usage.size)
    data = memoryview(store.get(pack_name(usage.pack)))
    used = set(usage.offsets.tolist())
    for blob, (_, offset, stored, raw) in zip(ids, rows.tolist(), strict=True):
        if offset in used and (usage.pack, offset) not in pages:
            text = data[offset : offset + stored]
            yield offset, _copy(reader, bytes(blob), Location(usage.pack, offset, stored, raw), text, packer)


def _rescued(repository: Repository, blob: bytes, where: Location, packer: Packer) -> Location:
    """The new place of a whole blob in a damaged pack. Raises Corrupt."""
    text = repository.store.get(pack_name(where.pack), offset=where.offset, length=where.stored)
    return _copy(PackReader(repository.keys, where.pack), blob, where, memoryview(text), packer)


def _copy(reader: PackReader, blob: bytes, where: Location, text: memoryview, packer: Packer) -> Location:
    reader.blob(blob, where.offset, where.raw, text)  # what is damaged is not passed on as if it were sound
    return packer.add(blob, reader.payload(blob, where.offset, where.raw, text), where.raw)


def _moved_table(
    layer: StoredLayer, moves: Moves, vacated: Container[str], packer: Packer, repository: Repository
) -> Rows | None:
    """The layer's page table with all moved blobs at their new places; None when nothing of it moved.

    vacated: packs in which no page is to stay
    """
    rows: list[Rows] = []
    changed = False
    for row in layer.table:
        first, stop = int(row["first"]), int(row["stop"])
        (page,) = layer.pages(first, min(stop, layer.size))
        moved = _moved_page(page, moves)
        pack = bytes(row["pack"]).hex()
        copy = moves.get(pack, {}).get(int(row["offset"]))
        if moved is None and copy is not None:
            row = row.copy()  # noqa: PLW2901
            row["pack"] = np.frombuffer(bytes.fromhex(copy.pack), np.uint8)
            row["offset"], row["stored"] = copy.offset, copy.stored
        elif moved is not None or pack in vacated:
            row = store_page_body(first, stop, moved or page, keys=repository.keys, packer=packer)[0]  # noqa: PLW2901
        changed = changed or moved is not None or pack in vacated
        rows.append(np.array([row], PAGE_ROW))
    return np.concatenate(rows) if changed else None


def _moved_page(page: Page, moves: Moves) -> Page | None:
    runs = page.runs.copy()
    table = {pack: place for place, pack in enumerate(page.packs)}
    hit = False
    for at in np.flatnonzero(_may_move(page, moves)).tolist():
        new = moves[page.packs[int(runs["pack"][at])]].get(int(runs["offset"][at]))
        if new is not None:
            hit = True
            runs["pack"][at] = table.setdefault(new.pack, len(table))
            runs["offset"][at], runs["stored"][at] = new.offset, new.stored
    if not hit:
        return None
    used = sorted({int(place) for place in runs["pack"][runs["stored"] != 0]})
    names = list(table)
    places = np.zeros(len(names), np.uint32)
    places[used] = np.arange(len(used), dtype=np.uint32)
    data = runs["stored"] != 0
    runs["pack"] = places[np.where(data, runs["pack"], 0)] * data
    return Page(runs, page.leaves, [names[place] for place in used])


def _may_move(page: Page, moves: Moves) -> npt.NDArray[np.bool_]:
    """Which runs are of packs out of which something is moved."""
    places = [place for place, pack in enumerate(page.packs) if pack in moves]
    hit: npt.NDArray[np.bool_] = np.isin(page.runs["pack"], places) & (page.runs["stored"] != 0)
    return hit


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


# --- The fence: after it, nobody who stood still since before can publish what a collection is about to take away.
#
# A writer asks for its lease, and then creates the next generation of its disk.  Between the two it may be frozen for
# any time (a stopped virtual machine, a request on its way), and no clock of its own tells.  So the collector takes the
# number that the writer is about to create: it publishes each disk's catalogue once more, as it is, based on the very
# generation that it has marked.  Who was faster is seen as a conflict, and marked; who is slower gets one, and asks
# for its lease again, which is gone.


def fence(repository: Repository, marked: Marked, dead_disks: Iterable[str], check: Callable[[], None]) -> None:
    """Publish the next generation of every disk that was marked, and the first of others.

    dead_disks: names of those that holders of dead leases may be about to make; check: see `sweep`.
    Raises Conflict when a disk was changed since it was marked: mark again.
    """
    check()
    for place, current in enumerate(marked.newest):
        disk = repository.disk(current[0].disk)
        marked.newest[place] = disk.advance(current, time=datetime.now(UTC))
    known = {catalogue.disk for catalogue in marked.catalogues}
    for name in set(dead_disks) - known:
        marked.newest.append(repository.disk(name).advance(None, time=datetime.now(UTC)))
