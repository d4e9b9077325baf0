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

from snapchain.errors import Corrupt
from snapchain.model.content import LEAF_BYTES
from snapchain.repository import layers as records
from snapchain.repository.composing import Part, Piece, compose
from snapchain.repository.format import PAGE_ROW, fresh_id, layer_name
from snapchain.repository.ingest import store_page
from snapchain.repository.layers import LayerHeader, StoredLayer, leaves_said
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
