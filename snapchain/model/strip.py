"""A layer as a strip of characters, one for each equal share of the disk: the chain drawn to scale.

    .  ABSENT: nothing here, the layer below answers
    0  ZERO
    #  DATA that a reader of the whole chain sees
    +  DATA that a layer above hides

A cell shows what fills most of it, but anything beats an absence: a lone cluster on a terabyte is seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, fold, pairwise

Float64s = npt.NDArray[np.float64]


def shares(extents: Extents, chosen: npt.NDArray[np.bool_], cells: int) -> Float64s:
    """float64[cells], 0 to 1: how much of each of `cells` equal parts of the map the chosen runs fill.

    chosen: bool, one for each run.
    """
    edges = np.arange(cells + 1, dtype=np.int64) * extents.size // cells
    before = np.concatenate([[0], np.cumsum(np.where(chosen, extents.lengths, 0))])
    run = np.clip(np.searchsorted(extents.at, edges, side="right") - 1, 0, len(extents) - 1)
    filled = before[run] + np.where(chosen[run], edges - extents.at[run], 0)
    return np.diff(filled) / np.maximum(np.diff(edges), 1)


def strips(layers: Sequence[Extents], cells: int) -> list[str]:
    """One strip for each layer, root first, each `cells` long and drawn to the largest layer's size."""
    size = max((layer.size for layer in layers), default=0)
    if size == 0:
        return ["." * cells for _ in layers]
    view = fold(layer.owned_by(place) for place, layer in enumerate(layers)).resized(size, ABSENT)
    return [_strip(layer.resized(size, ABSENT), view, place, cells) for place, layer in enumerate(layers)]


def _strip(layer: Extents, view: Extents, place: int, cells: int) -> str:
    at, own, seen = pairwise(layer, view)
    cut = Extents(layer.size, at, own)
    filled = np.stack(
        [
            shares(cut, (own >= DATA) & (seen == place), cells),
            shares(cut, (own >= DATA) & (seen != place), cells),
            shares(cut, own == ZERO, cells),
        ]
    )
    letters = np.array(list("#+0"))[filled.argmax(axis=0)]
    return "".join(np.where(filled.max(axis=0) > 0, letters, "."))
