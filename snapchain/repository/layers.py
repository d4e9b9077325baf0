"""Layer records: one sealed layer as the repository holds it.

An object layers/LAYER (kind L):

    u32     bytes of the header
            header, JSON: LayerHeader
            pages * PAGE_ROW, ascending, without overlap

The map itself lies in pages (pages.py), which are blobs.
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from snapchain.errors import Corrupt, NotFound
from snapchain.model.content import LEAF_BYTES, Sum, content_id, decode_sum
from snapchain.model.extents import ABSENT, Extents, Int64s, over
from snapchain.model.fingerprint import Fingerprint
from snapchain.objects.store import ObjectStore
from snapchain.repository.blobs import BlobReader
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import Many, StoredModel, made_by, parse as parse_stored, seal, unseal
from snapchain.repository.format import PAGE_ROW, is_id, layer_name
from snapchain.repository.packs import LARGEST_BLOB, Location
from snapchain.repository.pages import Page

KIND = b"L"
_LENGTH = struct.Struct("<I")
_LONGEST_HEADER = 16 * 1024 * 1024
_AHEAD_BYTES = 16 * 1024 * 1024
_AHEAD_PAGES = 256
_CACHED_BYTES = 64 * 1024 * 1024
LEAVES_AT_ONCE = 1 << 18
_PIECE = LEAVES_AT_ONCE * LEAF_BYTES
_LONGEST_PLAUSIBLE = 1 << 46
"""Bytes. More is not read or zeroed in pieces of one size: there may be so many that nobody sees their end."""
_DENSE_LEAVES = 1 << 20
_WIDE_RANGE = 64
"""Leaves. Longer ranges of flags are set one by one, shorter ones all at once."""
LARGEST_DISK = 1 << 56
"""Bytes. qcow2 with clusters of 2 MiB ends at 8 EiB; no signed offset may overflow with two of these added."""


class LayerHeader(StoredModel):
    """What a layer record says beside its map.

    What lies below it, the catalogue of its disk says, since a merge changes that.

    size: virtual size, bytes; name, image_format, cluster_size, compressed: of the file that it was read from;
    sources: the files that were composed into it, lower first; replaces: layers that were merged into it;
    content_sum: base64 of the LtHash16 sum of what the chain up to here shows; content_id follows from it and size
    made_by: the program that wrote it
    """

    format: Literal[1] = 1
    id: str
    size: int = Field(ge=0, le=LARGEST_DISK)
    time: datetime
    name: str
    image_format: Literal["qcow2", "raw"]
    cluster_size: int = Field(ge=512, le=2 * 1024 * 1024)
    sources: Many[Fingerprint] = ()
    replaces: Many[str] = ()
    data_bytes: int = Field(ge=0)
    zero_bytes: int = Field(ge=0)
    content_sum: str
    content_id: str
    made_by: str | None = None

    def sum(self) -> Sum:
        """uint16[1024]"""
        return decode_sum(self.content_sum)


PageTable = npt.NDArray[np.void]


def write(store: ObjectStore, keys: Keyring, header: LayerHeader, pages: PageTable) -> None:
    """Store a layer record; its pages are durable already."""
    text = header.model_copy(update={"made_by": made_by()}).model_dump_json().encode()
    name = layer_name(header.id)
    store.put(name, seal(keys, KIND, name, _LENGTH.pack(len(text)) + text + pages.tobytes()))


def read(store: ObjectStore, keys: Keyring, layer: str) -> tuple[LayerHeader, PageTable]:
    """A layer record, checked. Raises Corrupt when it is missing or unsound, Unsupported when it is newer."""
    name = layer_name(layer)
    if not is_id(layer):
        raise Corrupt("this is no layer id", subject=name)
    try:
        body = unseal(keys, KIND, name, store.get(name))
    except NotFound as error:
        raise Corrupt("the layer record is missing from the store", subject=name) from error
    try:
        (length,) = _LENGTH.unpack_from(body)
        if length > _LONGEST_HEADER:
            raise Corrupt(f"the layer record is unsound: a header of {length} bytes", subject=name)
        text = body[_LENGTH.size : _LENGTH.size + length]
        header = parse_stored(LayerHeader, text, what="the layer record", subject=name)
        pages = np.frombuffer(body, PAGE_ROW, offset=_LENGTH.size + length)
        header.sum()
    except (ValueError, struct.error) as error:
        raise Corrupt(f"the layer record is unsound: {error}", subject=name) from error
    stop = -(-header.size // LEAF_BYTES) * LEAF_BYTES
    sound = (
        header.id == layer
        and content_id(header.size, header.sum()) == header.content_id
        and bool((pages["first"] < pages["stop"]).all())
        and bool((pages["first"][1:] >= pages["stop"][:-1]).all())
        and (not len(pages) or int(pages["stop"][-1]) <= stop)
        and bool((pages["raw"] <= LARGEST_BLOB).all())
    )
    if not sound:
        raise Corrupt("the layer record contradicts itself", subject=name)
    return header, pages


class PageCache:
    """Decoded pages by blob id, least recently used out first. Thread-safe."""

    def __init__(self, reader: BlobReader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._pages: OrderedDict[tuple[bytes, int, int], tuple[Page, int]] = OrderedDict()
        self._bytes = 0

    def get(self, rows: PageTable, size: int, *, subject: str) -> list[Page]:
        """The pages of some PAGE_ROWs of a layer of `size` bytes; neighbours in a pack are read together."""
        # What a page may say depends on where it stands, so that is part of its key: it is checked for each.
        keys = [(bytes(row["id"]), int(row["first"]), min(int(row["stop"]), size)) for row in rows]
        found: dict[int, Page] = {}
        with self._lock:
            for at, key in enumerate(keys):
                kept = self._pages.get(key)
                if kept is not None:
                    self._pages.move_to_end(key)
                    found[at] = kept[0]
        missing = [at for at in range(len(keys)) if at not in found]
        try:
            for number, body in self._reader.read_all([(keys[at][0], page_location(rows[at])) for at in missing]):
                at = missing[number]
                found[at] = Page.decode(body, *keys[at][1:], subject=subject)
                self._keep(keys[at], found[at])
        except Corrupt as error:
            if len(missing) > 1:  # which of them it is
                return [self.get(rows[at : at + 1], size, subject=subject)[0] for at in range(len(keys))]
            _, first, stop = keys[missing[0]]
            raise Corrupt(
                f"guest bytes {first} to {stop} are lost, because the map of that range is damaged: {error.message}",
                subject=error.subject,
                hint="snapchain verify shows which points are affected",
            ) from error
        return [found[at] for at in range(len(keys))]

    def _keep(self, key: tuple[bytes, int, int], page: Page) -> None:
        with self._lock:
            if key not in self._pages:
                self._pages[key] = page, page.memory()
                self._bytes += page.memory()
                while self._bytes > _CACHED_BYTES and len(self._pages) > 1:
                    self._bytes -= self._pages.popitem(last=False)[1][1]


def page_location(row: np.void) -> Location:
    """Where the page of a PAGE_ROW lies."""
    return Location(bytes(row["pack"]).hex(), int(row["offset"]), int(row["stored"]), int(row["raw"]))


class PageSource(Protocol):
    """Gives the pages of a layer, as PageCache does. Thread-safe."""

    def get(self, rows: PageTable, size: int, *, subject: str) -> list[Page]: ...


class StoredLayer:
    """An opened layer record. Pages are loaded as they are asked for. Thread-safe."""

    def __init__(self, header: LayerHeader, pages: PageTable, cache: PageSource) -> None:
        self.header = header
        self.table = pages
        self._first = pages["first"].astype(np.int64)
        self._stop = pages["stop"].astype(np.int64)
        self._cache = cache

    @property
    def page_source(self) -> PageSource:
        return self._cache

    @property
    def id(self) -> str:
        return self.header.id

    @property
    def size(self) -> int:
        return self.header.size

    def pages(self, first: int, stop: int) -> Sequence[Page]:
        """The pages that speak of [first, stop), ascending; they may reach beyond it."""
        begin = int(np.searchsorted(self._stop, first, side="right"))
        end = int(np.searchsorted(self._first, stop, side="left"))
        subject = layer_name(self.id)
        return self._cache.get(self.table[begin:end], self.size, subject=subject)

    def each_page(self, first: int, stop: int) -> Iterator[Page]:
        """As `pages`, but no more of them at once than fit into _AHEAD_BYTES: the range may be any."""
        begin = int(np.searchsorted(self._stop, first, side="right"))
        end = int(np.searchsorted(self._first, stop, side="left"))
        raw = self.table["raw"].astype(np.int64)
        while begin < end:
            some = max(
                1, int(np.searchsorted(np.cumsum(raw[begin : begin + _AHEAD_PAGES]), _AHEAD_BYTES, side="right"))
            )
            yield from self._cache.get(
                self.table[begin : min(begin + some, end)], self.size, subject=layer_name(self.id)
            )
            begin += some

    def extents(self) -> Extents:
        """The whole map: DATA, ZERO, ABSENT. Reads all pages, keeps none."""
        at: list[npt.NDArray[np.int64]] = [np.zeros(1, np.int64)]
        val: list[npt.NDArray[np.int64]] = [np.full(1, ABSENT)]
        if not self.size:
            return Extents.absent(0)
        for place in range(len(self.table)):
            (page,) = self._cache.get(self.table[place : place + 1], self.size, subject=layer_name(self.id))
            first, stop = int(self._first[place]), min(int(self._stop[place]), self.size)
            piece = page.extents(self.size).window(first, stop)
            at.append(piece.at + first)
            val.append(piece.val)
            if stop < self.size:
                at.append(np.array([stop], np.int64))
                val.append(np.full(1, ABSENT))
        starts, values = np.concatenate(at), np.concatenate(val)
        # A page that begins where the last one ended overrides the gap that was put between them.
        last = np.append(starts[1:] > starts[:-1], True)
        return Extents.from_starts(self.size, starts[last], values[last])


class Speaks(Protocol):
    """A layer, or what matters of it to a range."""

    @property
    def size(self) -> int: ...

    def each_page(self, first: int, stop: int, /) -> Iterable[Page]: ...


def leaves_shown(
    layers: Sequence[StoredLayer], first: int, stop: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """The leaves of [first, stop) that a chain shows and that are not all zero: (leaf numbers ascending, hashes).

    layers: root first; first: a multiple of the leaf size.  Reads only pages of that range.
    Costs what the pages hold, where the range is long.
    """
    base, end = first // LEAF_BYTES, -(-stop // LEAF_BYTES)
    if end - base <= _DENSE_LEAVES:
        return leaves_said(layers, first, stop)[:2]
    recorded = [np.empty(0, np.int64)]
    for layer in layers:
        for page in layer.each_page(first, min(stop, layer.size)):
            begin, after = page.index.searchsorted((base, end)).tolist()
            recorded.append(page.index[begin:after])
    spots = np.unique(np.concatenate(recorded))
    return _leaves_said(layers, first, stop, len(spots), spots.searchsorted)[:2]


def bounded_ranges(layers: Sequence[StoredLayer], first: int, stop: int) -> Iterator[tuple[int, int]]:
    """[first, stop) in ranges in which each layer records no more than LEAVES_AT_ONCE leaves.

    Where a range is not longer than a disk can be, it is as long as that many leaves.
    """
    at = first
    while at < stop:
        end = min(stop, (at // _PIECE + 1) * _PIECE)
        if stop - at > _LONGEST_PLAUSIBLE:
            end = min((_full(layer, at, stop) for layer in layers), default=stop)
        yield at, end
        at = end


def _full(layer: StoredLayer, first: int, stop: int) -> int:
    """Where the range that begins at `first` has to end, so that a layer records LEAVES_AT_ONCE leaves in it."""
    left = LEAVES_AT_ONCE
    for page in layer.each_page(first, min(stop, layer.size)):
        number = page.index[page.index.searchsorted(first // LEAF_BYTES) :]
        if len(number) > left:
            return min(stop, int(number[left]) * LEAF_BYTES)
        left -= len(number)
    return stop


def leaves_said(
    layers: Sequence[Speaks], first: int, stop: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """As `leaves_shown`, and for each leaf of the range whether the layers leave it to what lies below them."""
    base = first // LEAF_BYTES
    return _leaves_said(layers, first, stop, max(0, -(-stop // LEAF_BYTES) - base), lambda number: number - base)


def _leaves_said(
    layers: Sequence[Speaks], first: int, stop: int, count: int, place: Callable[[Int64s], Int64s]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """As `leaves_said`, but only of `count` leaves of the range. place: of a leaf, how many of them are before it"""
    base = first // LEAF_BYTES
    end = max(base, -(-stop // LEAF_BYTES))
    stop = end * LEAF_BYTES  # a page that begins past `stop`, in its leaf, speaks of that leaf
    open_ = np.ones(count, np.bool_)
    index: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    hashes: list[npt.NDArray[np.uint8]] = [np.empty((0, 32), np.uint8)]
    for layer in reversed(layers):
        # Past its end a layer hides what is below it (the size law).
        open_[int(place(np.array([max(base, -(-layer.size // LEAF_BYTES))]))[0]) :] = False
        if not open_.any():
            break
        touched: list[tuple[Int64s, Int64s]] = []
        for page in layer.each_page(first, min(stop, layer.size)):
            here = slice(*page.index.searchsorted((base, end)).tolist())
            number = page.index[here]
            if len(number):
                shown = open_[place(number)]
                index.append(number[shown])
                hashes.append(page.leaves["hash"][here][shown])
            runs = page.places(first, stop)
            if runs.start < runs.stop:
                enters = place(np.maximum(page.start[runs] // LEAF_BYTES, base))
                leaves = place(np.minimum(-(-page.stop[runs] // LEAF_BYTES), end))
                touched.append((enters, leaves))
        # After all pages: one leaf may be touched by two of them.
        for enters, leaves in touched:
            put_ranges(open_, enters, leaves, value=False)
    numbers = np.concatenate(index)
    order = np.argsort(numbers, kind="stable")
    return numbers[order], np.concatenate(hashes)[order], open_


def put_ranges(flags: npt.NDArray[np.bool_], first: Int64s, stop: Int64s, *, value: bool) -> None:
    """Set the flags of some ranges; costs what they hold, not what they span."""
    length = stop - first
    wide = length > _WIDE_RANGE
    for low, high in zip(first[wide].tolist(), stop[wide].tolist(), strict=True):
        flags[low:high] = value
    first, length = first[~wide], length[~wide]
    begin = np.cumsum(length) - length
    flags[np.repeat(first - begin, length) + np.arange(int(length.sum()))] = value


def resolve(layers: Sequence[StoredLayer]) -> Extents:
    """The composed map of a chain, root first; a DATA value is the place of the owning layer."""
    view = layers[0].extents().owned_by(0)
    for place, layer in enumerate(layers[1:], 1):
        view = over(view, layer.extents().owned_by(place))
    return view
