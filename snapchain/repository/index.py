"""Which blob lies where: sorted arrays, looked up by the first 8 bytes of the id.

An index object (kind I) lists some packs and the blobs in them, once they are durable:

    u32     packs       u32   blobs
    packs * (16 bytes pack id, u64 object size)
    blobs * 32 bytes id, ascending by their first 8 bytes
    blobs * BLOB_ROW, in the same order

Only shipping needs it, to know what is there already, and reads of large ones no more than it needs (sparse.py).
Restoring does not: layer records say where their blobs are.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from snapchain.errors import Corrupt, NotFound, SnapchainError
from snapchain.objects.store import ObjectInfo, ObjectStore
from snapchain.repository import condemned, damage
from snapchain.repository.condemned import Condemned
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import seal, unseal
from snapchain.repository.eras import ALONE, BEGUN, KIND, check_one_moment, counting
from snapchain.repository.format import (
    BLOB_ROW,
    ID_BYTES,
    PACK_BYTES,
    PACK_ID_BYTES,
    fresh_id,
    index_name,
    is_damage,
)
from snapchain.repository.packs import Location

ATTEMPTS = 8
"""How often the indexes are listed again when some of them are replaced meanwhile."""
_READERS = 8
_AHEAD_BYTES = 64 * 1024 * 1024
_COUNTS = struct.Struct("<II")
INDEX_BYTES = 2 * 1024 * 1024
"""The most that an index has, unless one pack has more: 40,000 blobs. Who looks for one may have to read them all."""
_OVERHEAD = 256
"""Bytes of head, salt, counts, tag and zstd frame."""
_PACK_ROW = np.dtype([("pack", "u1", (PACK_ID_BYTES,)), ("size", "<u8")])

Ids = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.void]
Result = TypeVar("Result")


class _Segment:
    """A sorted run of entries. prefix: u64[n] big endian beginning of each id; packs: their table."""

    __slots__ = ("ids", "packs", "prefix", "rows")

    def __init__(self, ids: Ids, rows: Rows, packs: list[str]) -> None:
        prefix = np.ascontiguousarray(ids[:, :8]).view(">u8").ravel().astype(np.uint64)
        order = np.argsort(prefix, kind="stable")
        self.prefix = prefix[order]
        self.ids = ids[order]
        self.rows = rows[order]
        self.packs = packs

    def find(self, blob: bytes) -> Iterator[Location]:
        """All places of the blob."""
        key = np.uint64(int.from_bytes(blob[:8], "big"))
        at = int(np.searchsorted(self.prefix, key))
        while at < len(self.prefix) and self.prefix[at] == key:
            if self.ids[at].tobytes() == blob:
                pack, offset, stored, raw = self.rows[at].item()
                yield Location(self.packs[pack], offset, stored, raw)
            at += 1


class BlobIndex:
    """All blobs known of, those of this session included. Thread-safe.

    A few sorted segments instead of a dict: 56 bytes a blob where Python objects would cost 300.  New blobs
    stay in a dict until there are enough of them for a segment; segments double in size (as in a log-structured merge).

    sizes: pack -> bytes of its object, as the indexes list it
    avoid: packs that nothing may rely on (damage.py); may be added to
    condemned: what is to be deleted; no blob is found there, and none anywhere while a record of that is unreadable
    mine: packs of this session
    unreadable: what was wrong with index objects that could not be read
    unlisted: packs that are there and that no index lists, as far as the packs were looked at
    era_began: when the newest era was begun, by the store's clock, infinite where it tells no time; None: never
    """

    _FRESH = 4096

    def __init__(self, era: int = 0) -> None:
        self.era = era
        self.sizes: dict[str, int] = {}
        self.avoid: set[str] = set()
        self.condemned = Condemned()
        self.mine: set[str] = set()
        self.unreadable: list[SnapchainError] = []
        self.unlisted: dict[str, ObjectInfo] = {}
        self.era_began: float | None = None
        self._lock = threading.Lock()
        self._segments: list[_Segment] = []
        self._fresh: dict[bytes, Location] = {}
        self._to_go: frozenset[str] = frozenset()

    def condemn(self, said: Condemned) -> None:
        """Take in what is to be deleted."""
        with self._lock:
            self.condemned, self._to_go = said, said.all_packs

    def find(self, blob: bytes) -> Location | None:
        """Where the blob is, None when it is not known, or only in packs that are to be avoided or deleted."""
        with self._lock:
            return next((where for where in self._find(blob) if self.may_use(where.pack)), None)

    def prepare(self, blobs: Iterable[bytes]) -> None:
        """These, which lie side by side on a disk, will be asked for."""

    def may_use(self, pack: str) -> bool:
        """Whether new records may rely on a pack that is there."""
        if pack in self.avoid or pack in self._to_go:
            return False
        return not self.condemned.unreadable or pack in self.mine

    def find_all(self, blob: bytes) -> list[Location]:
        """All places of the blob, those in packs that are to be avoided or deleted last."""
        with self._lock:
            return sorted(self._find(blob), key=lambda where: not self.may_use(where.pack))

    def _find(self, blob: bytes) -> Iterator[Location]:
        fresh = self._fresh.get(blob)
        if fresh is not None:
            yield fresh
        for segment in self._segments:
            yield from segment.find(blob)

    def add(self, blob: bytes, location: Location) -> None:
        """Remember a blob of this session."""
        with self._lock:
            self._fresh[blob] = location
            self.mine.add(location.pack)
            if len(self._fresh) >= self._FRESH:
                self._settle()

    def take(self, part: IndexPart) -> None:
        """Take in what an index object says."""
        self.sizes.update(part.packs)
        self.load(part.ids, part.rows, list(part.packs))

    def load(self, ids: Ids, rows: Rows, packs: list[str]) -> None:
        """Take in the entries of an index object."""
        with self._lock:
            self._push(_Segment(ids, rows, packs))

    def _settle(self) -> None:
        places: dict[str, int] = {}
        rows = np.empty(len(self._fresh), BLOB_ROW)
        for at, location in enumerate(self._fresh.values()):
            place = places.setdefault(location.pack, len(places))
            rows[at] = (place, location.offset, location.stored, location.raw)
        ids = np.frombuffer(b"".join(self._fresh), np.uint8).reshape(-1, ID_BYTES)
        self._fresh = {}
        self._push(_Segment(ids, rows, list(places)))

    def _push(self, segment: _Segment) -> None:
        while self._segments and len(self._segments[-1].prefix) <= 2 * len(segment.prefix):
            below = self._segments.pop()
            rows = segment.rows.copy()
            rows["pack"] += len(below.packs)
            segment = _Segment(
                np.concatenate([below.ids, segment.ids]),
                np.concatenate([below.rows, rows]),
                below.packs + segment.packs,
            )
        self._segments.append(segment)


@dataclass(frozen=True, slots=True)
class IndexedPack:
    """A durable pack as an index lists it. size: bytes of the object; rows: column `pack` is not read."""

    pack: str
    size: int
    ids: Ids
    rows: Rows


def write(store: ObjectStore, keys: Keyring, listed: Sequence[IndexedPack], *, era: int) -> str:
    """Store an index object for these durable packs; its name."""
    ids = np.concatenate([pack.ids for pack in listed])
    rows = np.concatenate([pack.rows for pack in listed])
    rows["pack"] = np.repeat(np.arange(len(listed)), [len(pack.rows) for pack in listed])
    segment = _Segment(ids, rows, [])
    table = np.array([(list(bytes.fromhex(pack.pack)), pack.size) for pack in listed], _PACK_ROW)
    body = b"".join(
        (_COUNTS.pack(len(listed), len(rows)), table.tobytes(), segment.ids.tobytes(), segment.rows.tobytes())
    )
    name = index_name(era, fresh_id())
    store.put(name, seal(keys, KIND, name, body))
    return name


def split(listed: Iterable[IndexedPack], limit: int | None = None) -> Iterator[list[IndexedPack]]:
    """The packs in as many groups as it takes for no index to be larger than a pack may be (limit: bytes)."""
    most = min(PACK_BYTES if limit is None else limit, INDEX_BYTES) - _OVERHEAD
    group: list[IndexedPack] = []
    size = 0
    for pack in listed:
        more = _PACK_ROW.itemsize + len(pack.rows) * (ID_BYTES + BLOB_ROW.itemsize)
        more += more // 256  # what cannot be compressed grows by that
        if group and size + more > most:
            yield group
            group, size = [], 0
        group.append(pack)
        size += more
    if group:
        yield group


def parse(keys: Keyring, name: str, data: bytes) -> tuple[dict[str, int], Ids, Rows]:
    """packs (id -> object size, in table order), blob ids and BLOB_ROWs of an index object. Raises Corrupt."""
    body = unseal(keys, KIND, name, data)
    if len(body) < _COUNTS.size:
        raise Corrupt("the index is too short", subject=name)
    packs, blobs = _COUNTS.unpack_from(body)
    at_ids = _COUNTS.size + packs * _PACK_ROW.itemsize
    at_rows = at_ids + blobs * ID_BYTES
    if len(body) != at_rows + blobs * BLOB_ROW.itemsize:
        raise Corrupt("the index has another length than it says", subject=name)
    table = np.frombuffer(body, _PACK_ROW, packs, _COUNTS.size)
    ids = np.frombuffer(body, np.uint8, blobs * ID_BYTES, at_ids).reshape(-1, ID_BYTES)
    rows = np.frombuffer(body, BLOB_ROW, blobs, at_rows)
    if packs > blobs:
        raise Corrupt("the index lists more packs than blobs", subject=name)
    if blobs and int(rows["pack"].max()) >= packs:
        raise Corrupt("the index names a pack that it does not list", subject=name)
    sizes = {bytes(row["pack"]).hex(): int(row["size"]) for row in table}
    if len(sizes) != packs:
        raise Corrupt("the index lists a pack twice", subject=name)
    return sizes, ids, rows


def open_index(store: ObjectStore, keys: Keyring, index: BlobIndex, listed: Sequence[ObjectInfo]) -> list[ObjectInfo]:
    """Let an index know all but the blobs; the index objects that count.

    listed: all below index/. Raises NotFound when that has changed meanwhile.
    """
    index.era, found = counting(listed)
    index.condemn(condemned.read(store, keys, [info.name for info in listed]))
    began = (info.modified for info in listed if info.name.endswith((f"-{ALONE}", f"-{BEGUN}")))
    index.era_began = max((inf if modified is None else modified for modified in began), default=None)
    index.avoid.update(*damage.read(store, keys, [info.name for info in listed if is_damage(info.name)]).values())
    check_one_moment(store, listed)
    return found


def load(store: ObjectStore, keys: Keyring) -> BlobIndex:
    """The index of the whole repository. An index object that cannot be read is left out: see `unreadable`.

    Packs that a record of damage lists are to be avoided.
    """

    def attempt() -> BlobIndex:
        index = BlobIndex()
        found = open_index(store, keys, index, list(store.list("index/")))
        # The small ones first: those are put together by others, and reading all may take minutes.
        for part in read_all(store, keys, sorted(found, key=lambda info: info.size), index.unreadable):
            index.take(part)
        return index

    return retried(attempt)


def retried(attempt: Callable[[], Result]) -> Result:
    """What `attempt` gives, called again when index objects that it has listed are gone: they were put together."""
    for _ in range(ATTEMPTS - 1):
        with suppress(NotFound):
            return attempt()
    return attempt()


@dataclass(frozen=True, slots=True, eq=False)
class IndexPart:
    """What an index object says. packs: id -> bytes of the object, in the order of the table."""

    name: str
    packs: dict[str, int]
    ids: Ids
    rows: Rows

    def by_pack(self) -> Iterator[IndexedPack]:
        """Each pack with its blobs."""
        order = np.argsort(self.rows["pack"], kind="stable")
        edges = np.searchsorted(self.rows["pack"][order], np.arange(len(self.packs) + 1))
        for place, (pack, size) in enumerate(self.packs.items()):
            mine = order[edges[place] : edges[place + 1]]
            yield IndexedPack(pack, size, self.ids[mine], self.rows[mine])


def read_all(
    store: ObjectStore, keys: Keyring, listed: Sequence[ObjectInfo], unreadable: list[SnapchainError]
) -> Iterator[IndexPart]:
    """What these objects say. What is wrong with those that are damaged is added to `unreadable`. Raises NotFound."""
    for name, data in _read_ahead(store, listed):
        try:
            part = IndexPart(name, *parse(keys, name, data))
        except Corrupt as error:
            unreadable.append(error)
            continue
        yield part


def _read_ahead(store: ObjectStore, listed: Sequence[ObjectInfo]) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of these objects, some of them read at once: as many as fit into _AHEAD_BYTES."""
    waiting = deque(listed)
    ahead: deque[tuple[ObjectInfo, Future[bytes]]] = deque()
    with ThreadPoolExecutor(_READERS, "index") as pool:
        while waiting or ahead:
            held = sum(info.size for info, _ in ahead)
            if waiting and (not ahead or (len(ahead) < _READERS and held + waiting[0].size <= _AHEAD_BYTES)):
                info = waiting.popleft()
                ahead.append((info, pool.submit(store.get, info.name)))
                continue
            info, read = ahead.popleft()
            yield info.name, read.result()
