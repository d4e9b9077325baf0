"""`base:allocation`: which ranges of an export hold data, which were written as zeroes, which were never written."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from snapchain.model.extents import ABSENT, DATA, Extents

HOLE, ZERO = 1, 2
MOST_RUNS = 8192
"""Of one reply: 64 KiB. The client asks again for the rest."""


def block_status(extents: Extents, offset: int, length: int, *, only_one: bool = False) -> npt.NDArray[np.uint32]:
    """uint32[n, 2], n > 0: length and flags of the runs from `offset` on, neighbours with equal flags joined.

    They end where the range ends, or before it. only_one: the first of them. length: 1 to 2**32 - 1, inside the map.
    """
    stop = offset + length
    first = int(extents.at.searchsorted(offset, side="right")) - 1
    after = min(int(extents.at.searchsorted(stop, side="left")), first + MOST_RUNS)
    values = extents.val[first:after]
    flags = np.where(values >= DATA, 0, np.where(values == ABSENT, HOLE | ZERO, ZERO)).astype(np.uint32)
    end = stop if after == len(extents.at) else min(stop, int(extents.at[after]))
    starts = np.maximum(extents.at[first:after], offset)
    fresh = np.append(True, flags[1:] != flags[:-1])
    starts, flags = starts[fresh], flags[fresh]
    found = np.stack([np.diff(starts, append=end).astype(np.uint32), flags], axis=1)
    return found[:1] if only_one else found
