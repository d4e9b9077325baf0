"""DATA frames: what a layer holds in a guest range, gathered.

The map shows where a layer has DATA, so a frame names only a range, and carries all DATA bytes of it one behind the
other: a million small extents cost no more than one large.  `parts` cut these bytes into what is carried, what is zero,
and what is the same as in the layers below; only the first travels.

    u64 start | u64 stop | u8 codec | u8 0 | u16 parts | parts * u32 (length * 4 + kind) | payload
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from snapchain.errors import Corrupt
from snapchain.host.batches import Buffer
from snapchain.model.content import HASH_BYTES, LEAF_BYTES, Hashes
from snapchain.model.extents import ABSENT, DATA, Extents, Int64s
from snapchain.replica.stream.compression import packed, unpacked
from snapchain.replica.stream.messages import LayerOffer

LARGEST_DATA = 2 << 20
"""Most DATA bytes of one frame, carried or not."""
MOST_PARTS = 4096
_HEAD = struct.Struct("<QQBBH")
_PLAIN, _ZSTD = 0, 1
_WORTH = 0.995
"""Compressed bytes above this share of the plain ones are not worth unpacking."""


class Part(IntEnum):
    """Where some of the gathered bytes come from."""

    CARRIED = 0
    ZERO = 1
    BELOW = 2


@dataclass(frozen=True, slots=True)
class Piece:
    """Gathered bytes [at, at + length) of a frame are guest bytes from `offset` on."""

    at: int
    offset: int
    length: int


class DataRuns:
    """The DATA of a map, in guest order: what a range of the guest gathers."""

    def __init__(self, extents: Extents) -> None:
        held = extents.val >= DATA
        self.size = extents.size
        self.start = extents.at[held]
        self.stop = extents.ends[held]
        self._before = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.stop - self.start)])

    @property
    def total(self) -> int:
        """All DATA bytes."""
        return int(self._before[-1])

    def below(self, offset: int) -> int:
        """DATA bytes below a guest offset."""
        run = int(self.start.searchsorted(offset, side="right"))
        if not run:
            return 0
        return int(self._before[run - 1]) + min(offset, int(self.stop[run - 1])) - int(self.start[run - 1])

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """The DATA of a range, ascending."""
        first = int(self.stop.searchsorted(start, side="right"))
        last = int(self.start.searchsorted(stop, side="left"))
        found: list[Piece] = []
        at = 0
        begins, ends = self.start[first:last].tolist(), self.stop[first:last].tolist()
        for begin, end in zip(begins, ends, strict=True):
            offset = max(begin, start)
            length = min(end, stop) - offset
            found.append(Piece(at, offset, length))
            at += length
        return found


def encode_data(
    start: int, stop: int, parts: Sequence[tuple[int, Part]], carried: Buffer, *, level: int | None
) -> tuple[bytes, Buffer]:
    """(head, payload) of a DATA frame. level: of zstd; None sends plain bytes."""
    payload, codec = carried, _PLAIN
    if level is not None and len(carried):
        small = packed(carried, level=level)
        if len(small) < _WORTH * len(carried):
            payload, codec = small, _ZSTD
    words = np.array([length * 4 + part for length, part in parts], "<u4")
    return _HEAD.pack(start, stop, codec, 0, len(parts)) + words.tobytes(), payload


@dataclass(frozen=True, slots=True)
class Arrived:
    """A DATA frame, judged. parts: lengths and kinds, which cover all DATA of the range; carried: plain bytes."""

    start: int
    stop: int
    length: int
    parts: tuple[tuple[int, Part], ...]
    carried: memoryview


def decode_data(body: memoryview, runs: DataRuns, position: int, *, on_base: bool, subject: str) -> Arrived:
    """Judge a DATA frame before anything is unpacked.

    position: where the frame before ended; on_base: whether there are layers below to take bytes from
    Raises Corrupt when it overlaps, leaves DATA out, reaches out of the map, or does not hold what it claims.
    """

    def bad(what: str) -> Corrupt:
        return Corrupt(f"data of guest bytes {start} to {stop} are unsound: {what}", subject=subject)

    if len(body) < _HEAD.size:
        raise Corrupt("a data frame is cut off", subject=subject)
    start, stop, codec, zero, count = _HEAD.unpack_from(body)
    if not position <= start < stop <= runs.size:
        raise bad(f"they do not follow byte {position} of {runs.size}")
    before, begin, end = runs.below(position), runs.below(start), runs.below(stop)
    length = end - begin
    if begin != before:
        raise bad(f"data between {position} and {start} were left out")
    if not 0 < length <= LARGEST_DATA:
        raise bad(f"the map has {length} bytes of data there")
    if zero or codec not in (_PLAIN, _ZSTD) or not 0 < count <= MOST_PARTS or len(body) < _HEAD.size + 4 * count:
        raise bad("its head is wrong")
    words = np.frombuffer(body, "<u4", count, _HEAD.size).astype(np.int64)
    lengths, kinds = words >> 2, words & 3
    if not lengths.all() or int(lengths.sum()) != length or bool((kinds > (2 if on_base else 1)).any()):
        raise bad("its parts do not cover them")
    expected = int(lengths[kinds == Part.CARRIED].sum())
    payload = body[_HEAD.size + 4 * count :]
    if codec == _ZSTD:
        payload = memoryview(unpacked(payload, expected, subject=subject))
    if len(payload) != expected:
        raise bad(f"it carries {len(payload)} bytes, not {expected}")
    parts = tuple((size, Part(kind)) for size, kind in zip(lengths.tolist(), kinds.tolist(), strict=True))
    return Arrived(start, stop, length, parts, payload)


# --- The map of a layer, and its id.
#
# Each run is one u64: its length in grains times 4, plus its kind (0 ABSENT, 1 ZERO, 2 DATA). Neighbours differ, and
# the runs end exactly at the size, so a map has one form, and a layer's id can be made from it. The grain is the
# cluster size, or a 32nd of it with subclusters.

RUNS_A_FRAME = 1 << 16
_MAP_HEAD = struct.Struct("<II")
_LEVEL = 3

Words = npt.NDArray[np.uint64]


def grain_of(offer: LayerOffer) -> int:
    """The unit of a layer's map, bytes."""
    return offer.cluster_size // 32 if offer.extended_l2 else offer.cluster_size


