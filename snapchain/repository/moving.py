"""gc: blobs in use leave packs that are mostly waste, damaged, or condemned, and the records follow them.

    copy     each blob in use into a new pack, as it is stored: what is damaged is not passed on as if it were sound
    rewrite  the pages and the layer records that name it
    switch   each catalogue to the new records, by its next generation

Works under a lease as any writer has it (sweep.py), and leaves alone the disks to which others publish.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from snapchain.errors import Corrupt, NotFound
from snapchain.repository import eras, layers as records
from snapchain.repository.catalogue import Catalogue
from snapchain.repository.format import PAGE_ROW, fresh_id, pack_name
from snapchain.repository.index import BlobIndex
from snapchain.repository.ingest import store_page_body
from snapchain.repository.layers import StoredLayer
from snapchain.repository.mark import Marked, Usage, named_packs
from snapchain.repository.packer import Packer
from snapchain.repository.packs import Location, PackReader, read_directory
from snapchain.repository.pages import Page, Rows
from snapchain.repository.repository import Repository

Moves = dict[str, dict[int, Location]]
"""pack -> offset in it -> where the blob lies now."""


def move(
    repository: Repository,
    marked: Marked,
    wasted: Sequence[Usage],
    check: Callable[[], None],
    published_to: Callable[[], frozenset[str] | None],
) -> tuple[int, int]:
    """Copy the blobs in use out of wasted and damaged packs, and let all records name the copies.

    Gives the bytes that were copied, and the number of wasted packs.

    published_to: the disks to which others may publish by now, and which stay as they are; None: all.
    """
    avoid = published_to()
    moved_bytes = moved_packs = 0
    if avoid is None:
        return moved_bytes, moved_packs
    layers = {catalogue.disk: set(catalogue.parents) - marked.unread for catalogue in marked.catalogues}
    kept = named_packs(repository, {layer for disk, some in layers.items() if disk in avoid for layer in some})
    # Its index knows nothing, so that what is moved is stored although the old packs have it.
    index = BlobIndex(eras.newest(repository.store)[0])
    with Packer(repository.store, repository.keys, index, pack_size=repository.pack_size) as packer:
        moves: Moves = {}
        for pack, offset in marked.movable & marked.replaced.keys():
            moves.setdefault(pack, {})[offset] = marked.replaced[pack, offset]
        for usage in wasted:
            if usage.pack in kept:
                continue
            try:
                moves[usage.pack] = dict(_copied(repository, usage, marked.pages, packer))
            except Corrupt:  # it stays where it is, and is not trusted any more
                repository.blobs.damaged.add(usage.pack)
                continue
            moved_bytes += usage.used_bytes
            moved_packs += 1
        for key in sorted(marked.movable & marked.rescued.keys() - marked.pages):
            blob, where = marked.rescued[key]
            moves.setdefault(where.pack, {})[where.offset] = _rescued(repository, blob, where, packer)
            moved_bytes += where.stored
        vacated = moves.keys() | {pack for pack, _ in marked.movable}
        renamed: dict[str, str] = {}
        for layer in {layer for disk, some in layers.items() if disk not in avoid for layer in some}:
            table = _moved_table(repository.layer(layer), moves, vacated, packer, repository)
            if table is None:
                continue
            packer.flush()
            header = repository.layer(layer).header.model_copy(update={"id": fresh_id()})
            records.write(repository.store, repository.keys, header, table)
            renamed[layer] = header.id
        packer.flush()
    for catalogue in marked.catalogues:
        if not renamed.keys() & catalogue.parents.keys():
            continue
        busy = published_to()
        if busy is not None and catalogue.disk not in busy:
            with suppress(NotFound):  # it has another name by now
                _switch(repository, catalogue.disk, renamed, check)
    return moved_bytes, moved_packs


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


def _switch(repository: Repository, disk: str, renamed: Mapping[str, str], check: Callable[[], None]) -> None:
    """Publish the catalogue's next generation, which names the new records.

    Raises Conflict when others change the disk time and again.
    """

    def new(layer: str) -> str:
        return renamed.get(layer, layer)

    def fields(catalogue: Catalogue) -> dict[str, object]:
        return {
            "points": tuple(point.model_copy(update={"layer": new(point.layer)}) for point in catalogue.points),
            "parents": {new(layer): below and new(below) for layer, below in catalogue.parents.items()},
        }

    repository.disk(disk).update(fields, time=datetime.now(UTC), check=check)
