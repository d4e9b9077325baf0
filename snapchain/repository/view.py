"""What a chain of stored layers shows: a disk that can be read at any offset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from snapchain.model.extents import DATA, Extents, Int64s
from snapchain.repository.blobs import BlobReader
from snapchain.repository.layers import StoredLayer, resolve
from snapchain.repository.packs import Location
from snapchain.repository.pages import Page

_Copies = list[tuple[int, int, int]]
"""(offset in the buffer, offset in the blob, length) of each piece that is copied."""


class ChainView:
    """The disk that ends in the last of `layers` (root first). Thread-safe.

    extents: the composed map; a DATA value is the place of the owning layer
    """

    def __init__(self, layers: Sequence[StoredLayer], blobs: BlobReader, extents: Extents | None = None) -> None:
        self.layers = tuple(layers)
        self.extents = resolve(layers) if extents is None else extents
        self._blobs = blobs

    @property
    def size(self) -> int:
        """Virtual size, bytes."""
        return self.layers[-1].size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """The guest-visible bytes of [offset, offset + len(buffer)).

        Raises Corrupt naming the pack when a blob is missing or damaged.
        """
        window = self.extents.window(offset, offset + len(buffer))
        ends = window.ends
        empty = window.val < DATA
        for start, stop in zip(window.at[empty].tolist(), ends[empty].tolist(), strict=True):
            buffer[start:stop] = bytes(stop - start)
        copies: dict[Location, tuple[bytes, _Copies]] = {}
        for owner in np.unique(window.val[~empty]).tolist():
            mine = window.val == owner
            first, stop = window.at[mine] + offset, ends[mine] + offset
            for page in self.layers[owner].pages(int(first[0]), int(stop[-1])):
                for blob, where, found in _pieces(page, first, stop, offset):
                    copies.setdefault(where, (blob, []))[1].extend(found)
        wanted = [(blob, where) for where, (blob, _) in copies.items()]
        for at, plain in self._blobs.read_all(wanted):
            view = memoryview(plain)
            for begin, skip, length in copies[wanted[at][1]][1]:
                buffer[begin : begin + length] = view[skip : skip + length]


def _pieces(page: Page, first: Int64s, stop: Int64s, base: int) -> Iterator[tuple[bytes, Location, _Copies]]:
    """What a page's blobs give to some guest ranges, and where in a buffer that begins at `base` it goes.

    first, stop: int64[n], ascending, apart.  A blob comes once for each stretch of neighbouring runs that are of it.
    """
    rows = page.between(int(first[0]), int(stop[-1]))
    rows = rows[rows["stored"] != 0]
    start = rows["start"].astype(np.int64)
    end = start + rows["length"].astype(np.int64)
    # Every pair of a run and a range that meet: each run meets `count` ranges, from number `lowest` on.
    lowest = np.searchsorted(stop, start, side="right")
    count = np.maximum(np.searchsorted(first, end, side="left") - lowest, 0)
    if not count.any():
        return
    run = np.repeat(np.arange(len(rows)), count)
    place = np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count) + lowest[run]
    begin = np.maximum(start[run], first[place])
    length = np.minimum(end[run], stop[place]) - begin
    skip = begin - start[run] + rows["skip"][run]
    begin -= base
    pack, blob = rows["pack"][run], rows["offset"][run]
    fresh = (pack[1:] != pack[:-1]) | (blob[1:] != blob[:-1])
    cuts = [0, *(np.flatnonzero(fresh) + 1).tolist(), len(run)]
    pieces: _Copies = list(zip(begin.tolist(), skip.tolist(), length.tolist(), strict=True))
    for cut, following in pairwise(cuts):
        row = rows[run[cut]]
        where = Location(page.packs[int(row["pack"])], int(row["offset"]), int(row["stored"]), int(row["raw"]))
        yield row["id"].tobytes(), where, pieces[cut:following]
