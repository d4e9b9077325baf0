"""Merges neighbouring layers inside the repository: a change of records that moves no guest data.

The pages of the layers are swept in guest order.  A page that no other layer touches goes into the new record as it is,
unread; where pages of several layers meet, their runs are composed in windows and written as new pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from snapchain.errors import Corrupt
from snapchain.model.content import LEAF_BYTES, Leaves, leaves_over
from snapchain.model.extents import ABSENT, DATA, Extents, over, rounded
from snapchain.repository import layers as records
from snapchain.repository.format import LEAF_ROW, PAGE_ROW, RUN_ROW, fresh_id, layer_name
from snapchain.repository.intake import store_page
from snapchain.repository.layers import LayerHeader, StoredLayer, leaves_said
from snapchain.repository.packer import Packer
from snapchain.repository.pages import PAGE_LEAVES, PAGE_RUNS, PageBuilder, Rows, extents_of
from snapchain.repository.repository import Repository

_WINDOW = 1024 * 1024
"""Bytes of pages that are composed at a time."""
_WIDEST = 16 * 1024 * 1024 * 1024
"""Guest bytes that are composed at a time, however little is said of them: leaves are laid out in memory."""


@dataclass(frozen=True, slots=True)
class _Span:
    """Whole leaves [first, stop) of which a layer has something to say, in `page` unless it is its end."""

    first: int
    stop: int
    page: np.void | None


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Whole leaves [first, stop), and the spans that meet there, by where they begin."""

    first: int
    stop: int
    spans: Sequence[_Span]

    @property
    def page(self) -> np.void | None:
        """The page that can stay as it is: one layer alone speaks of this stretch, and of nothing beyond it."""
        first = self.spans[0]
        return first.page if len(self.spans) == 1 and first.stop == self.stop else None

    def windows(self) -> Iterator[tuple[int, int]]:
        """The stretch in parts that are worth composing at once: cut by what is said there, not by their width."""
        begin, weight = self.first, 0
        for span in self.spans:
            more = 0 if span.page is None else int(span.page["raw"])
            if weight + more > _WINDOW and span.first > begin:
                yield from _parts(begin, span.first)
                begin, weight = span.first, 0
            weight += more
        yield from _parts(begin, self.stop)


def _parts(begin: int, stop: int) -> Iterator[tuple[int, int]]:
    for at in range(begin, stop, _WIDEST):
        yield at, min(at + _WIDEST, stop)


@dataclass(frozen=True, slots=True)
class _Piece:
    """What some lower layers together say of a window: runs, their pack table, leaves; offsets from its start."""

    extents: Extents
    runs: Rows
    packs: list[str]
    leaves: Leaves


def merge_layers(repository: Repository, group: Sequence[StoredLayer], packer: Packer, *, root: bool) -> StoredLayer:
    """One layer instead of `group` (neighbours, lower first); it shows what the uppermost one shows.

    root: nothing lies below the group, so zeroes need not be said.  Durable and complete on return.
    """
    top = group[-1]
    builder = PageBuilder()
    table: list[Rows] = [np.empty(0, PAGE_ROW)]

    def flush() -> None:
        table.append(store_page(builder, keys=repository.keys, packer=packer))

    for stretch in _stretches(group):
        if stretch.page is not None:
            flush()
            table.append(np.array([stretch.page], PAGE_ROW))
            continue
        for first, stop in stretch.windows():
            piece = _composed(group, first, stop, root=root)
            _prove(group, piece, first, stop, root=root)
            for runs, leaves in _page_loads(piece, first):
                builder.add(runs, piece.packs, leaves)
                if builder.is_full:
                    flush()
    flush()
    packer.flush()
    pages = np.concatenate(table)
    header = LayerHeader(
        id=fresh_id(),
        size=top.size,
        time=datetime.now(UTC),
        name=top.header.name,
        image_format=group[0].header.image_format if root else "qcow2",
        cluster_size=min(layer.header.cluster_size for layer in group),
        sources=tuple(source for layer in group for source in layer.header.sources),
        replaces=tuple(layer.id for layer in group),
        data_bytes=int(pages["data"].sum()),
        zero_bytes=int(pages["zero"].sum()),
        content_sum=top.header.content_sum,
        content_id=top.header.content_id,
    )
    records.write(repository.store, repository.keys, header, pages)
    return repository.layer(header.id)


