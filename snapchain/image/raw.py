"""The map of a raw image: what the filesystem stores is DATA, its holes are ZERO.

Like QEMU, the size is rounded up to 512 bytes and the rest of the last sector reads as zeroes.
"""

from __future__ import annotations

import numpy as np

from snapchain.errors import Unsupported
from snapchain.image.holes import stored_range
from snapchain.image.physical import Int64s, Physical, PhysicalBuilder, RunBudget, Runs
from snapchain.image.pread import file_bytes
from snapchain.model.extents import DATA, ZERO

SECTOR = 512
MAX_BYTES = (1 << 63) - (1 << 30)
"""BDRV_MAX_LENGTH of QEMU."""
_BATCH = 65536


def map_raw(fd: int, *, budget: RunBudget, subject: object) -> Physical:
    """Where the bytes of a raw file or block device lie. Raises Unsupported for too many extents."""
    stored = file_bytes(fd)
    if stored > MAX_BYTES:
        raise Unsupported(f"a file of {stored} bytes is larger than QEMU's limit", subject=subject)
    size = -(-stored // SECTOR) * SECTOR
    builder = PhysicalBuilder(size, budget=budget, subject=subject)
    at = 0
    while at < stored:
        first: list[int] = []
        last: list[int] = []
        start = at
        while at < stored and len(first) < _BATCH:
            found = stored_range(fd, at, size=stored, subject=subject)
            if found is None:
                at = stored
                break
            first.append(found[0])
            last.append(found[1])
            at = found[1]
        builder.add(_with_holes(start, at, np.array(first, np.int64), np.array(last, np.int64)))
    if stored < size:
        builder.add(Runs.plain(np.array([stored]), np.array([size]), kind=ZERO, host=-1))
    return builder.finish()


def _with_holes(start: int, stop: int, first: Int64s, last: Int64s) -> Runs:
    """DATA on [first, last), ZERO between, over [start, stop)."""
    edges = np.empty(2 * len(first) + 2, np.int64)
    edges[0], edges[1:-1:2], edges[2:-1:2], edges[-1] = start, first, last, stop
    kind = np.full(len(edges) - 1, ZERO, np.int8)
    kind[1::2] = DATA
    held = edges[1:] > edges[:-1]
    begin = edges[:-1][held]
    host = np.where(kind[held] == DATA, begin, -1)
    return Runs(begin, edges[1:][held], kind[held], host, np.zeros(len(begin), np.int32))
