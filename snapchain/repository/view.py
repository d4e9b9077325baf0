"""What a chain of stored layers shows: a disk that can be read at any offset."""

from __future__ import annotations

from collections.abc import Sequence

from snapchain.model.extents import DATA, Extents
from snapchain.repository.blobs import BlobReader
from snapchain.repository.layers import StoredLayer, resolve
from snapchain.repository.packs import Location


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
        stop = offset + len(buffer)
        window = self.extents.window(offset, stop)
        wanted: dict[bytes, Location] = {}
        copies: dict[bytes, list[tuple[int, int, int]]] = {}
        for start, length, owner in window.runs():
            if owner < DATA:
                buffer[start : start + length] = bytes(length)
                continue
            self._collect(owner, offset + start, offset + start + length, offset, wanted, copies)
        blobs = list(wanted.items())
        for at, plain in self._blobs.read_all(blobs):
            for begin, skip, length in copies[blobs[at][0]]:
                buffer[begin : begin + length] = plain[skip : skip + length]

    def _collect(
        self,
        owner: int,
        first: int,
        stop: int,
        base: int,
        wanted: dict[bytes, Location],
        copies: dict[bytes, list[tuple[int, int, int]]],
    ) -> None:
        """Note which blobs give [first, stop) of one layer, and where in the buffer their bytes go."""
        for page in self.layers[owner].pages(first, stop):
            rows = page.between(first, stop)
            for row in rows[rows["stored"] != 0].tolist():
                start, length, blob_list, pack, at, stored, raw, skip = row
                blob = bytes(blob_list)
                begin, end = max(start, first), min(start + length, stop)
                wanted.setdefault(blob, Location(page.packs[pack], at, stored, raw))
                copies.setdefault(blob, []).append((begin - base, skip + begin - start, end - begin))
