"""A layer's map on the wire, and its identity.

Each run is one u64: its length in grains times 4, plus what it is (0 ABSENT, 1 ZERO, 2 DATA).  Neighbours differ, and
the runs end exactly at the size, so one map has one form, and a layer's id can be made from it.  The grain is the
cluster, or its 32nd with subclusters.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from snapchain.errors import Corrupt
from snapchain.model.extents import ABSENT, DATA, Extents
from snapchain.replica.stream.messages import LayerOffer
from snapchain.replica.stream.zstd import packed, unpacked

RUNS_A_FRAME = 1 << 16
_HEAD = struct.Struct("<II")
_PLAIN, _ZSTD = 0, 1
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
            yield _HEAD.pack(len(some), _ZSTD) + small
        else:
            yield _HEAD.pack(len(some), _PLAIN) + plain


def layer_id(offer: LayerOffer, words: Words) -> str:
    """32 hex digits: equal for the same layer of the same files on the same parent, in every transfer of it."""
    said = offer.model_dump(mode="json", exclude={"resume_at"})
    state = blake3(json.dumps(said, sort_keys=True, separators=(",", ":")).encode())
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
        if len(body) < _HEAD.size:
            raise self._bad("it is cut off")
        count, codec = _HEAD.unpack_from(body)
        if not 0 < count <= min(RUNS_A_FRAME, self._runs - self._count) or codec not in (_PLAIN, _ZSTD):
            raise self._bad(f"a frame of {count} runs does not fit")
        rest = body[_HEAD.size :]
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
