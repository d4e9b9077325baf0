"""The place of guest bytes in one image file: runs as numpy columns, never an object per cluster.

    start   guest offset of the run; it ends where the next one starts
    kind    ABSENT, ZERO or DATA, as in model.extents
    host    DATA: where the run's bytes begin in the file; contiguous within a run
    stored  0 for plain data; each compressed cluster is one run, and this bounds its compressed bytes

`PhysicalBuilder` takes runs in guest order, batch by batch, joins neighbours (DATA only where the host bytes join
too) and fills gaps with ABSENT.  A `RunBudget` limits the number of runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snapchain.errors import Unsupported
from snapchain.image.column import Column
from snapchain.model.extents import ABSENT, DATA, Extents

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Int8s = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Physical:
    """Columns of equal length; runs cover [0, size) exactly and ascend. All offsets in bytes."""

    size: int
    start: Int64s
    kind: Int8s
    host: Int64s
    stored: Int32s

    def __len__(self) -> int:
        return len(self.start)

    @property
    def ends(self) -> Int64s:
        """int64[n], one past the last guest byte of each run."""
        return np.append(self.start[1:], np.int64(self.size))[: len(self.start)]

    def extents(self) -> Extents:
        """The same as a map of ABSENT, ZERO and DATA, without places."""
        if not len(self.start):
            return Extents.absent(0)
        fresh = np.empty(len(self.kind), np.bool_)
        fresh[0] = True
        np.not_equal(self.kind[1:], self.kind[:-1], out=fresh[1:])
        return Extents(self.size, self.start[fresh], self.kind[fresh].astype(np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """A batch of ZERO and DATA runs in guest order without overlap; gaps are ABSENT."""

    start: Int64s
    end: Int64s
    kind: Int8s
    host: Int64s
    stored: Int32s

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, chosen: Mask | Int64s | slice) -> Runs:
        return Runs(self.start[chosen], self.end[chosen], self.kind[chosen], self.host[chosen], self.stored[chosen])

    @staticmethod
    def none() -> Runs:
        """No run at all."""
        nowhere = np.empty(0, np.int64)
        return Runs(nowhere, nowhere, np.empty(0, np.int8), nowhere, np.empty(0, np.int32))

    @staticmethod
    def plain(start: Int64s, end: Int64s, *, kind: int, host: Int64s | int) -> Runs:
        """Uncompressed runs of one kind."""
        count = len(start)
        places = np.broadcast_to(np.asarray(host, np.int64), (count,))
        return Runs(start, end, np.full(count, kind, np.int8), places, np.zeros(count, np.int32))

    @staticmethod
    def concatenated(*parts: Runs) -> Runs:
        """One batch after another."""
        return Runs(
            np.concatenate([part.start for part in parts]),
            np.concatenate([part.end for part in parts]),
            np.concatenate([part.kind for part in parts]),
            np.concatenate([part.host for part in parts]),
            np.concatenate([part.stored for part in parts]),
        )


class RunBudget:
    """The limit of runs for all images of one chain together.

    A few MiB of forged tables can describe billions of runs; at about 60 bytes of memory each, FREE of them stay
    below 200 MiB.  An image that is really that fragmented occupies disk space, and each 256 bytes of that buy
    one run more: two for every 512-byte cluster.
    """

    FREE = 2 << 20
    BYTES_PER_RUN = 256

    def __init__(self, runs: int = FREE) -> None:
        self._left = runs

    def grant(self, occupied: int) -> None:
        """Raise the limit for a file that occupies so many bytes of disk."""
        self._left += occupied // self.BYTES_PER_RUN

    def spend(self, runs: int, *, subject: object) -> None:
        """Raises Unsupported when the images have more runs than the limit."""
        self._left -= runs
        if self._left < 0:
            raise Unsupported(
                "the image is cut into too many extents for its size on disk",
                subject=subject,
                hint="rewrite it with `qemu-img convert -f qcow2 -O qcow2` if you trust it",
            )


class PhysicalBuilder:
    """Collects runs in guest order into a Physical."""

    def __init__(self, size: int, *, budget: RunBudget, subject: object) -> None:
        self._size = size
        self._budget = budget
        self._subject = subject
        self._done = 0
        self._last = Runs.none()
        self._start = Column(np.int64)
        self._kind = Column(np.int8)
        self._host = Column(np.int64)
        self._stored = Column(np.int32)

    def add(self, runs: Runs) -> None:
        """Add runs, all after the previous ones and inside [0, size)."""
        if not len(runs):
            return
        joined = _joined(Runs.concatenated(self._last, runs))
        # The last run may continue in the next batch.
        self._emit(joined[: len(joined) - 1])
        self._last = joined[len(joined) - 1 :]

    def finish(self) -> Physical:
        """The map of all added runs, with ABSENT up to the size."""
        self._emit(self._last)
        if self._done < self._size:
            tail = np.array([self._done], np.int64)
            self._keep(tail, np.array([ABSENT], np.int8), np.array([-1], np.int64), np.zeros(1, np.int32))
        return Physical(self._size, self._start.take(), self._kind.take(), self._host.take(), self._stored.take())

    def _emit(self, runs: Runs) -> None:
        if not len(runs):
            return
        before = np.concatenate([np.array([self._done], np.int64), runs.end[:-1]])
        gap = runs.start > before
        self._done = int(runs.end[-1])
        if not gap.any():
            self._keep(runs.start, runs.kind, runs.host, runs.stored)
            return
        at = np.arange(len(runs)) + np.cumsum(gap)
        count = int(at[-1]) + 1
        start = np.empty(count, np.int64)
        kind = np.full(count, ABSENT, np.int8)
        host = np.full(count, -1, np.int64)
        stored = np.zeros(count, np.int32)
        start[at[gap] - 1] = before[gap]
        start[at], kind[at], host[at], stored[at] = runs.start, runs.kind, runs.host, runs.stored
        self._keep(start, kind, host, stored)

    def _keep(self, start: Int64s, kind: Int8s, host: Int64s, stored: Int32s) -> None:
        self._budget.spend(len(start), subject=self._subject)
        self._start.append(start)
        self._kind.append(kind)
        self._host.append(host)
        self._stored.append(stored)


def _joined(runs: Runs) -> Runs:
    """Neighbours that continue each other joined into one run."""
    length = runs.end[:-1] - runs.start[:-1]
    same = (runs.start[1:] == runs.end[:-1]) & (runs.kind[1:] == runs.kind[:-1])
    same &= (runs.stored[1:] == 0) & (runs.stored[:-1] == 0)
    same &= (runs.kind[1:] != DATA) | (runs.host[1:] == runs.host[:-1] + length)
    if not same.any():
        return runs
    first = np.append(True, ~same)
    last = np.append(~same, True)
    return Runs(runs.start[first], runs.end[last], runs.kind[first], runs.host[first], runs.stored[first])
