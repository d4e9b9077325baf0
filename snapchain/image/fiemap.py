"""The physical location of a file's blocks, to prove that two ranges are one piece of disk.

Two ranges with the same blocks hold the same bytes, so neither needs to be read.  Extents without a plain location
(encoded, inline, delayed, unknown) prove nothing.  Only XFS and Btrfs are queried: elsewhere one number may mean
places on several devices (overlayfs, bcachefs), as with the realtime device of XFS.
Source: Linux Documentation/filesystems/fiemap.rst, include/uapi/linux/{magic,fs}.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import struct
import sys
from dataclasses import dataclass

import numpy as np

from snapchain.image.physical import Int64s, Mask
from snapchain.model.extents import distinct

_FIEMAP = 0xC020660B
_HEAD = struct.Struct("=QQIIII")
_SYNC = 1
_LAST, _UNWRITTEN, _MERGED, _SHARED = 0x1, 0x800, 0x1000, 0x2000
_PLAIN = _LAST | _UNWRITTEN | _MERGED | _SHARED
_EXTENT = np.dtype(
    [
        ("logical", "<u8"),
        ("physical", "<u8"),
        ("length", "<u8"),
        ("reserved64", "<u8", 2),
        ("flags", "<u4"),
        ("reserved", "<u4", 3),
    ]
)
_BATCH = 4096
_UNKNOWN = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EBADR}
_ONE_PLACE_A_NUMBER = {0x58465342, 0x9123683E}
"""XFS, Btrfs."""
_FSGETXATTR = 0x801C581F
_FSXATTR = struct.Struct("=IIIII8x")
_REALTIME = 0x1


@dataclass(frozen=True, slots=True, eq=False)
class DiskMap:
    """A file's extents with a plain location: columns of equal length, ascending. All in bytes.

    key: physical less logical, so equal for bytes of one extent; unwritten: the blocks read as zeroes
    """

    start: Int64s
    stop: Int64s
    key: Int64s
    unwritten: Mask

    @property
    def edges(self) -> Int64s:
        """Every offset where an extent begins or ends, ascending."""
        return distinct(self.start, self.stop)


def disk_map(fd: int, *, size: int) -> DiskMap | None:
    """The extents of a file, after its dirty pages are written; None where the filesystem does not report them."""
    if not _tells(fd):
        return None
    found: list[np.ndarray[tuple[int], np.dtype[np.void]]] = []
    at = 0
    while at < size:
        buffer = bytearray(_HEAD.size + _BATCH * _EXTENT.itemsize)
        _HEAD.pack_into(buffer, 0, at, size - at, _SYNC, 0, _BATCH, 0)
        try:
            fcntl.ioctl(fd, _FIEMAP, buffer)
        except OSError as error:
            if error.errno in _UNKNOWN:
                return None
            raise
        count = _HEAD.unpack_from(buffer)[3]
        extents = np.frombuffer(buffer, _EXTENT, count, _HEAD.size)
        found.append(extents)
        if count < _BATCH or extents["flags"][-1] & _LAST:
            break
        at = int(extents["logical"][-1] + extents["length"][-1])
    rows = np.concatenate(found) if found else np.empty(0, _EXTENT)
    rows = rows[(rows["flags"] & ~np.uint32(_PLAIN)) == 0]
    start = rows["logical"].astype(np.int64)
    return DiskMap(
        start,
        start + rows["length"].astype(np.int64),
        rows["physical"].astype(np.int64) - start,
        (rows["flags"] & _UNWRITTEN) != 0,
    )


def _tells(fd: int) -> bool:
    """Whether equal physical offsets are equal places on this filesystem."""
    answer = bytearray(256)
    buffer = (ctypes.c_char * len(answer)).from_buffer(answer)
    # struct statfs begins with f_type, a long (an unsigned int on s390x, which is no matter here).
    if ctypes.CDLL(None).fstatfs(fd, buffer):
        return False
    if int.from_bytes(answer[: ctypes.sizeof(ctypes.c_long)], sys.byteorder) not in _ONE_PLACE_A_NUMBER:
        return False
    attributes = bytearray(_FSXATTR.size)
    try:
        fcntl.ioctl(fd, _FSGETXATTR, attributes)
    except OSError:
        return False
    return not _FSXATTR.unpack(attributes)[0] & _REALTIME


def same_blocks(one: DiskMap, at: Int64s, other: DiskMap, there: Int64s, length: Int64s) -> Mask:
    """Which ranges [at, at + length) of one file are the very blocks of [there, there + length) of the other."""
    row, skip, _ = _cut(at, length, one.edges)
    piece_at, piece_there = at[row] + skip, there[row] + skip
    piece_length = np.append(skip[1:], 0) - skip
    ends = np.append(row[1:] != row[:-1], True) if len(row) else np.empty(0, np.bool_)
    piece_length[ends] = length[row[ends]] - skip[ends]
    inner, more, _ = _cut(piece_there, piece_length, other.edges)
    row, piece_at, piece_there = row[inner], piece_at[inner] + more, piece_there[inner] + more
    mine, mine_zero, mine_held = _look(one, piece_at)
    theirs, theirs_zero, theirs_held = _look(other, piece_there)
    equal = mine_held & theirs_held & (mine == theirs) & (mine_zero == theirs_zero)
    same = np.ones(len(at), np.bool_)
    same[row[~equal]] = False
    return same


def _look(held: DiskMap, offsets: Int64s) -> tuple[Int64s, Mask, Mask]:
    """(place on the disk, whether unwritten, whether known) of each offset."""
    if not len(held.start):
        nothing = np.zeros(len(offsets), np.bool_)
        return np.zeros(len(offsets), np.int64), nothing, nothing
    extent = np.maximum(np.searchsorted(held.start, offsets, side="right") - 1, 0)
    known = (held.start[extent] <= offsets) & (offsets < held.stop[extent])
    return held.key[extent] + offsets, held.unwritten[extent], known


def _cut(start: Int64s, length: Int64s, edges: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Ranges cut at edges: (row of each part, bytes of the row before it, parts of each row)."""
    first = np.searchsorted(edges, start, side="right")
    parts = np.searchsorted(edges, start + length, side="left") - first + 1
    row = np.repeat(np.arange(len(start)), parts)
    part = np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)
    skip = np.zeros(len(row), np.int64)
    later = part > 0
    skip[later] = edges[first[row[later]] + part[later] - 1] - start[row[later]]
    return row, skip, parts
