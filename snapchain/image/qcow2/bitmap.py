"""The content of a persistent dirty bitmap: which pieces of the disk were written since it was made.

Source: docs/interop/qcow2.txt, "Bitmaps". A bitmap that QEMU had no time to save is void: its `in_use` flag is set.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from snapchain.errors import Corrupt, Unsupported
from snapchain.image.pread import file_bytes, pread
from snapchain.image.qcow2.format import BITMAP_ENTRY, OFFSET_MASK
from snapchain.image.qcow2.header import Qcow2Header

Bits = npt.NDArray[np.bool_]
_IN_USE = 1
_MOST_BITS = 1 << 30
_MOST_DIRECTORY = 1 << 20
_ALL_ONES = 1


def read_bitmap(fd: int, header: Qcow2Header, name: str, *, subject: object) -> tuple[int, Bits] | None:
    """Bytes of a piece, and bool[n]: whether each piece was written. None for no valid bitmap of this name.

    Raises Corrupt for one that contradicts the image, Unsupported for one of more than 2**30 pieces.
    """
    offset, length = header.bitmap_directory
    directory = pread(fd, min(length, _MOST_DIRECTORY), offset=offset, subject=subject) if offset else b""
    at = 0
    while at + BITMAP_ENTRY.size <= len(directory):
        table, entries, flags, _, granularity_bits, name_size, extra = BITMAP_ENTRY.unpack_from(directory, at)
        begin = at + BITMAP_ENTRY.size + extra
        if directory[begin : begin + name_size] == name.encode():
            if flags & _IN_USE or granularity_bits > 63:
                return None
            return 1 << granularity_bits, _bits(fd, header, table, entries, 1 << granularity_bits, subject)
        at = -(-(begin + name_size) // 8) * 8
    return None


def _bits(fd: int, header: Qcow2Header, table: int, entries: int, granularity: int, subject: object) -> Bits:
    count = -(-header.fields.size // granularity)
    if count > _MOST_BITS:
        raise Unsupported(f"a bitmap of {count} pieces", subject=subject)
    size = header.cluster_size
    per_cluster = size * 8
    if entries != -(-count // per_cluster) or table + 8 * entries > file_bytes(fd):
        raise Corrupt("a bitmap's table does not fit the disk", subject=subject)
    found = np.zeros(entries * per_cluster, np.bool_)
    for number, entry in enumerate(
        np.frombuffer(pread(fd, 8 * entries, offset=table, subject=subject), ">u8").tolist()
    ):
        part = found[number * per_cluster : (number + 1) * per_cluster]
        host = entry & OFFSET_MASK
        if not host:
            part[:] = entry & _ALL_ONES
            continue
        left = min(size, -(-(count - number * per_cluster) // 8))
        if host + left > file_bytes(fd):
            raise Corrupt("a bitmap's data lies outside the file", subject=subject)
        data = np.frombuffer(pread(fd, left, offset=host, subject=subject), np.uint8)
        part[: 8 * left] = np.unpackbits(data, bitorder="little").astype(np.bool_)
    return found[:count]
