"""DATA frames: what a layer holds in a guest range, gathered.

The map has said where a layer has DATA, so a frame names only a range, and carries all DATA bytes of it one behind the
other: a million small extents cost no more than one large.  `parts` cut these bytes into what is carried, what is zero,
and what is the same as in the layers below; only the first travels.

    u64 start | u64 stop | u8 codec | u8 0 | u16 parts | parts * u32 (length * 4 + kind) | payload
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from snapchain.errors import Corrupt
from snapchain.host.batches import Buffer
from snapchain.model.extents import DATA, Extents
from snapchain.replica.stream.zstd import packed, unpacked

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
