"""A layer on its way out: which leaves it changes, and what of its data has to travel.

    read the leaves of a window, above and below  ->  count the content sum  ->  gather the DATA of the map
    ->  cut it into carried, zero and same-as-below  ->  compress what is carried

Each window is one task of a pool of threads; what comes out is put in guest order by the caller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from snapchain.host.batches import Buffer
from snapchain.image.leaves import WORKERS, LeafTable, change, hidden, in_order, read_window
from snapchain.image.view import View
from snapchain.image.windows import Window, hot_leaves, windows
from snapchain.model.content import LEAF_BYTES, Sum
from snapchain.model.extents import Extents, rounded
from snapchain.model.fingerprint import Fingerprint
from snapchain.replica.stream.compression import Levels
from snapchain.replica.stream.maps import DataRuns, Part, Piece, encode_data

_UNDER_WAY = 4
"""Windows in flight a worker: enough behind one slow read, some 60 MiB of buffers."""
BLOCK = 4096
"""Bytes. Zeroes, and bytes that the layers below have already, are recognized in blocks of this size."""


@dataclass(frozen=True, slots=True)
class OutgoingLayer:
    """One layer as a sender has it.

    extents: its map, aligned to the grain of the file to be made; DATA are the bytes that `view` shows there
    below:   what it lies on, None for a root; by its leaf hashes where no file here shows it, and then each leaf in
             which the layer has anything may differ; below_sum: the content sum of that
    same_below: whether the receiver's chain shows the same as `below`, so that bytes may be taken from there
    """

    name: str
    cluster_size: int
    extended_l2: bool
    sources: tuple[Fingerprint, ...]
    extents: Extents
    view: View
    below: View | LeafTable | None
    below_sum: Sum
    same_below: bool = True


@dataclass(frozen=True, slots=True)
class Portion:
    """What a window gives. stop: where it ends; delta: for the content sum; frame: parts of a DATA body, or none.

    data: DATA bytes of the map; carried: those of them that travel
    """

    stop: int
    delta: Sum
    frame: tuple[Buffer, ...]
    data: int
    carried: int


@dataclass(slots=True)
class Outgoing:
    """A layer being read. levels: the compression level, for each window anew."""

    layer: OutgoingLayer
    levels: Levels
    runs: DataRuns = field(init=False)

    def __post_init__(self) -> None:
        self.runs = DataRuns(self.layer.extents)

    def first_sum(self) -> Sum:
        """The content sum before any window: that of the chain below, less what this layer cuts off."""
        size, below = self.layer.extents.size, self.layer.below
        cut_off = below.beyond(size) if isinstance(below, LeafTable) else hidden(size, below)
        return self.layer.below_sum - cut_off

    def _hot_leaves(self) -> Extents:
        layer = self.layer
        if isinstance(layer.below, LeafTable):
            return rounded(layer.extents, LEAF_BYTES)
        return hot_leaves(layer.extents, layer.view, layer.below)

    def sum_up_to(self, until: int) -> Sum:
        """The content sum after all windows below a guest offset, where a window of this layer ended.

        Reads them. Errors as the view's `read_into`.
        """
        total = self.first_sum()
        for delta, _ in in_order(self._delta, windows(self._hot_leaves(), until=until)):
            total = total + delta
        return total

    def _delta(self, window: Window) -> tuple[Sum, int]:
        return self._changed(window, read_window(self.layer.view, window))[0], window.length

    def _changed(self, window: Window, mine: memoryview) -> tuple[Sum, memoryview | None]:
        """What a window adds to the content sum, and what is below it where that can be read."""
        below = self.layer.below
        if isinstance(below, LeafTable):
            return below.replaced_by(window, mine), None
        theirs = None if below is None else read_window(below, window)
        return change(window, mine, theirs), theirs

    def portions(self, *, since: int = 0) -> Iterator[Portion]:
        """All windows behind guest offset `since`, ascending. Errors as the view's `read_into`."""
        under_way: deque[Future[Portion]] = deque()
        pool = ThreadPoolExecutor(WORKERS, "outgoing")
        try:
            for window in windows(self._hot_leaves(), since=since):
                under_way.append(pool.submit(self._read, window))
                if len(under_way) > WORKERS * _UNDER_WAY:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, window: Window) -> Portion:
        layer = self.layer
        mine = read_window(layer.view, window)
        delta, theirs = self._changed(window, mine)
        pieces = self.runs.pieces(window.start, window.stop)
        if not pieces:
            return Portion(window.stop, delta, (), 0, 0)
        plain = gathered(mine, window, pieces)
        same = None if theirs is None or not layer.same_below else gathered(theirs, window, pieces)
        parts, carried = cut(plain, same)
        with self.levels.compressing() as level:
            head, payload = encode_data(window.start, window.stop, parts, carried, level=level)
        return Portion(window.stop, delta, (head, payload), len(plain), len(carried))


def gathered(data: memoryview, window: Window, pieces: Sequence[Piece]) -> memoryview:
    """The pieces' bytes one behind the other, out of those of a window."""
    starts = np.array([start for start, _ in window.ranges], np.int64)
    lengths = np.array([stop - start for start, stop in window.ranges], np.int64)
    before = np.cumsum(lengths) - lengths
    offsets = np.array([piece.offset for piece in pieces], np.int64)
    owner = np.searchsorted(starts, offsets, side="right") - 1
    places = (before[owner] + offsets - starts[owner]).tolist()
    # What lies together in the window stays together: one slice where nothing is left out.
    joined: list[list[int]] = []
    for place, piece in zip(places, pieces, strict=True):
        if joined and joined[-1][1] == place:
            joined[-1][1] += piece.length
        else:
            joined.append([place, place + piece.length])
    if len(joined) == 1:
        return data[joined[0][0] : joined[0][1]]
    return memoryview(b"".join(data[first:stop] for first, stop in joined))


def cut(plain: memoryview, below: memoryview | None) -> tuple[list[tuple[int, Part]], Buffer]:
    """(lengths and kinds of parts, the bytes that are carried), block by block.

    below: the bytes that the receiver can take from below in their place
    """
    length = len(plain)
    mine = _blocks(plain)
    kinds = np.where(mine.any(axis=1), np.int64(Part.CARRIED), np.int64(Part.ZERO))
    if below is not None:
        equal = (mine == _blocks(below)).all(axis=1)
        kinds[equal & (kinds == Part.CARRIED)] = Part.BELOW
    starts = np.flatnonzero(np.concatenate([[True], kinds[1:] != kinds[:-1]]))
    stops = np.append(starts[1:], len(kinds)) * BLOCK
    edges = [(int(first) * BLOCK, min(int(stop), length)) for first, stop in zip(starts, stops, strict=True)]
    parts = [(stop - first, Part(int(kinds[place]))) for (first, stop), place in zip(edges, starts, strict=True)]
    slices = [plain[first:stop] for (first, stop), (_, kind) in zip(edges, parts, strict=True) if kind is Part.CARRIED]
    if len(slices) == 1:
        return parts, slices[0]
    return parts, b"".join(slices)


def _blocks(data: memoryview) -> npt.NDArray[np.uint64]:
    rest = -len(data) % BLOCK
    whole: Buffer = data if not rest else b"".join([data, bytes(rest)])
    return np.frombuffer(whole, np.uint64).reshape(-1, BLOCK // 8)
