"""Merges neighbouring layers inside the repository: a change of records that moves no guest data.

The pages of the layers are swept in guest order.  A page that no other layer touches goes into the new record as it is,
unread; where pages of several layers meet, their runs are composed in windows and written as new pages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from snapchain.errors import Corrupt
from snapchain.model.content import LEAF_BYTES
from snapchain.model.extents import Int64s
from snapchain.repository import layers as records
from snapchain.repository.format import LEAF_ROW, PAGE_ROW, RUN_ROW, fresh_id, layer_name
from snapchain.repository.ingest import store_page
from snapchain.repository.layers import LayerHeader, StoredLayer, leaves_said, put_ranges
from snapchain.repository.packer import Packer
from snapchain.repository.pages import PAGE_LEAVES, PAGE_RUNS, Page, PageBuilder, Rows
from snapchain.repository.repository import Repository

_WINDOW = 2 * 1024 * 1024
"""Bytes of pages that are composed at a time."""
_WIDEST = 64 * 1024 * 1024 * 1024
"""Guest bytes that are composed at a time, however little is said of them: leaves are laid out in memory."""
_WORKERS = 2
_AHEAD = 3
"""Windows that are composed while the one before them is stored."""
_READERS = 8
"""Pages are small: on object storage the wait is for the network."""


class NotProven(Corrupt):
    """The merged layer would differ from its inputs: no damage to work around, but a reason to stop."""


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


def merge_layers(repository: Repository, group: Sequence[StoredLayer], packer: Packer, *, root: bool) -> StoredLayer:
    """One layer instead of `group` (neighbours, lower first); it shows what the uppermost one shows.

    root: nothing lies below the group, so zeroes need not be said.  Durable and complete on return.
    """
    top = group[-1]
    builder = PageBuilder()
    table: list[Rows] = [np.empty(0, PAGE_ROW)]

    def flush() -> None:
        table.append(store_page(builder, keys=repository.keys, packer=packer))

    with closing(_content(group, root=root)) as content:
        for item in content:
            if not isinstance(item, Piece):
                flush()
                table.append(np.array([item], PAGE_ROW))
                continue
            for runs, leaves in _page_loads(item):
                builder.add(runs, item.packs, leaves)
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


def _content(group: Sequence[StoredLayer], *, root: bool) -> Generator[np.void | Piece]:
    """The merged layer in guest order: pages that stay, and windows composed anew, some of them ahead of the caller."""
    pending: deque[np.void | Future[Piece]] = deque()
    with ExitStack() as stack:
        readers, workers = ThreadPoolExecutor(_READERS, "pages"), ThreadPoolExecutor(_WORKERS, "merge")
        for pool in (readers, workers):
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        for stretch in _stretches(group):
            if stretch.page is not None:
                pending.append(stretch.page)
                continue
            for first, stop in stretch.windows():
                read = [
                    (layer, readers.submit(layer.pages, first, min(stop, layer.size)) if first < layer.size else None)
                    for layer in group
                ]
                pending.append(workers.submit(_composed, read, first, stop, root=root))
                if sum(isinstance(item, Future) for item in pending) > _AHEAD:
                    yield from _ready(pending)
        while pending:
            yield from _ready(pending)


def _ready(pending: deque[np.void | Future[Piece]]) -> Iterator[np.void | Piece]:
    """What comes next, up to the first window, which is waited for."""
    while pending:
        item = pending.popleft()
        if isinstance(item, Future):
            yield item.result()
            return
        yield item


def _composed(
    read: Sequence[tuple[StoredLayer, Future[Sequence[Page]] | None]], first: int, stop: int, *, root: bool
) -> Piece:
    parts = [Part(layer.size, [] if pages is None else pages.result()) for layer, pages in read]
    piece = compose(parts, first, stop, root=root)
    _prove(parts, piece, first, stop, root=root, subject=layer_name(read[-1][0].id))
    return piece


def _prove(group: Sequence[Part], piece: Piece, first: int, stop: int, *, root: bool, subject: str) -> None:
    """Raises NotProven unless the composed window shows, leaf by leaf, what walking the layers shows.

    And unless it leaves the same leaves to what is below; below a root there is nothing.
    """
    index, hashes, left = leaves_said(group, first, min(stop, group[-1].size))
    same = (
        np.array_equal(piece.leaves["index"].astype(np.int64), index)
        and np.array_equal(piece.leaves["hash"], hashes)
        and (root or np.array_equal(piece.touches(first // LEAF_BYTES, len(left)), ~left))
    )
    if not same:
        raise NotProven(
            f"the merged layer would not show what the layers show between {first} and {stop}; nothing was changed",
            subject=subject,
            hint="snapchain verify tells whether the layers are sound; if they are, this is a bug",
        )


def _page_loads(piece: Piece) -> Iterator[tuple[Rows, Rows]]:
    """The window's runs and leaves, cut between leaves into no more than a page takes."""
    runs, leaves = piece.runs, piece.leaves
    begin = runs["start"].astype(np.int64)
    end = begin + runs["length"].astype(np.int64)
    index = leaves["index"].astype(np.int64) * LEAF_BYTES
    cuts = np.union1d(begin[::PAGE_RUNS] // LEAF_BYTES * LEAF_BYTES, index[::PAGE_LEAVES])
    stops = np.append(cuts[1:], end[-1:])
    for at, stop in zip(cuts.tolist(), stops.tolist(), strict=True):
        inside = runs[np.searchsorted(end, at, side="right") : np.searchsorted(begin, stop)]
        yield _cut(inside, at, stop), leaves[np.searchsorted(index, at) : np.searchsorted(index, stop)]


def _cut(runs: Rows, first: int, stop: int) -> Rows:
    """Runs cut to [first, stop)."""
    start = runs["start"].astype(np.int64)
    end = start + runs["length"].astype(np.int64)
    begin = np.maximum(start, first)
    cut = runs.copy()
    cut["skip"] += np.where(runs["stored"] != 0, begin - start, 0).astype(np.uint32)
    cut["start"], cut["length"] = begin, np.minimum(end, stop) - begin
    return cut


# --- What neighbouring layers together say of a window of the disk: runs, and hashes of leaves; all layers at once.
#
# the runs of all layers, lowest first, and where a layer ends before the uppermost one does, a ZERO run from there on
# -> `uppermost` says which run shows where -> runs cut to where they show
# the leaves that each run reaches into      -> the topmost layer that touches a leaf says its hash

_NOBODY = -1
"""Owner of the ZERO past the end of a shorter layer."""


@dataclass(frozen=True, slots=True)
class Part:
    """One layer's part of a window. size: of the whole layer; held: its pages that speak of the window, ascending."""

    size: int
    held: Sequence[Page]

    def each_page(self, _first: int, _stop: int) -> Sequence[Page]:
        """As a layer gives them; what is asked for lies in the window."""
        return self.held


@dataclass(frozen=True, slots=True)
class Piece:
    """What layers say of a window. runs: RUN_ROWs, their column `pack` a place in `packs`; leaves: LEAF_ROWs."""

    runs: Rows
    packs: Sequence[str]
    leaves: Rows

    def touches(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """For each of `count` leaves from leaf `first` on, whether a run reaches into it."""
        start = self.runs["start"].astype(np.int64)
        stop = start + self.runs["length"].astype(np.int64)
        reached = np.zeros(count, np.bool_)
        put_ranges(reached, start // LEAF_BYTES - first, -(-stop // LEAF_BYTES) - first, value=True)
        return reached


@dataclass(frozen=True, slots=True)
class _Stack:
    """The runs of all layers in one window, lowest layer first, and the ZERO runs that hide what ended.

    rows: RUN_ROWs; start, stop: int64[n], cut to the window; owner: int64[n], place of the layer, or _NOBODY
    """

    rows: Rows
    start: Int64s
    stop: Int64s
    owner: Int64s


def compose(layers: Sequence[Part], first: int, stop: int, *, root: bool) -> Piece:
    """What `layers` (neighbours, lowest first) say of [first, stop), whole leaves; no run reaches out of it.

    root: nothing lies below them, so ZERO need not be said.
    """
    packs: dict[str, int] = {}
    stop = min(stop, layers[-1].size)
    stack = _stacked(layers, first, stop, packs)
    runs = _shown(stack)
    if root:
        runs = runs[runs["stored"] != 0]
    return Piece(runs, list(packs), _leaves(layers, stack, first, stop))


def _stacked(layers: Sequence[Part], first: int, stop: int, packs: dict[str, int]) -> _Stack:
    rows: list[Rows] = [np.empty(0, RUN_ROW)]
    owners: list[Int64s] = [np.empty(0, np.int64)]
    ends: dict[int, int] = {}
    for place, layer in enumerate(layers):
        for page in layer.held:
            rows.append(_named(page, page.places(first, min(stop, layer.size)), packs))
            owners.append(np.full(len(rows[-1]), place))
        if layer.size < stop:
            ends[sum(map(len, owners))] = layer.size
            rows.append(np.zeros(1, RUN_ROW))
            owners.append(np.full(1, _NOBODY))
    every, owner = np.concatenate(rows), np.concatenate(owners)
    start = every["start"].astype(np.int64)
    end = start + every["length"].astype(np.int64)
    for at, size in ends.items():
        leaf = size // LEAF_BYTES * LEAF_BYTES
        reached = (owner != _NOBODY) & (start < leaf + LEAF_BYTES) & (end > leaf)
        # Where nobody here knows the leaf in which the layer ends: it ends where what is below all of them ends, or
        # above that; so past its end in that leaf nothing shows anyway, and saying ZERO there would claim the leaf.
        start[at] = size if size % LEAF_BYTES == 0 or reached.any() else leaf + LEAF_BYTES
        end[at] = stop
    start, end = np.maximum(start, first), np.minimum(end, stop)
    stay = start < end
    return _Stack(every[stay], start[stay], end[stay], owner[stay])


def _named(page: Page, where: slice, packs: dict[str, int]) -> Rows:
    """Runs of a page, their packs as places in `packs`."""
    rows = page.runs[where].copy()
    data = rows["stored"] != 0
    used, place = np.unique(rows["pack"][data], return_inverse=True)
    table = [packs.setdefault(page.packs[pack], len(packs)) for pack in used.tolist()]
    rows["pack"][data] = np.array(table, np.uint32)[place]
    return rows


def _shown(stack: _Stack) -> Rows:
    """Each run where it shows, and ZERO in as few runs as can be."""
    edges, top = uppermost(stack.start, stack.stop)
    zero = (stack.rows["stored"] == 0)[top]
    label = np.where((top >= 0) & zero, -2, top)
    fresh = np.append(True, label[1:] != label[:-1])[: len(label)]
    begin = np.flatnonzero(fresh)
    end = np.append(begin[1:], len(label))[: len(begin)]
    said = label[begin] != -1
    begin, end = begin[said], end[said]
    rows = np.zeros(len(begin), RUN_ROW)
    data = label[begin] >= 0
    run = top[begin[data]]
    rows[data] = stack.rows[run]
    rows["skip"][data] += (edges[begin[data]] - stack.rows["start"][run].astype(np.int64)).astype(np.uint32)
    rows["start"], rows["length"] = edges[begin], edges[end] - edges[begin]
    return rows


def _leaves(layers: Sequence[Part], stack: _Stack, first: int, stop: int) -> Rows:
    """The leaves whose hash is said by the topmost layer that touches them."""
    begin, end = stack.start // LEAF_BYTES, -(-stack.stop // LEAF_BYTES)
    # Past the end of a shorter layer nothing of those below it shows; the leaf in which it ends is its own.
    begin = np.where(stack.owner == _NOBODY, -(-stack.start // LEAF_BYTES), begin)
    some = begin < end
    edges, top = uppermost(begin[some], end[some])
    owner = stack.owner[some]
    found: list[Rows] = [np.empty(0, LEAF_ROW)]
    for place, layer in enumerate(layers):
        inside = -(-first // LEAF_BYTES), -(-min(stop, layer.size) // LEAF_BYTES)
        for page in layer.held:
            low, high = page.index.searchsorted(inside).tolist()
            if low < high:
                piece = edges.searchsorted(page.index[low:high], side="right") - 1
                found.append(page.leaves[low:high][owner[top[piece]] == place])
    leaves = np.concatenate(found)
    return leaves[np.argsort(leaves["index"], kind="stable")]


# --- Which of many overlapping ranges lies on top, at every place: the whole stack at once, not layer by layer.
#
# Composing k layers one after the other looks at the lowest k times.  Here each range is painted once, over one or two
# blocks of 2^j neighbouring pieces, and the blocks are halved from the largest down to single pieces: n + m log m steps
# for n ranges that meet in m pieces, all of them numpy's, however the ranges lie.


def uppermost(start: Int64s, stop: Int64s) -> tuple[Int64s, Int64s]:
    """(edges, top): piece n is [edges[n], edges[n + 1]), and top[n] the last of the ranges that cover it, -1 for none.

    start, stop: int64[n], ranges in order from the lowest to the uppermost; none is empty.
    """
    edges = np.sort(np.concatenate([start, stop]), kind="stable")
    edges = edges[np.append(True, edges[1:] != edges[:-1])[: len(edges)]]
    first, end = np.searchsorted(edges, start), np.searchsorted(edges, stop)
    pieces = max(0, len(edges) - 1)
    top = np.full(pieces, -1, np.int64)
    if not pieces:
        return edges, top
    level = np.frexp((end - first).astype(np.float64))[1] - 1
    for at in range(int(level.max()), -1, -1):
        half = 1 << at
        # What lies on a block of twice the length lies on both of its halves.
        lower = top.copy()
        np.maximum(top[half:], lower[:-half], out=top[half:])
        mine = np.flatnonzero(level == at)
        np.maximum.at(top, first[mine], mine)
        np.maximum.at(top, end[mine] - half, mine)
    return edges, top
