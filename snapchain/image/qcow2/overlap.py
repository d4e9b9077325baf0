"""Check that no host byte has two owners: every table and cluster claims its range, and claims must not overlap.

Overlaps are found without pairing claims: intervals are disjoint exactly when, with starts and ends sorted separately,
no end lies after the next start.  So a check costs two sorts of integers, in place, whatever the order of the claims.

Compressed clusters may share a host cluster with each other (the format packs them), but with nothing else; so they
claim the host clusters that they touch, each once.
"""

from __future__ import annotations

import numpy as np

from snapchain.errors import Corrupt
from snapchain.image.column import Column
from snapchain.image.physical import Int64s, Mask, Runs

DATA_CLUSTER = "a data cluster"
COMPRESSED_DATA = "compressed data"


class Claims:
    """The owners of the bytes of one file."""

    def __init__(self, cluster_bits: int, *, subject: object) -> None:
        self._bits = cluster_bits
        self._subject = subject
        self._start = Column(np.int64)
        self._end = Column(np.int64)
        self._checked = 0
        # Owner, starts, ends (or the length of each): for messages. The remaining bytes are data clusters.
        self._named: list[tuple[str, Int64s, Int64s | int]] = []
        self._packed: list[tuple[Int64s, Int64s]] = []

    def table(self, owner: str, offset: int, length: int) -> None:
        """One contiguous table; it owns its last cluster to the end."""
        if length:
            self.tables(owner, np.array([offset], np.int64), -(-length >> self._bits) << self._bits)

    def tables(self, owner: str, offsets: Int64s, length: int) -> None:
        """Many tables of one length."""
        self._claim(offsets, offsets + length)
        self._named.append((owner, offsets, length))

    def data(self, offsets: Int64s) -> None:
        """Data clusters, at these offsets in guest order; contiguous neighbours become one claim."""
        if len(offsets):
            size = 1 << self._bits
            joined = np.diff(offsets) == size
            start, last = offsets[np.append(True, ~joined)], offsets[np.append(~joined, True)]
            self._claim(start, last + size)

    def compressed(self, runs: Runs) -> None:
        """Compressed clusters, by the bytes that they may occupy."""
        first = runs.host >> self._bits << self._bits
        last = (runs.host + runs.stored - 1) >> self._bits << self._bits
        self._packed.append(_union(first, last + (1 << self._bits)))

    def check(self) -> None:
        """Raises Corrupt, naming the owners of the first bytes with two claims."""
        if self._packed:
            start, end = _union(*(np.concatenate(ends) for ends in zip(*self._packed, strict=True)))
            self._packed.clear()
            self._claim(start, end)
            self._named.append((COMPRESSED_DATA, start, end))
        if len(self._start) == self._checked:
            return
        self._checked = len(self._start)
        starts, ends = self._start.sort(), self._end.sort()
        meets = ends[:-1] > starts[1:]
        if meets.any():
            raise Corrupt(self._contested(int(starts[1 + int(meets.argmax())])), subject=self._subject)

    def owned(self, offsets: Int64s) -> Mask:
        """Which of these bytes of the file have an owner; after `check`."""
        starts, ends = self._start.sort(), self._end.sort()
        # The header owns offset 0, so every offset has a claim that starts at or before it.
        return offsets < ends[starts.searchsorted(offsets, side="right") - 1]

    def _claim(self, start: Int64s, end: Int64s) -> None:
        self._start.append(start)
        self._end.append(end)

    def _contested(self, at: int) -> str:
        owners: list[str] = []
        for owner, start, end in self._named:
            owners += [owner] * min(_holders(at, start, end), 2)
        owners += [DATA_CLUSTER] * 2
        if owners[0] == DATA_CLUSTER:
            return f"the host cluster at offset {at} is referenced twice"
        return f"overlap: offset {at} of the file is part of {owners[0]} and of {owners[1]}"


def _holders(at: int, start: Int64s, end: Int64s | int) -> int:
    """The number of intervals that hold this byte; starts and ends may be in different orders."""
    ended = start <= at - end if isinstance(end, int) else end <= at
    return int((start <= at).sum()) - int(ended.sum())


def _union(start: Int64s, end: Int64s) -> tuple[Int64s, Int64s]:
    """Overlapping intervals joined into disjoint ones."""
    if (start[1:] < start[:-1]).any():
        order = np.argsort(start)
        start, end = start[order], end[order]
    reach = np.maximum.accumulate(end)
    apart = start[1:] > reach[:-1]
    return start[np.append(True, apart)], reach[np.append(apart, True)]


def check_compressed_starts(host: Int64s, *, subject: object) -> None:
    """Raises Corrupt when two compressed clusters begin at the same byte. Sorts `host` in place."""
    host.sort()
    twice = host[1:] == host[:-1]
    if twice.any():
        at = int(host[1 + int(twice.argmax())])
        raise Corrupt(f"the compressed cluster at offset {at} is referenced twice", subject=subject)
