"""What each cell of the target has, and what it is to have; a cell is a cluster, or a subcluster.

    zero     it is to read as zeroes: an entry without a place (or, in the root, none at all)
    kept     it is stored plain already: what other files show in it is written over it (only for commit: the files
             above hide that until the switch)
    fresh    it is stored nowhere, or compressed: all of it is written, into a new cluster or into room that its
             cluster has already

Only clusters in which another input decides what is seen can change at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from snapchain.image.chain import ImageChain
from snapchain.image.file import ImageFile
from snapchain.image.physical import Int64s, Mask
from snapchain.image.qcow2.aligned import aligned
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, covering, pairwise, rounded, where

_ABSENT, _ZERO, _PLAIN, _PACKED = range(4)
"""What the target has in a cell."""


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Maps of the view's size: DATA for the chosen bytes, ABSENT for all others.

    changed: whole clusters whose entries change; fresh: cells to be filled; over: bytes to be written in cells that
    are kept; content: what the cells of changed clusters then are (ABSENT, ZERO, DATA)
    """

    changed: Extents
    fresh: Extents
    over: Extents
    content: Extents


def cells(view: ImageChain, target: int, merged: Extents, *, rooted: bool) -> Cells:
    """merged: all inputs composed, by owner; rooted: the result has no backing file."""
    file = view.files[target]
    assert file.header is not None
    size = file.cluster_size
    foreign = merged.mapped(np.where((merged.val == ABSENT) | (merged.val == target), ABSENT, DATA))
    wanted = where(aligned(merged, view.resolve(), cluster_size=file.grain), rounded(foreign, size))
    at, want, has = pairwise(wanted, _held(file, view.size))
    del wanted
    stop = np.append(at[1:], np.int64(view.size))[: len(at)]
    data, zero = want >= DATA, want == ZERO
    if file.header.version == 2 and not rooted:
        # Version 2 has no entry that reads as zeroes on a backing file: a cluster that is a hole of the file does.
        data, zero = data | zero, np.zeros(len(at), np.bool_)
    fresh, kept = data & (has != _PLAIN), data & (has == _PLAIN)
    new_zero = zero & (has != _ZERO) & ~((has == _ABSENT) & rooted)
    content = np.where(data, DATA, np.where(zero & (not rooted or has == _ZERO), ZERO, ABSENT)).astype(np.int64)

    def mask(chosen: Mask) -> Extents:
        return covering(view.size, at[chosen], stop[chosen])

    changes = fresh | new_zero
    head = at[changes] // size * size
    tail = np.minimum(-(-stop[changes] // size) * size, view.size)
    return Cells(
        covering(view.size, head, tail),
        mask(fresh),
        where(mask(kept), foreign),
        Extents(view.size, at, want).mapped(content),
    )


def _held(file: ImageFile, size: int) -> Extents:
    """What each cell has, up to another size; a last cell that is cut by the file's end counts as whole."""
    physical = file.physical
    if not len(physical):
        return Extents.constant(size, _ABSENT)
    kind = np.where(physical.stored > 0, _PACKED, np.where(physical.kind == DATA, _PLAIN, _ZERO))
    kind = np.where(physical.kind == ABSENT, _ABSENT, kind).astype(np.int64)
    held = Extents(physical.size, physical.start, kind).mapped(kind)
    return held.resized(min(end_of_last_cell(file), size), int(kind[-1])).resized(size, _ABSENT)


def end_of_last_cell(file: ImageFile) -> int:
    """Where the cell ends that the virtual size cuts; of compressed data all of the cluster."""
    physical = file.physical
    grain = file.cluster_size if len(physical) and physical.stored[-1] else file.grain
    return -(-file.size // grain) * grain


def cut(start: Int64s, length: Int64s, runs: tuple[Int64s, Int64s]) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """Ranges cut at the edges of runs (starts, stops), which hold all of them: (range, run, start, length) of each."""
    begins, ends = runs
    first = np.searchsorted(begins, start, side="right") - 1
    count = np.searchsorted(begins, start + length, side="left") - first
    row = np.repeat(np.arange(len(start)), count)
    run = first[row] + np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    at = np.maximum(begins[run], start[row])
    return row, run, at, np.minimum(ends[run], (start + length)[row]) - at
