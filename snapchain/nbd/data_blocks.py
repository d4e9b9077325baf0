"""The blocks of an export that hold data, numbered from 0, so that reading ahead jumps over holes.

block     0    1    2    3    4    5    6
        data data hole hole hole data data
number    0    1                   2    3
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from snapchain.model.extents import ABSENT, DATA, Extents, rounded


class DataBlocks:
    """Of one map. block: bytes"""

    def __init__(self, extents: Extents, block: int) -> None:
        held = rounded(extents.mapped(np.where(extents.val >= DATA, DATA, ABSENT)), block)
        is_data = held.val >= DATA
        self._first = held.at[is_data] // block
        self._stop = -(-held.ends[is_data] // block)
        lengths = self._stop - self._first
        self._before = np.cumsum(lengths) - lengths
        self.count = int(lengths.sum())

    def number(self, block: int) -> int:
        """How many blocks with data lie before a block."""
        run = int(self._first.searchsorted(block, side="right")) - 1
        if run < 0:
            return 0
        return int(self._before[run]) + min(block, int(self._stop[run])) - int(self._first[run])

    def runs(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """The blocks with numbers [first, stop), as ranges [begin, end) of blocks that follow each other."""
        stop = min(stop, self.count)
        while first < stop:
            run = int(self._before.searchsorted(first, side="right")) - 1
            skip = first - int(self._before[run])
            begin = int(self._first[run]) + skip
            some = min(stop - first, int(self._stop[run]) - begin)
            yield begin, begin + some
            first += some
