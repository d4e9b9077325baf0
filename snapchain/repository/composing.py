"""What neighbouring layers together say of a window of the disk: runs, and hashes of leaves; all layers at once.

the runs of all layers, lowest first, and where a layer ends before the uppermost one does, a ZERO run from there on
-> uppermost.py says which run shows where -> runs cut to where they show
the leaves that each run reaches into      -> the topmost layer that touches a leaf says its hash
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snapchain.model.content import LEAF_BYTES
from snapchain.model.extents import Int64s
from snapchain.repository.format import LEAF_ROW, RUN_ROW
from snapchain.repository.layers import put_ranges
from snapchain.repository.pages import Page, Rows
from snapchain.repository.uppermost import uppermost

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
