"""Pages: the map of a layer in pieces of at most 64 MiB of touched guest data, each a blob.

A layer record of a big disk would be megabytes that every reader loads; in pages, a reader loads those of the
ranges that it asks for, and a new layer that reuses old data costs what it touches.

    u32     packs       u32   runs        u32   leaves      u32   zero
    packs * 16 bytes pack id
    runs * RUN_ROW      ascending, without overlap
    leaves * LEAF_ROW   the hashes of touched leaves that are not all zero, ascending (model/content.py)
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from snapchain.errors import Corrupt
from snapchain.model.content import LEAF_BYTES
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, Int64s
from snapchain.repository.crypto import TAG_BYTES
from snapchain.repository.format import LEAF_ROW, PACK_ID_BYTES, RUN_ROW
from snapchain.repository.packs import LARGEST_BLOB

_COUNTS = struct.Struct("<IIII")
_NAME_BYTES = 96
"""Bytes of memory that the name of a pack takes in a table."""
PAGE_LEAVES = 1024
PAGE_RUNS = 2048

Rows = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """A decoded page.

    runs: RUN_ROW[n]; leaves: LEAF_ROW[m]; packs: their table, by place.
    start, stop: int64[n], the guest bytes of the runs; index: int64[m], leaf numbers; to be searched, which a column
    of a row is too slow for.
    """

    runs: Rows
    leaves: Rows
    packs: Sequence[str]
    start: Int64s = field(init=False)
    stop: Int64s = field(init=False)
    index: Int64s = field(init=False)

    def __post_init__(self) -> None:
        start = self.runs["start"].astype(np.int64)
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "stop", start + self.runs["length"].astype(np.int64))
        object.__setattr__(self, "index", self.leaves["index"].astype(np.int64))

    def encode(self) -> bytes:
        """The page as stored."""
        counts = _COUNTS.pack(len(self.packs), len(self.runs), len(self.leaves), 0)
        return b"".join((counts, *map(bytes.fromhex, self.packs), self.runs.tobytes(), self.leaves.tobytes()))

    @staticmethod
    def decode(body: bytes, first: int, stop: int, *, subject: str) -> Page:
        """Raises Corrupt unless every number is plausible for a page that speaks of [first, stop), which ends at the
        disk's end at the latest.
        """
        if len(body) < _COUNTS.size:
            raise Corrupt("a page of the layer record is too short", subject=subject)
        packs, runs, leaves, _ = _COUNTS.unpack_from(body)
        if packs > runs:  # each is there for some run; names take much more memory than their bytes
            raise Corrupt(
                "a page of the layer record contradicts itself: it names more packs than runs", subject=subject
            )
        at_runs = _COUNTS.size + packs * PACK_ID_BYTES
        at_leaves = at_runs + runs * RUN_ROW.itemsize
        if len(body) != at_leaves + leaves * LEAF_ROW.itemsize:
            raise Corrupt("a page of the layer record has another length than it says", subject=subject)
        table = [body[at : at + PACK_ID_BYTES].hex() for at in range(_COUNTS.size, at_runs, PACK_ID_BYTES)]
        page = Page(
            np.frombuffer(body, RUN_ROW, runs, at_runs), np.frombuffer(body, LEAF_ROW, leaves, at_leaves), table
        )
        page._check(first, stop, subject)
        return page

    def _check(self, first: int, stop: int, subject: str) -> None:
        runs = self.runs
        # Unsigned sums can wrap, and unsigned numbers turn negative: bound the parts first.
        bounded = (
            bool((runs["start"] < stop).all())
            and bool((runs["length"] <= stop).all())
            and bool((self.leaves["index"] <= stop // LEAF_BYTES).all())
        )
        begin, end = self.start, self.stop
        data = runs[runs["stored"] != 0]
        sound = (
            bounded
            and bool((end > begin).all())
            and (not len(runs) or (begin[0] >= first and end[-1] <= stop))
            and bool((begin[1:] >= end[:-1]).all())
            and bool((data["pack"] < len(self.packs)).all())
            and bool((data["raw"] <= LARGEST_BLOB).all())
            and bool((data["stored"] <= data["raw"] + TAG_BYTES).all())
            and bool((data["skip"].astype(np.uint64) + data["length"] <= data["raw"]).all())
            and bool((np.diff(self.index) > 0).all())
            and _all_touched(self.index, begin, end)
        )
        if not sound:
            raise Corrupt("a page of the layer record contradicts itself", subject=subject)

    def memory(self) -> int:
        """Bytes that keeping the page takes."""
        arrays = sum(column.nbytes for column in (self.runs, self.leaves, self.start, self.stop, self.index))
        return arrays + len(self.packs) * _NAME_BYTES

    def data_bytes(self) -> int:
        """Guest bytes that are DATA."""
        return int(self.runs["length"][self.runs["stored"] != 0].sum())

    def zero_bytes(self) -> int:
        """Guest bytes that are ZERO."""
        return int(self.runs["length"][self.runs["stored"] == 0].sum())

    def places(self, first: int, stop: int) -> slice:
        """Where the runs stand that reach into [first, stop); they may reach beyond it."""
        return slice(int(self.stop.searchsorted(first, side="right")), int(self.start.searchsorted(stop, side="left")))

    def extents(self, size: int) -> Extents:
        """The page's runs as a map of the whole disk: DATA, ZERO, and ABSENT between them."""
        return extents_of(self.runs, size)


