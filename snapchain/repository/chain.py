"""What a chain of stored layers shows: a disk that can be read at any offset."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from snapchain.destination.reading import Part, StoredBlob
from snapchain.errors import Corrupt
from snapchain.host.shared_cache import SharedCache
from snapchain.model.extents import DATA, Extents, Int64s, over
from snapchain.repository.blobs import BlobReader
from snapchain.repository.format import layer_name
from snapchain.repository.layers import StoredLayer, resolve
from snapchain.repository.packs import Location
from snapchain.repository.pages import Page
from snapchain.repository.read_ahead import Get
from snapchain.repository.shared_blobs import read_shared

Target = tuple[int, int, int, int]
"""Number of a buffer, offset in it, offset in the blob, length."""


_RAW_SLACK = 1 << 30
_RAW_FOR_A_BYTE = 512
"""Each sector from another blob of 256 KiB. After many merges a leaf may be of many blobs; no disk is like that."""


class _Allowance:
    """How many bytes of blobs are unpacked for those that are read. A forged map has a blob of 4 MiB for each byte."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._lock = threading.Lock()
        self._left = _RAW_SLACK

    def spend(self, read: int, raw: int) -> None:
        """Raises Corrupt when unpacking `raw` bytes for `read` bytes is not plausible any more."""
        with self._lock:
            left = self._left + read * _RAW_FOR_A_BYTE - raw
            if left < 0:
                raise Corrupt(f"unpacking {raw} bytes to read {read} is not plausible", subject=self._subject)
            self._left = left


class ChainView:
    """The disk that ends in the last of `layers` (root first). Thread-safe.

    extents: the composed map; a DATA value is the place of the owning layer
    """

    def __init__(self, layers: Sequence[StoredLayer], blobs: BlobReader, extents: Extents | None = None) -> None:
        self.layers = tuple(layers)
        self.extents = resolve(layers) if extents is None else extents
        self._blobs = blobs
        self._allowance = _Allowance(layer_name(self.layers[-1].id))

    @property
    def size(self) -> int:
        """Virtual size, bytes."""
        return self.layers[-1].size

    def resolve(self) -> Extents:
        """The composed map."""
        return self.extents

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        """The guest-visible bytes of [offset, offset + len(buffer)).

        Raises Corrupt naming the pack when a blob is missing or damaged.
        """
        self.read_pieces([(offset, buffer)])

    def through(self, get: Get) -> ChainView:
        """The same view, which reads packs by another function."""
        other = copy.copy(self)
        other._blobs = self._blobs.through(get)  # noqa: SLF001 - the two are one thing
        return other

    def read_range(self, pack: str, offset: int, length: int) -> bytes | memoryview:
        """Stored bytes of a pack. Raises NotFound, Unavailable."""
        return self._blobs.read_range(pack, offset, length)

    def read_pieces(self, pieces: Sequence[tuple[int, memoryview]], /) -> None:
        """As `read_into` for several (offset, buffer), ascending and apart.

        What lies together in a pack is asked for together, and a page is looked at once.
        """
        empty, targets = self.sources([(offset, len(buffer)) for offset, buffer in pieces])
        for place, at, length in empty:
            pieces[place][1][at : at + length] = bytes(length)
        wanted = [(blob, where) for where, (blob, _) in targets.items()]
        for number, plain in self.blobs(wanted, shown=sum(len(buffer) for _, buffer in pieces)):
            view = memoryview(plain)
            for place, at, skip, length in targets[wanted[number][1]][1]:
                pieces[place][1][at : at + length] = view[skip : skip + length]

    def blobs(self, wanted: Sequence[tuple[bytes, Location]], *, shown: int) -> Iterator[tuple[int, bytes]]:
        """As `BlobReader.read_all`. shown: bytes that are read of them"""
        self._allowance.spend(shown, sum(where.raw for _, where in wanted))
        return self._blobs.read_all(wanted)

    def parts(self, start: int, stop: int) -> list[Part]:
        """As BlobDisk."""
        empty, targets = self.sources([(start, stop - start)])
        found = [Part(start + at, start + at + length) for _, at, length in empty]
        for where, (blob, pieces) in targets.items():
            stored = StoredBlob(blob, where.raw, (where.pack, where.offset, where.stored, where.raw))
            found += (Part(start + at, start + at + length, stored, skip) for _, at, skip, length in pieces)
        return sorted(found, key=lambda part: part.start)

    def load(self, blobs: Sequence[StoredBlob]) -> Iterator[tuple[StoredBlob, bytes]]:
        """As BlobDisk."""
        for place, plain in self._blobs.read_all([(blob.id, Location(*blob.where)) for blob in blobs]):
            yield blobs[place], plain

    def load_shared(self, blobs: Sequence[StoredBlob], cache: SharedCache) -> Iterator[tuple[StoredBlob, bytes]]:
        """As SharesBlobs."""
        wanted = [(blob.id, Location(*blob.where)) for blob in blobs]
        for place, plain in read_shared(self._blobs, cache, wanted):
            yield blobs[place], plain

    def locations(self, ranges: Sequence[tuple[int, int]]) -> list[Location]:
        """Where the blobs of some (offset, length) lie, ascending and apart."""
        return list(self.sources(ranges)[1])

    def sources(
        self, ranges: Sequence[tuple[int, int]]
    ) -> tuple[list[tuple[int, int, int]], dict[Location, tuple[bytes, list[Target]]]]:
        """(number of a range, offset in it, length) of what is zero; the blobs of the rest, and where each goes."""
        first = np.array([offset for offset, _ in ranges], np.int64)
        stop = first + np.array([length for _, length in ranges], np.int64)
        if not len(first):
            return [], {}
        window = self.extents.window(int(first[0]), int(stop[-1]))
        run, piece, begin, end = _meeting(window.at + first[0], window.ends + first[0], first, stop)
        owner = window.val[run]
        empty = owner < DATA
        blank = list(_lists(piece[empty], (begin - first[piece])[empty], (end - begin)[empty]))
        targets: dict[Location, tuple[bytes, list[Target]]] = {}
        for number in np.unique(owner[~empty]).tolist():
            mine = owner == number
            for page in self.layers[number].each_page(int(begin[mine][0]), int(end[mine][-1])):
                for blob, where, found in _parts(page, begin[mine], end[mine], piece[mine], first):
                    targets.setdefault(where, (blob, []))[1].extend(found)
        return blank, targets


