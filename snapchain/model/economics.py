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

from snapchain.errors import InvalidInput
from snapchain.model.chain import Chain
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, Int64s, fold, over, pairwise


class Into(Enum):
    """Where the merged layer comes to be."""

    NEW = "new"  # a new file beside all inputs
    UPPER = "upper"  # the range's upper layer absorbs what shows through it
    LOWER = "lower"  # the upper layers are committed into the range's lowest one


@dataclass(frozen=True, slots=True)
class Gain:
    """One merge in guest bytes.

    bytes_freed: held by the range before, less what the merged layer holds
    bytes_moved: DATA written to where it was not; sharing extents moves it at no cost
    peak_bytes:  space needed beside what the range already takes, until the inputs go
    """

    bytes_freed: int
    bytes_moved: int
    peak_bytes: int


def gain(chain: Chain, first: int, last: int, *, into: Into = Into.NEW) -> Gain:
    """What merging the layers at places `first` to `last`, both included, would give.

    Raises InvalidInput unless 0 <= first < last < len(chain).
    """
    if not 0 <= first < last < len(chain):
        raise InvalidInput(f"layers {first} to {last} are no range of a chain of {len(chain)}")
    maps = [layer.extents for layer in chain.layers[first : last + 1]]
    merged = fold(layer.owned_by(place) for place, layer in enumerate(maps))
    freed = sum(layer.data_bytes for layer in maps) - merged.data_bytes
    match into:
        case Into.NEW:
            moved = peak = merged.data_bytes
        case Into.UPPER:
            moved = peak = merged.data_bytes - maps[-1].data_bytes
        case Into.LOWER:
            moved = merged.bytes_where(merged.val > 0)
            # What is written over the lower layer's own DATA needs no new space.
            at, lower, result = pairwise(maps[0].resized(merged.size, ABSENT), merged)
            grown = (result > 0) & (lower != DATA)
            peak = int(np.diff(at, append=merged.size)[grown].sum())
    return Gain(freed, moved, peak)


@dataclass(frozen=True, slots=True, eq=False)
class RangeGains:
    """Every range of a chain of n layers at once: [first, last], 0 where first >= last.

    freed: int64[n, n], bytes that a merge of the range frees
    moved: int64[n, n] for each way, bytes that it moves
    """

    freed: Int64s
    moved: dict[Into, Int64s]


def range_gains(chain: Chain) -> RangeGains:
    """`gain` of all ranges, for a planner that chooses among them; without the peaks."""
    return gains_of(hidden_by(chain))


def gains_of(hidden: Int64s) -> RangeGains:
    """`range_gains` of a chain whose `hidden_by` is known."""
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
    """
    count = len(chain)
    size = max(layer.size for layer in chain.layers)
    hidden = np.zeros((count, count + 1), np.int64)
    row: list[tuple[Extents, Extents]] = []
    for place, layer in enumerate(chain.layers):
        reach = layer.extents.owned_by(place).resized(size, ZERO)
        row.append((reach, reach.mapped(np.where(reach.val == ABSENT, np.int64(ABSENT), np.int64(place)))))
    while len(row) > 1:
        joined = []
        for (uppermost, lowest), (above_uppermost, above_lowest) in zip(row[0::2], row[1::2], strict=False):
            _count(hidden, uppermost, above_lowest)
            joined.append((over(uppermost, above_uppermost), over(above_lowest, lowest)))
        row = joined + row[2 * len(joined) :]
    _count(hidden, row[0][0], Extents.constant(size, count))
    return hidden


def _count(hidden: Int64s, owner: Extents, hider: Extents) -> None:
    at, owners, hiders = pairwise(owner, hider)
    both = (owners >= DATA) & (hiders >= DATA)
    lengths = np.diff(at, append=owner.size)
    np.add.at(hidden, (owners[both], hiders[both]), lengths[both])
