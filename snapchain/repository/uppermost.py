"""Which of many overlapping ranges lies on top, at every place: the whole stack at once, not layer by layer.

Composing k layers one after the other looks at the lowest k times.  Here each range is painted once, over one or two
blocks of 2^j neighbouring pieces, and the blocks are halved from the largest down to single pieces: n + m log m steps
for n ranges that meet in m pieces, all of them numpy's, however the ranges lie.
"""

from __future__ import annotations

import numpy as np

from snapchain.model.extents import Int64s


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