class Composed:
    """The map of a chain, made from that of the chain below where that was asked for last: chains of many layers."""

    def __init__(self) -> None:
        self._last: tuple[list[str], Extents] = [], Extents.absent(0)

    def of(self, chain: Sequence[StoredLayer]) -> Extents:
        """As `layers.resolve`. chain: root first"""
        ids = [layer.id for layer in chain]
        known, view = self._last
        at = len(known) if ids[: len(known)] == known else 0
        for place in range(at, len(chain)):
            own = chain[place].extents().owned_by(place)
            view = over(view, own) if place else own
        self._last = ids, view
        return view


def _parts(
    page: Page, first: Int64s, stop: Int64s, piece: Int64s, base: Int64s
) -> Iterator[tuple[bytes, Location, list[Target]]]:
    """What a page's blobs give to some guest ranges.

    first, stop: int64[n], the ranges, ascending, apart; piece: which buffer each is of; base: where buffers begin.
    A blob comes once for each stretch of neighbouring runs that are of it.
    """
    near = page.places(int(first[0]), int(stop[-1]))
    run, place, begin, end = _meeting(page.start[near], page.stop[near], first, stop)
    if not len(run):
        return
    rows = page.runs[near][run]
    skip = begin - page.start[near][run] + rows["skip"]
    fresh = (rows["pack"][1:] != rows["pack"][:-1]) | (rows["offset"][1:] != rows["offset"][:-1])
    targets: list[Target] = list(_lists(piece[place], begin - base[piece[place]], skip, end - begin))
    cuts = [0, *(np.flatnonzero(fresh) + 1).tolist(), len(run)]
    blobs = rows[cuts[:-1]]
    ids = blobs["id"].tobytes()
    size = len(ids) // len(blobs)
    places = _lists(*(blobs[name] for name in ("pack", "offset", "stored", "raw")))
    for number, ((cut, following), (pack, offset, stored, raw)) in enumerate(zip(pairwise(cuts), places, strict=True)):
        where = Location(page.packs[pack], offset, stored, raw)
        yield ids[number * size : (number + 1) * size], where, targets[cut:following]


def _meeting(at: Int64s, end: Int64s, first: Int64s, stop: Int64s) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """Where two lists of ranges, each ascending and apart, meet: (place in one, in the other, start, stop) of each."""
    lowest = np.searchsorted(stop, at, side="right")
    count = np.maximum(np.searchsorted(first, end, side="left") - lowest, 0)
    one = np.repeat(np.arange(len(at)), count)
    other = np.arange(len(one)) - np.repeat(np.cumsum(count) - count, count) + lowest[one]
    return one, other, np.maximum(at[one], first[other]), np.minimum(end[one], stop[other])


def _lists(*columns: Int64s) -> Iterator[Any]:
    return zip(*(column.tolist() for column in columns), strict=True)