def _all_touched(index: Int64s, start: Int64s, stop: Int64s) -> bool:
    """Whether some run reaches into each of these leaves."""
    after = np.searchsorted(stop, index * LEAF_BYTES, side="right")
    if not len(index):
        return True
    return int(after[-1]) < len(start) and bool((start[after] < (index + 1) * LEAF_BYTES).all())


def extents_of(runs: Rows, size: int) -> Extents:
    """RUN_ROWs as a map of [0, size): DATA, ZERO, and ABSENT between them."""
    if not len(runs):
        return Extents.absent(size)
    start = runs["start"].astype(np.int64)
    stop = start + runs["length"].astype(np.int64)
    at = np.empty(2 * len(runs) + 1, np.int64)
    val = np.empty(2 * len(runs) + 1, np.int64)
    at[0], val[0] = 0, ABSENT
    at[1::2], at[2::2] = start, stop
    val[1::2] = np.where(runs["stored"] == 0, ZERO, DATA)
    val[2::2] = ABSENT
    # A run that begins where the last one ends leaves an empty gap; the disk's end leaves one past it.
    real = np.append(np.diff(at) > 0, at[-1] < size)
    return Extents.from_starts(size, at[real], val[real])


@dataclass(slots=True)
class PageBuilder:
    """Collects runs and leaves in guest order and cuts them into pages."""

    _runs: list[Rows] = field(default_factory=list)
    _leaves: list[Rows] = field(default_factory=list)
    _packs: dict[str, int] = field(default_factory=dict)
    _run_count: int = 0
    _leaf_count: int = 0

    def place(self, pack: str) -> int:
        """The pack's place in the table of the page being built."""
        return self._packs.setdefault(pack, len(self._packs))

    def add(self, runs: Rows, packs: Sequence[str], leaves: Rows) -> None:
        """Append RUN_ROWs (column `pack` indexes `packs`) and LEAF_ROWs that lie above all earlier ones."""
        moved = runs.copy()
        data = moved["stored"] != 0
        moved["pack"][~data] = 0
        if data.any():
            used, place = np.unique(moved["pack"][data], return_inverse=True)
            places = np.array([self.place(packs[pack]) for pack in used.tolist()], np.uint32)
            moved["pack"][data] = places[place]
        self._runs.append(moved)
        self._leaves.append(leaves)
        self._run_count += len(runs)
        self._leaf_count += len(leaves)

    @property
    def is_full(self) -> bool:
        """Time to take a page."""
        return self._leaf_count >= PAGE_LEAVES or self._run_count >= PAGE_RUNS

    def take(self) -> tuple[int, int, Page] | None:
        """(first, stop, page) of what was collected, and begin anew; None when that is nothing."""
        if not self._run_count:
            return None
        runs = np.concatenate(self._runs)
        leaves = np.concatenate(self._leaves) if self._leaves else np.empty(0, LEAF_ROW)
        page = Page(runs, leaves, list(self._packs))
        first = int(runs["start"][0])
        stop = int(runs["start"][-1] + runs["length"][-1])
        if len(leaves):
            first = min(first, int(leaves["index"][0]) * LEAF_BYTES)
            stop = max(stop, (int(leaves["index"][-1]) + 1) * LEAF_BYTES)
        self._runs, self._leaves, self._packs = [], [], {}
        self._run_count = self._leaf_count = 0
        return first, stop, page
