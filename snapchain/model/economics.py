"""What merging a range of layers frees, moves and needs, before anything moves.

A byte of DATA in layer k is seen through k+1, k+2, ... until some layer m holds something else there, or ends
below it.  Then m hides it.  How many bytes of each k are hidden first by each m decides every range at once:

    merge of [first, last]   frees what is hidden by a layer inside the range, and keeps the rest

All numbers are guest bytes, exact.  Bytes of files differ: clusters are whole, and some are compressed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from snapchain.model.chain import Chain
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, Int64s, blocks, over


class Into(Enum):
    """Where the merged layer comes to be."""

    NEW = "new"  # a new file beside all inputs
    UPPER = "upper"  # the range's upper layer absorbs what shows through it
    LOWER = "lower"  # the upper layers are committed into the range's lowest one


@dataclass(frozen=True, slots=True, eq=False)
class RangeGains:
    """Every range of a chain of n layers at once: [first, last], 0 where first >= last.

    freed: int64[n, n], bytes that a merge of the range frees
    moved: int64[n, n] for each way, bytes that it moves
    """

    freed: Int64s
    moved: dict[Into, Int64s]


def gains_of(hidden: Int64s) -> RangeGains:
    """What merging each range of a chain frees and moves, for a planner that chooses among them.

    hidden: as `hidden_by` gives it
    """
    count = len(hidden)
    # survivors[k, last]: DATA of k that no layer up to `last` hides.
    survivors = np.cumsum(hidden[:, ::-1], axis=1)[:, ::-1][:, 1:]
    held = hidden.sum(axis=1)
    # Summed over k from the top down: [first, last] then counts the layers from `first` on, and those above `last`.
    above = np.cumsum(survivors[::-1], axis=0)[::-1]
    beyond = np.append(np.cumsum(held[::-1])[::-1], 0)
    # A layer above `last` is hidden by none up to `last`: what it holds counts as surviving, so is taken off.
    merged = above - beyond[1:][np.newaxis, :]
    before = beyond[:-1][:, np.newaxis] - beyond[1:][np.newaxis, :]
    ranges = np.triu(np.ones((count, count), np.int64), k=1)
    return RangeGains(
        freed=(before - merged) * ranges,
        moved={
            Into.NEW: merged * ranges,
            Into.UPPER: (merged - held[np.newaxis, :]) * ranges,
            Into.LOWER: (merged - survivors) * ranges,
        },
    )


def hidden_by(chain: Chain) -> Int64s:
    """int64[n, n + 1]: DATA bytes of layer k that layer m is the first to hide; in the last column what is visible.

    Halves of the chain are joined in pairs, so an extent is touched log(n) times: a half is known by what is
    uppermost in it (which DATA can still be hidden) and by what is lowest (which layer would hide what is below).
    Only the halves on the way to the current layer are held, and of them only what the next join asks for.
    """
    count = len(chain)
    size = max(layer.size for layer in chain.layers)
    hidden = np.zeros((count, count + 1), np.int64)
    _join(chain, 0, count, size, hidden, uppermost=False, lowest=False)
    hidden[:, -1] = chain.held().data - hidden[:, :-1].sum(axis=1)
    return hidden


def _join(
    chain: Chain, first: int, stop: int, size: int, hidden: Int64s, *, uppermost: bool, lowest: bool
) -> tuple[Extents | None, Extents | None]:
    """Count what layers [first, stop) hide of each other; what is uppermost and lowest in them, where asked for."""
    if stop - first == 1:
        own = chain.layers[first].extents.owned_by(first).resized(size, ZERO)
        if not lowest:
            return own, None
        covers = own.mapped(np.where(own.val == ABSENT, np.int64(ABSENT), np.int64(first)))
        return (own if uppermost else None), covers
    middle = (first + stop) // 2
    lower_top, lower_bottom = _join(chain, first, middle, size, hidden, uppermost=True, lowest=lowest)
    upper_top, upper_bottom = _join(chain, middle, stop, size, hidden, uppermost=uppermost, lowest=True)
    assert lower_top is not None
    assert upper_bottom is not None
    _count(hidden, lower_top, upper_bottom)
    joined_top = joined_bottom = None
    if uppermost:
        assert upper_top is not None
        joined_top = over(lower_top, upper_top)
    if lowest:
        assert lower_bottom is not None
        joined_bottom = over(upper_bottom, lower_bottom)
    return joined_top, joined_bottom


def _count(hidden: Int64s, owner: Extents, hider: Extents) -> None:
    """Add the bytes at which both maps name a layer. Block by block: the maps side by side may be larger than both."""
    columns = hidden.shape[1]
    flat = hidden.reshape(-1)
    end = owner.size
    before: tuple[int, int] | None = None  # the last run of the block before: its end is the start of this block
    for at, owners, hiders in blocks(owner, hider):
        if before is not None:
            start, cell = before
            if cell >= 0:
                flat[cell] += int(at[0]) - start
        both = (owners >= DATA) & (hiders >= DATA)
        cells = np.where(both, owners * columns + hiders, -1)
        lengths = np.diff(at)
        inside = both[:-1]
        # bincount adds floats: halves of 32 bits stay exact.
        for shift in (0, 32):
            part = (lengths[inside] >> shift) & 0xFFFFFFFF
            added = np.bincount(cells[:-1][inside], weights=part, minlength=0)
            flat[: len(added)] += added.astype(np.int64) << shift
        before = int(at[-1]), int(cells[-1])
    if before is not None and before[1] >= 0:
        flat[before[1]] += end - before[0]