def _stretches(group: Sequence[StoredLayer]) -> Iterator[_Stretch]:
    """The group's pages in guest order, those that share a leaf taken together."""
    size = group[-1].size
    end = -(-size // LEAF_BYTES) * LEAF_BYTES
    spans: list[_Span] = []
    for layer in group:
        for row in layer.table:
            first = int(row["first"]) // LEAF_BYTES * LEAF_BYTES
            spans.append(_Span(first, -(-int(row["stop"]) // LEAF_BYTES) * LEAF_BYTES, row))
        if layer.size < size:
            # Past the end of a shorter layer nothing of the lower ones shows (the size law), page or no page.
            spans.append(_Span(layer.size // LEAF_BYTES * LEAF_BYTES, end, None))
    spans.sort(key=lambda span: (span.first, span.stop))
    at = 0
    while at < len(spans) and spans[at].first < end:
        stop, after = spans[at].stop, at + 1
        while after < len(spans) and spans[after].first < stop:
            stop, after = max(stop, spans[after].stop), after + 1
        yield _Stretch(spans[at].first, min(stop, end), spans[at:after])
        at = after


def _composed(group: Sequence[StoredLayer], first: int, stop: int, *, root: bool) -> _Piece:
    piece = _piece(group[0], first, stop)
    for layer in group[1:]:
        upper = _piece(layer, first, stop)
        # Most of many small layers say nothing in a window; of one size, they change nothing either.
        if len(upper.runs) or upper.extents.size != piece.extents.size:
            piece = _over(piece, upper)
    if root:
        stay = piece.runs["stored"] != 0
        piece = _Piece(piece.extents, piece.runs[stay], piece.packs, piece.leaves)
    return piece


def _piece(layer: StoredLayer, first: int, stop: int) -> _Piece:
    """One layer's part of a window; runs cut at its edges."""
    size = max(0, min(stop, layer.size) - first)
    runs: list[Rows] = [np.empty(0, RUN_ROW)]
    leaves: list[Rows] = [np.empty(0, LEAF_ROW)]
    packs: list[str] = []
    for page in layer.pages(first, first + size) if size else ():
        rows = page.between(first, first + size).copy()
        rows["pack"] += len(packs)
        packs += page.packs
        runs.append(rows)
        index = page.leaves["index"].astype(np.int64) * LEAF_BYTES
        leaves.append(page.leaves[(index >= first) & (index < first + size)])
    cut = _shifted(_cut(np.concatenate(runs), first, first + size), first)
    extents = extents_of(cut, size)
    rows = np.concatenate(leaves)
    index = rows["index"].astype(np.int64) - first // LEAF_BYTES
    return _Piece(extents, cut, packs, Leaves.of(extents, index, np.ascontiguousarray(rows["hash"])))


def _over(lower: _Piece, upper: _Piece) -> _Piece:
    """Both together: every run that shows, cut to where it shows."""
    places, size = len(lower.runs), upper.extents.size
    below = _named(lower.runs, lower.extents.size, 0)
    if lower.extents.size < size and not _ends_touched(lower, upper):
        # Nobody here knows the leaf in which the lower piece ends.  It ends where what is below the group ends, or
        # above that; so past its end in that leaf nothing shows anyway, and saying ZERO there would claim the leaf.
        below = below.resized(min(-(-lower.extents.size // LEAF_BYTES) * LEAF_BYTES, size), ABSENT)
    view = over(below, _named(upper.runs, size, places))
    shown = view.val != ABSENT
    start, length, val = view.at[shown], view.lengths[shown], view.val[shown]
    moved = upper.runs.copy()
    moved["pack"] += len(lower.packs)
    both = np.concatenate([lower.runs, moved])
    rows = np.zeros(len(start), RUN_ROW)
    data = val >= DATA
    rows[data] = both[val[data]]
    rows["skip"][data] += (start[data] - both["start"][val[data]].astype(np.int64)).astype(np.uint32)
    zero_row = data.copy()
    zero_row[data] = both["stored"][val[data]] == 0
    rows["skip"][zero_row] = 0
    rows["start"], rows["length"] = start, length
    return _Piece(
        extents_of(rows, upper.extents.size), rows, lower.packs + upper.packs, leaves_over(lower.leaves, upper.leaves)
    )


def _ends_touched(lower: _Piece, upper: _Piece) -> bool:
    """Whether one of them speaks of the leaf inside which the lower one ends; true where it ends with a leaf."""
    first = lower.extents.size // LEAF_BYTES * LEAF_BYTES
    stop = min(first + LEAF_BYTES, upper.extents.size)
    parts = lower.extents.window(first, lower.extents.size), upper.extents.window(first, stop)
    return first == lower.extents.size or any(bool((part.val != ABSENT).any()) for part in parts)


def _named(runs: Rows, size: int, base: int) -> Extents:
    """A map whose values are the places of the runs, so that composing tells which run shows; zero runs included."""
    if not size:
        return Extents.absent(0)
    start = runs["start"].astype(np.int64)
    length = runs["length"].astype(np.int64)
    count = len(runs)
    at = np.empty(2 * count + 1, np.int64)
    val = np.empty(2 * count + 1, np.int64)
    at[0], val[0] = 0, ABSENT
    at[1::2], at[2::2] = start, start + length
    val[1::2] = np.arange(base, base + count)
    val[2::2] = ABSENT
    real = np.append(np.diff(at) > 0, at[-1] < size)
    return Extents.from_starts(size, at[real], val[real])


def _cut(runs: Rows, first: int, stop: int) -> Rows:
    """Runs cut to [first, stop)."""
    start = runs["start"].astype(np.int64)
    end = start + runs["length"].astype(np.int64)
    begin = np.maximum(start, first)
    cut = runs.copy()
    cut["skip"] += np.where(runs["stored"] != 0, begin - start, 0).astype(np.uint32)
    cut["start"], cut["length"] = begin, np.minimum(end, stop) - begin
    return cut


def _shifted(runs: Rows, first: int) -> Rows:
    moved = runs.copy()
    moved["start"] -= np.uint64(first)
    return moved


def _prove(group: Sequence[StoredLayer], piece: _Piece, first: int, stop: int, *, root: bool) -> None:
    """Raises Corrupt unless the composed window shows, leaf by leaf, what walking the layers shows.

    And unless it leaves the same leaves to what is below; below a root there is nothing.
    """
    index, hashes, left = leaves_said(group, first, stop)
    found = piece.leaves
    at = np.arange(first, first + piece.extents.size, LEAF_BYTES) - first
    said = rounded(piece.extents, LEAF_BYTES).values_at(at) == DATA if len(at) else np.empty(0, np.bool_)
    same = (
        np.array_equal(found.index + first // LEAF_BYTES, index)
        and np.array_equal(found.hashes, hashes)
        and (root or np.array_equal(said, ~left[: len(at)]))
    )
    if not same:
        raise Corrupt(
            f"the merged layer would not show what the layers show between {first} and {stop}; nothing was changed",
            subject=layer_name(group[-1].id),
            hint="snapchain verify tells whether the layers are sound; if they are, this is a bug",
        )


def _page_loads(piece: _Piece, first: int) -> Iterator[tuple[Rows, Rows]]:
    """The window's runs and leaves with guest offsets; cut between leaves into no more than a page takes."""
    runs = piece.runs.copy()
    runs["start"] += np.uint64(first)
    leaves = np.zeros(len(piece.leaves.index), LEAF_ROW)
    leaves["index"] = piece.leaves.index + first // LEAF_BYTES
    leaves["hash"] = piece.leaves.hashes
    begin = runs["start"].astype(np.int64)
    end = begin + runs["length"].astype(np.int64)
    index = leaves["index"].astype(np.int64) * LEAF_BYTES
    cuts = np.union1d(begin[::PAGE_RUNS] // LEAF_BYTES * LEAF_BYTES, index[::PAGE_LEAVES])
    stops = np.append(cuts[1:], end[-1:])
    for at, stop in zip(cuts.tolist(), stops.tolist(), strict=True):
        inside = runs[np.searchsorted(end, at, side="right") : np.searchsorted(begin, stop)]
        yield _cut(inside, at, stop), leaves[np.searchsorted(index, at) : np.searchsorted(index, stop)]
