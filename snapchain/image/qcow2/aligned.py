"""Rounding a layer's map out to whole clusters, so that a file of another cluster size can hold it.

A layer made with clusters of 4 KiB, or with subclusters, or a raw file's map by sectors, goes into clusters of 64 KiB.
The added bytes must not change the content of the stack, so they come from the view through this layer.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, covering, fold, where


def aligned(extents: Extents, resolved: Extents, *, cluster_size: int) -> Extents:
    """A layer's map rounded out to whole clusters, so that the stack still reads the same.

    A cluster with any DATA becomes DATA; one that is all ZERO or all ABSENT stays so; one that mixes ZERO and ABSENT
    becomes ZERO where `resolved`, the stack as seen through this layer, reads zeroes all over it, else DATA.
    The bytes of a DATA cluster are those of the composed view, not of the layer alone.  The last cluster counts as
    far as the size reaches.  Both maps have one size (ValueError).
    """
    if extents.size != resolved.size:
        raise ValueError(f"a layer of {extents.size} bytes cannot be seen through {resolved.size} bytes")
    kinds = extents.mapped(np.clip(extents.val, ABSENT, DATA))
    if not (kinds.at % cluster_size).any():
        return kinds
    zero = _touched(kinds, kinds.val == ZERO, cluster_size)
    data = _touched(kinds, kinds.val == DATA, cluster_size)
    not_zero = _touched(resolved, resolved.val >= DATA, cluster_size)
    mixed = where(not_zero, zero)  # where all is ZERO, no lower data shows
    return fold((zero.mapped(np.where(zero.val == DATA, ZERO, ABSENT)), mixed, data))


def _touched(extents: Extents, mask: npt.NDArray[np.bool_], grain: int) -> Extents:
    """DATA on every cell of `grain` bytes in which a chosen run has a byte."""
    first = extents.at[mask] // grain * grain
    return covering(extents.size, first, np.minimum(-(-extents.ends[mask] // grain) * grain, extents.size))
