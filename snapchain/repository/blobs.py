"""Reads blobs back: neighbours in a pack with one ranged read, checked before anybody sees them."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from snapchain.errors import Corrupt, NotFound, Unavailable
from snapchain.objects.store import ObjectStore
from snapchain.repository.crypto import Keyring
from snapchain.repository.format import pack_name
from snapchain.repository.index import BlobIndex
from snapchain.repository.packs import Location, PackReader
from snapchain.repository.read_ahead import Get

GAP_BYTES = 128 * 1024
"""Read through a hole of this size rather than ask again: cheaper than a request on every store."""
GROUP_BYTES = 16 * 1024 * 1024
_GROUP_RAW = 32 * 1024 * 1024
"""Stored and plain bytes that are read together: a record of many blobs that unpack well must not fill the memory."""
_READERS = 256


class BlobReader:
    """Thread-safe.

    load: the index, which is asked for when a blob is damaged: where else is it?  None: no copies are looked for
    damaged: packs in which a blob was found missing or altered
    """

    def __init__(self, store: ObjectStore, keys: Keyring, load: Callable[[], BlobIndex] | None = None) -> None:
        self.damaged: set[str] = set()
        self._store, self._keys, self._load = store, keys, load
        self._get: Get = self.read_range
        self._on_read: Callable[[Location, memoryview], None] = _unheard
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._index: BlobIndex | None = None
        self._readers: OrderedDict[str, PackReader] = OrderedDict()

    def through(self, get: Get) -> BlobReader:
        """The same reader, which reads packs by another function."""
        other = copy.copy(self)
        other._get = get  # noqa: SLF001 - the two are one thing
        return other

    def heard_by(self, on_read: Callable[[Location, memoryview], None]) -> BlobReader:
        """The same reader, which tells of each blob that it has read and found good: the bytes that are stored."""
        other = copy.copy(self)
        other._on_read = on_read  # noqa: SLF001 - the two are one thing
        return other

    def opened(self, blob: bytes, where: Location, text: bytes) -> bytes:
        """The plain bytes of a blob. text: what is stored of it. Raises Corrupt."""
        return self._reader(where.pack).blob(blob, where.offset, where.raw, text)

    def read_range(self, pack: str, offset: int, length: int) -> bytes | memoryview:
        """Stored bytes of a pack. Raises NotFound, Unavailable."""
        return self._store.get(pack_name(pack), offset=offset, length=length)

    def use(self, index: BlobIndex) -> None:
        """Look for copies in this index from now on."""
        with self._loading:
            self._index = index

    def copies(self, blob: bytes, bad: Location) -> list[Location]:
        """Where else a blob should lie, the most trusted place first. bad: where it is damaged."""
        if self._load is None:
            return []
        with self._loading:
            if self._index is None:
                self._index = self._load()
            index = self._index
        return [where for where in index.find_all(blob) if where.pack != bad.pack and where.raw == bad.raw]

    def read_all(self, wanted: Sequence[tuple[bytes, Location]]) -> Iterator[tuple[int, bytes]]:
        """(place in `wanted`, plain bytes) of each blob, in order of packs and offsets.

        A blob that is damaged is read from another place where an index lists one.
        Raises Corrupt, which names the pack, when a blob is missing, altered or not what its id says.
        """
        for group in neighbours(wanted):
            yield from self._read_group(wanted, group)

    def read(self, blob: bytes, location: Location) -> bytes:
        """The plain bytes of one blob."""
        ((_, plain),) = self.read_all([(blob, location)])
        return plain

    def _read_group(self, wanted: Sequence[tuple[bytes, Location]], group: list[int]) -> Iterator[tuple[int, bytes]]:
        given = 0
        try:
            for each in self._read_together(wanted, group):
                yield each
                given += 1
        except Corrupt:
            pass
        except Unavailable:
            # A store that does not answer has lost nothing; a pack that is known to be damaged has a bad sector.
            if not self._is_known_damaged(wanted[group[0]][1].pack):
                raise
        for at in group[given:]:
            yield at, self._read_somewhere(*wanted[at])

    def _read_somewhere(self, blob: bytes, where: Location) -> bytes:
        """The plain bytes of one blob, from the first place where they are whole."""
        try:
            return self._read_there(blob, where)
        except (Corrupt, Unavailable):
            self.damaged.add(where.pack)
            for copy in self.copies(blob, where):
                try:
                    return self._read_there(blob, copy)
                except Corrupt:
                    self.damaged.add(copy.pack)
            raise

    def _is_known_damaged(self, pack: str) -> bool:
        with self._loading:
            return pack in self.damaged or (self._index is not None and pack in self._index.avoid)

    def _read_there(self, blob: bytes, where: Location) -> bytes:
        ((_, plain),) = self._read_together([(blob, where)], [0])
        return plain

    def _read_together(self, wanted: Sequence[tuple[bytes, Location]], group: list[int]) -> Iterator[tuple[int, bytes]]:
        first = wanted[group[0]][1]
        stop = max(wanted[at][1].offset + wanted[at][1].stored for at in group)
        name = pack_name(first.pack)
        try:
            view = memoryview(self._get(first.pack, first.offset, stop - first.offset))
        except NotFound as error:
            raise Corrupt("the pack is missing from the store", subject=name) from error
        reader = self._reader(first.pack)
        for at in group:
            blob, where = wanted[at]
            begin = where.offset - first.offset
            text = view[begin : begin + where.stored]
            plain = reader.blob(blob, where.offset, where.raw, text)
            self._on_read(where, text)
            yield at, plain

    def _reader(self, pack: str) -> PackReader:
        with self._lock:
            reader = self._readers.get(pack)
            if reader is None:
                reader = self._readers[pack] = PackReader(self._keys, pack)
                if len(self._readers) > _READERS:
                    self._readers.popitem(last=False)
            return reader


def _unheard(_where: Location, _text: memoryview) -> None:
    """Nobody listens."""


def neighbours(wanted: Sequence[tuple[bytes, Location]], *, most: int = GROUP_BYTES) -> Iterator[list[int]]:
    """Places in `wanted`, in order of packs and offsets, grouped so that each group is worth one ranged read.

    most: stored bytes of a group, but for a larger blob
    """
    order = sorted(range(len(wanted)), key=lambda at: (wanted[at][1].pack, wanted[at][1].offset))
    group: list[int] = []
    pack, begin, reach, raw = "", 0, 0, 0
    for at in order:
        where = wanted[at][1]
        stop = max(reach, where.offset + where.stored)
        is_apart = where.pack != pack or where.offset > reach + GAP_BYTES
        if group and (is_apart or stop - begin > most or raw + where.raw > _GROUP_RAW):
            yield group
            group = []
        if not group:
            pack, begin, raw, stop = where.pack, where.offset, 0, where.offset + where.stored
        group.append(at)
        reach, raw = stop, raw + where.raw
    if group:
        yield group
