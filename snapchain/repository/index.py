"""Which blob lies where: sorted arrays, looked up by the first 8 bytes of the id.

An index object (kind I) lists some packs and the blobs in them, once they are durable:

    u32     packs       u32   blobs
    packs * (16 bytes pack id, u64 object size)
    blobs * 32 bytes id, ascending by their first 8 bytes
    blobs * BLOB_ROW, in the same order

A collection that deletes packs begins a new era: it writes the indexes of what stays under the next number, says that
they are complete, and deletes those before.  The highest number that is complete counts, with those above it: they are
being written.  So an index that a writer stored who had slept through the collection, and that lists what is gone,
misleads nobody.

Only shipping needs it, to know what is there already.  Restoring does not: layer records say where their blobs are.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

from snapchain.errors import Conflict, Corrupt, NotFound, SnapchainError
from snapchain.objects.exclusive import create_exclusively
from snapchain.objects.store import ObjectInfo, ObjectStore
from snapchain.repository import condemned, damage
from snapchain.repository.condemned import Condemned
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import seal, unseal
from snapchain.repository.format import (
    BLOB_ROW,
    ID_BYTES,
    PACK_BYTES,
    PACK_ID_BYTES,
    fresh_id,
    index_era,
    index_name,
    is_damage,
)
from snapchain.repository.packs import Location

KIND = b"I"
ALONE = "0" * 32
BEGUN = "0" * 31 + "1"
COMPLETE = "0" * 31 + "2"
"""Names of indexes of nothing. ALONE: takes the number of an era for a collector that works alone: the era counts at
once; BEGUN: for one that works beside writers: it counts when COMPLETE is there."""
ATTEMPTS = 8
"""How often the indexes are listed again when some of them are replaced meanwhile."""
_LAST_ERA = 10**10 - 1
_READERS = 8
_AHEAD_BYTES = 64 * 1024 * 1024
_COUNTS = struct.Struct("<II")
_LARGEST_INDEX = 32 * 1024 * 1024
"""Bytes, however large packs may be: half of what readers accept."""
_OVERHEAD = 256
"""Bytes of head, salt, counts, tag and zstd frame."""
_PACK_ROW = np.dtype([("pack", "u1", (PACK_ID_BYTES,)), ("size", "<u8")])

Ids = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.void]


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

    def may_use(self, pack: str) -> bool:
        """Whether new records may rely on a pack that is there."""
        if pack in self.avoid or pack in self._to_go:
            return False
        return not self.condemned.unreadable or pack not in self.sizes  # what this session stores is its own

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
            if len(self._fresh) >= self._FRESH:
                self._settle()

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
    most = min(PACK_BYTES if limit is None else limit, _LARGEST_INDEX) - _OVERHEAD
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


def begin_era(
    store: ObjectStore, keys: Keyring, before: Iterable[str], *, conditional: bool, alone: bool = False
) -> int:
    """Take the number after those of the index objects `before`, by an index of nothing; it.

    conditional: as in objects/exclusive.py; alone: whether no writer is at work, so that it may count at once.
    Raises Conflict when another collector has it: it woke up, or we did.
    """
    era = max((index_era(name) or 0 for name in before), default=0) + 1
    if era > _LAST_ERA:
        raise Corrupt("its indexes have an era that no collection can have reached", subject=store.url)
    name = index_name(era, ALONE if alone else BEGUN)
    if not create_exclusively(store, name, _of_nothing(keys, name), conditional=conditional):
        raise Conflict("another snapchain collects at the same time", subject=store.url, hint="run gc again")
    return era


def complete_era(store: ObjectStore, keys: Keyring, era: int) -> None:
    """Say that all that stays is listed in this era."""
    name = index_name(era, COMPLETE)
    store.put(name, _of_nothing(keys, name))


def is_end_of_era(name: str) -> bool:
    """Whether an index object says that its era counts."""
    return name.endswith((f"-{ALONE}", f"-{COMPLETE}"))


def _of_nothing(keys: Keyring, name: str) -> bytes:
    return seal(keys, KIND, name, _COUNTS.pack(0, 0))


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
    return {bytes(row["pack"]).hex(): int(row["size"]) for row in table}, ids, rows


def newest(store: ObjectStore) -> tuple[int, list[ObjectInfo]]:
    """The era to write in, 0 in a new repository, and the index objects that count."""
    return _counting(store.list("index/"))


def _counting(listed: Iterable[ObjectInfo]) -> tuple[int, list[ObjectInfo]]:
    found = [(number, info) for info in listed for number in [index_era(info.name)] if number is not None]
    ends = (index_name(number, name) for number, _ in found for name in (ALONE, COMPLETE))
    names = {info.name for _, info in found}
    complete = max((index_era(name) or 0 for name in ends if name in names), default=0)
    highest = max((number for number, _ in found), default=0)
    return highest, [info for number, info in found if number >= complete]


def load(store: ObjectStore, keys: Keyring) -> BlobIndex:
    """The index of the whole repository. An index object that cannot be read is left out: see `unreadable`.

    Packs that a record of damage lists are to be avoided.
    """
    for attempt in range(ATTEMPTS):
        listed = list(store.list("index/"))
        found = _counting(listed)
        index = BlobIndex(found[0])
        try:
            index.condemn(condemned.read(store, keys, [info.name for info in listed]))
            _load(store, keys, found[1], index)
        except NotFound:  # a writer has put some of its own together, or a collector
            if attempt == ATTEMPTS - 1:
                raise
            continue
        began = (info.modified for info in listed if info.name.endswith((f"-{ALONE}", f"-{BEGUN}")))
        index.era_began = max((inf if modified is None else modified for modified in began), default=None)
        marks = [info.name for info in listed if is_damage(info.name)]
        index.avoid.update(*damage.read(store, keys, marks).values())
        return index
    raise AssertionError("the loop returns or raises")


def _load(store: ObjectStore, keys: Keyring, listed: Sequence[ObjectInfo], index: BlobIndex) -> None:
    for name, data in _read_ahead(store, listed):
        try:
            packs, ids, rows = parse(keys, name, data)
        except Corrupt as error:
            index.unreadable.append(error)
            continue
        index.load(ids, rows, list(packs))
        index.sizes.update(packs)


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
