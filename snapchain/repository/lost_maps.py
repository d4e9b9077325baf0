"""Layers of which a part of the map is lost: read as zeroes there, and the ranges are named.

A page that cannot be read takes the map of its guest range with it: which bytes lie where, and which are zero. Layers
above may still hold a part of that range:

    top     |--data--|              |-page lost-|
    below      |-----page lost-----|  |--data--|
    lost             |-------------||-----------|
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from snapchain.errors import Corrupt
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, covering, over
from snapchain.repository.format import LEAF_ROW, RUN_ROW
from snapchain.repository.layers import PageSource, PageTable, StoredLayer
from snapchain.repository.pages import Page


class LostMap(NamedTuple):
    """Guest bytes [start, stop) that nothing tells of, and why."""

    start: int
    stop: int
    error: Corrupt


class TolerantPages:
    """A PageSource of one layer that shows a page that is lost as a run of zeroes. Thread-safe.

    lost: (start, stop) of such pages, and the error of each
    """

    def __init__(self, pages: PageSource) -> None:
        self._pages = pages
        self._lock = threading.Lock()
        self.lost: dict[tuple[int, int], Corrupt] = {}

    def get(self, rows: PageTable, size: int, *, subject: str) -> list[Page]:
        """As PageCache.get, and never raises Corrupt."""
        places = [(int(row["first"]), min(int(row["stop"]), size)) for row in rows]
        with self._lock:
            is_whole = self.lost.keys().isdisjoint(places)
        if is_whole:
            try:
                return self._pages.get(rows, size, subject=subject)
            except Corrupt as error:
                if len(rows) == 1:
                    with self._lock:
                        self.lost[places[0]] = error
        if len(rows) == 1:
            return [_zeroes(*places[0])]
        return [page for at in range(len(rows)) for page in self.get(rows[at : at + 1], size, subject=subject)]


def tolerant(layers: Sequence[StoredLayer]) -> tuple[list[StoredLayer], list[LostMap]]:
    """The layers of a chain, root first, to be read where a part of a map is lost, and which ranges these are.

    Reads all pages. The ranges ascend, and hold what no layer above a lost page shows.
    """
    found, view, errors = [], Extents.absent(0), list[dict[tuple[int, int], Corrupt]]()
    for layer in layers:
        pages = TolerantPages(layer.page_source)
        opened = StoredLayer(layer.header, layer.table, pages)
        shown = opened.extents()
        known = shown.mapped(np.where(shown.val == ABSENT, ABSENT, ZERO))
        ranges = np.array(sorted(pages.lost), np.int64).reshape(-1, 2)
        lost = covering(layer.size, ranges[:, 0], ranges[:, 1]).owned_by(len(errors))
        view = over(view, over(known, lost))
        errors.append(pages.lost)
        found.append(opened)
    return found, [
        LostMap(start, start + length, _error_at(errors[owner], start))
        for start, length, owner in view.runs()
        if owner >= DATA
    ]


def _error_at(errors: dict[tuple[int, int], Corrupt], offset: int) -> Corrupt:
    return next(error for (start, stop), error in errors.items() if start <= offset < stop)


def _zeroes(first: int, stop: int) -> Page:
    runs = np.zeros(1, RUN_ROW)
    runs["start"], runs["length"] = first, stop - first
    return Page(runs, np.empty(0, LEAF_ROW), ())
