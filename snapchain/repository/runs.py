"""The runs of one task, collected in guest order: which guest bytes are ZERO, which are which bytes of which blob.

A run of a leaf or more is a blob of its own, cut at blocks, so that it is found again wherever it was seen before.
Shorter ones, as clusters of 4 KiB or the holes of a raw file leave them, share one blob for each block:

    guest   |--run--|    |-run-|  |--run--|    |     cut at multiples of the block size
    blob    |--run--|-run-|--run--|                  each run with its own `skip`

A blob for each would cost more in tags, rows and index entries than the data of the smallest clusters.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from snapchain.model.content import LEAF_BYTES
from snapchain.repository.format import ID_BYTES, RUN_ROW
from snapchain.repository.packs import Location
from snapchain.repository.pages import Rows

SCRAP_BYTES = LEAF_BYTES
"""Runs shorter than this share a blob with their neighbours in the block."""

Blob = tuple[bytes, Location]
_ZERO = -1


class RunList:
    """Takes runs in ascending order. Not thread-safe.

    block: bytes at whose multiples scraps part; store: puts the bytes of shared blobs away
    """

    def __init__(self, block: int, store: Callable[[memoryview], Blob]) -> None:
        self._block, self._store = block, store
        self._start: list[int] = []
        self._length: list[int] = []
        self._skip: list[int] = []
        self._number: list[int] = []  # which blob each run is of; _ZERO for none
        self._blobs: list[Blob | None] = []  # None: its scraps are still being collected
        self._scraps = bytearray()
        self._at = 0  # the block that they are in

    def zero(self, start: int, stop: int) -> None:
        """[start, stop) is ZERO."""
        if self._number and self._number[-1] == _ZERO and self._start[-1] + self._length[-1] == start:
            self._length[-1] += stop - start
        else:
            self._add(start, stop, _ZERO, 0)

    def data(self, start: int, stop: int, blob: Blob) -> None:
        """[start, stop) is this blob."""
        self._settle()
        self._blobs.append(blob)
        self._add(start, stop, len(self._blobs) - 1, 0)

    def scrap(self, start: int, stop: int, data: memoryview) -> None:
        """[start, stop), less than SCRAP_BYTES within one block, is this data; it is copied."""
        at = start // self._block
        if at != self._at or not self._scraps:
            self._settle()
            self._at = at
            self._blobs.append(None)
        self._add(start, stop, len(self._blobs) - 1, len(self._scraps))
        self._scraps += data

    def rows(self) -> tuple[Rows, list[str]]:
        """All runs as RUN_ROWs, and the table of packs that their column `pack` indexes."""
        self._settle()
        blobs = [blob for blob in self._blobs if blob is not None]
        packs: dict[str, int] = {}
        table = np.zeros(len(blobs) + 1, RUN_ROW)  # the last row is ZERO, at place -1
        if blobs:
            found = table[:-1]
            found["id"] = np.frombuffer(b"".join(blob for blob, _ in blobs), np.uint8).reshape(-1, ID_BYTES)
            found["pack"] = [packs.setdefault(where.pack, len(packs)) for _, where in blobs]
            found["offset"] = [where.offset for _, where in blobs]
            found["stored"] = [where.stored for _, where in blobs]
            found["raw"] = [where.raw for _, where in blobs]
        rows = table[np.array(self._number, np.intp)]
        rows["start"], rows["length"], rows["skip"] = self._start, self._length, self._skip
        return rows, list(packs)

    def _add(self, start: int, stop: int, number: int, skip: int) -> None:
        self._start.append(start)
        self._length.append(stop - start)
        self._number.append(number)
        self._skip.append(skip)

    def _settle(self) -> None:
        if self._scraps:
            self._blobs[-1] = self._store(memoryview(self._scraps))
            self._scraps = bytearray()