def words_of(extents: Extents, grain: int) -> Words:
    """uint64[runs]. The map's runs start at multiples of the grain."""
    stops = -(-extents.ends // grain)
    lengths = stops - extents.at // grain
    kinds = np.clip(extents.val, ABSENT, DATA) - ABSENT
    return (lengths.astype(np.uint64) << np.uint64(2)) | kinds.astype(np.uint64)


def map_frames(words: Words) -> Iterator[bytes]:
    """Bodies of MAP frames."""
    for first in range(0, len(words), RUNS_A_FRAME):
        some = words[first : first + RUNS_A_FRAME]
        plain = some.astype("<u8").tobytes()
        small = packed(plain, level=_LEVEL)
        if len(small) < len(plain):
            yield _MAP_HEAD.pack(len(some), _ZSTD) + small
        else:
            yield _MAP_HEAD.pack(len(some), _PLAIN) + plain


def layer_id(offer: LayerOffer, words: Words) -> str:
    """32 hex digits: equal for the same layer of the same files on the same parent, in every transfer of it."""
    fields = offer.model_dump(mode="json", exclude={"resume_at"})
    state = blake3(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
    state.update(b"\n")
    state.update(words.astype("<u8").tobytes())
    return state.digest(16).hex()


class MapReader:
    """Puts a layer's map together from MAP frames, and judges it."""

    def __init__(self, offer: LayerOffer, *, subject: str) -> None:
        """Raises Corrupt when the offer cannot have such a map."""
        self._subject = subject
        self._size, self._grain, self._runs = offer.size, grain_of(offer), offer.runs
        self._grains = -(-offer.size // self._grain)
        self._words: list[Words] = []
        self._count = self._reached = 0
        if (offer.runs == 0) != (offer.size == 0) or offer.runs > self._grains:
            raise self._bad(f"{offer.runs} runs cannot describe {self._grains} clusters")

    @property
    def complete(self) -> bool:
        """Whether all runs are here."""
        return self._count == self._runs

    def add(self, body: memoryview) -> None:
        """Take one MAP frame. Raises Corrupt."""
        if len(body) < _MAP_HEAD.size:
            raise self._bad("it is cut off")
        count, codec = _MAP_HEAD.unpack_from(body)
        if not 0 < count <= min(RUNS_A_FRAME, self._runs - self._count) or codec not in (_PLAIN, _ZSTD):
            raise self._bad(f"a frame of {count} runs does not fit")
        rest = body[_MAP_HEAD.size :]
        plain = unpacked(rest, 8 * count, subject=self._subject) if codec == _ZSTD else bytes(rest)
        if len(plain) != 8 * count:
            raise self._bad("it is cut off")
        words = np.frombuffer(plain, "<u8").astype(np.uint64)
        lengths, kinds = words >> np.uint64(2), words & np.uint64(3)
        last = self._words[-1][-1:] & np.uint64(3) if self._words else np.empty(0, np.uint64)
        joined = np.concatenate([last, kinds])
        if not lengths.all() or bool((lengths > np.uint64(self._grains)).any()) or bool((kinds > 2).any()):
            raise self._bad("a run is of no length, of no kind, or larger than the disk")
        if bool((joined[1:] == joined[:-1]).any()):
            raise self._bad("two neighbouring runs are the same")
        # At most 2**16 lengths below 2**48: the sum fits.
        self._reached += int(lengths.sum(dtype=np.uint64))
        if self._reached > self._grains:
            raise self._bad("it reaches past the end of the disk")
        self._words.append(words)
        self._count += count

    def words(self) -> Words:
        """The whole map as it came. Raises Corrupt when runs are missing."""
        if not self.complete or self._reached != self._grains:
            raise self._bad(f"it ends after {self._count} of {self._runs} runs")
        return np.concatenate(self._words) if self._words else np.empty(0, np.uint64)

    def extents(self) -> Extents:
        """The map. Raises as `words`."""
        words = self.words()
        stops = np.cumsum((words >> np.uint64(2)).astype(np.int64)) * self._grain
        starts = np.concatenate([np.zeros(1, np.int64), stops[:-1]])[: len(words)]
        return Extents(self._size, starts, (words & np.uint64(3)).astype(np.int64) + ABSENT)

    def _bad(self, what: str) -> Corrupt:
        return Corrupt(f"a layer's map is unsound: {what}", subject=self._subject)


# --- LEAF_HASHES: count * (u64 leaf number | 32 bytes)

_ENTRY = np.dtype([("leaf", "<u8"), ("hash", "u1", (HASH_BYTES,))])


def encode_leaves(numbers: Int64s, hashes: Hashes) -> bytes:
    """The body, or a part of it. numbers: int64[n]; hashes: uint8[n, 32]."""
    entries = np.empty(len(numbers), _ENTRY)
    entries["leaf"], entries["hash"] = numbers, hashes
    return entries.tobytes()


def decode_leaves(body: bytes, after: int, size: int, *, subject: str) -> tuple[Int64s, Hashes]:
    """(int64[n], uint8[n, 32]): the entries of a body.

    after: the last leaf number before, or -1; size: of the disk, bytes
    Raises Corrupt for numbers that do not ascend, or lie beyond the disk.
    """
    if len(body) % _ENTRY.itemsize:
        raise Corrupt("leaf hashes are cut off", subject=subject)
    entries = np.frombuffer(body, _ENTRY)
    leaves = entries["leaf"]
    count = -(-size // LEAF_BYTES)
    if bool((leaves >= np.uint64(count)).any()):
        raise Corrupt("a leaf hash is beyond the end of the disk", subject=subject)
    numbers = leaves.astype(np.int64)
    if bool((np.diff(numbers, prepend=np.int64(after)) <= 0).any()):
        raise Corrupt("leaf hashes do not ascend", subject=subject)
    return numbers, np.ascontiguousarray(entries["hash"])
