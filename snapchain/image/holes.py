"""Where a file stores anything: its holes read as zeroes, and need not be read.

An image that was preallocated, or whose zeroes a copying tool has made holes, has clusters of which the file stores
nothing.  What they show is ZERO, and never ABSENT: they hide what lies below.
"""

from __future__ import annotations

import errno
import os

import numpy as np

from snapchain.errors import Unavailable
from snapchain.image.column import Column
from snapchain.image.physical import Int64s, Physical
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, covering, over

_BATCH = 65536


def stored_range(fd: int, offset: int, *, size: int, subject: object) -> tuple[int, int] | None:
    """The first stored range [start, stop) that ends behind `offset`, within `size`; None when only a hole follows.

    A file that cannot tell (block devices) stores everything. Raises Unavailable where the disk fails.
    """
    try:
        start = os.lseek(fd, offset, os.SEEK_DATA)
        stop = os.lseek(fd, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno == errno.EINVAL:
            return (offset, size) if offset < size else None
        raise Unavailable(f"cannot look for holes at offset {offset}: {error.strerror}", subject=subject) from error
    return (start, min(stop, size)) if start < size else None


def without_holes(physical: Physical, fd: int, *, file_bytes: int, grain: int, subject: object) -> Extents:
    """The map of a qcow2 file as it reads: its DATA is ZERO where the whole cell behind it is a hole of the file.

    grain: bytes of a cell, cluster or subcluster. Compressed clusters stay DATA. A filesystem that tells no holes, and
    one that counts preallocated blocks as stored, leave more DATA, which reads as zeroes.
    Cost follows the runs of the map and the stretches that the file stores. Errors as `stored_range`.
    """
    extents = physical.extents()
    plain = (physical.kind == DATA) & (physical.stored == 0)
    if not plain.any():
        return extents
    host, guest = physical.host[plain], physical.start[plain]
    length = physical.ends[plain] - guest
    del plain
    lowest, highest = int(host.min()), int((host + length).max())
    start, stop = _holes(fd, lowest, min(highest, file_bytes), least=min(grain, int(length.min())), subject=subject)
    if not len(start):
        return extents
    # In parts, of which each is small once neighbours are joined: one hole can be behind millions of runs.
    first, last = Column(np.int64), Column(np.int64)
    for at in range(0, len(host), _BATCH):
        part = slice(at, at + _BATCH)
        begin, end = _meetings(host[part], guest[part], length[part], start, stop)
        begin = -(-begin // grain) * grain
        # The last cell of a disk may be cut by its end.
        end = np.where(end == physical.size, end, end // grain * grain)
        found = covering(physical.size, begin, end)
        held = found.val == DATA
        first.append(found.at[held])
        last.append(found.ends[held])
    del host, guest, length
    zero = covering(physical.size, first.take(), last.take())
    return over(extents, zero.mapped(np.where(zero.val == DATA, ZERO, ABSENT)))


def _meetings(host: Int64s, guest: Int64s, length: Int64s, start: Int64s, stop: Int64s) -> tuple[Int64s, Int64s]:
    """Guest ranges [begin, end) of the runs behind which one of the holes [start, stop) of the file is."""
    first = np.searchsorted(stop, host, side="right")
    count = np.maximum(np.searchsorted(start, host + length, side="left") - first, 0)
    row = np.repeat(np.arange(len(host)), count)
    hole = first[row] + np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    begin = guest[row] + np.maximum(start[hole] - host[row], 0)
    end = guest[row] + np.minimum(stop[hole] - host[row], length[row])
    return begin, end


def _holes(fd: int, start: int, stop: int, *, least: int, subject: object) -> tuple[Int64s, Int64s]:
    """(start, stop) of the holes of a file within a range, ascending; only those of `least` bytes and more."""
    first, last = Column(np.int64), Column(np.int64)
    at = start
    while at < stop:
        begins: list[int] = []
        ends: list[int] = []
        while at < stop and len(begins) < _BATCH:
            found = stored_range(fd, at, size=stop, subject=subject)
            stored, after = (stop, stop) if found is None else found
            if stored - at >= least:
                begins.append(at)
                ends.append(stored)
            at = after
        first.append(np.array(begins, np.int64))
        last.append(np.array(ends, np.int64))
    return first.take(), last.take()
