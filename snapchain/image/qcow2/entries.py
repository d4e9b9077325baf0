"""L2 entries into runs: whole tables at a time, never an object per cluster.

    standard entry      bits 9-55 host offset, bit 0 reads as zeroes, bit 62 clear, bit 63 refcount is one
    compressed          bit 62 set; below it the host offset in bytes, above that the count of further sectors

`Cells` is the common shape behind them: rows of neighbouring guest cells (clusters here, subclusters in
`subclusters.py`), each with its kind and place.  Source: docs/interop/qcow2.txt, "L2 table entry".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from snapchain.errors import Corrupt
from snapchain.image.physical import Int8s, Int64s, Mask, Runs
from snapchain.image.qcow2.format import COMPRESSED, COPIED, L2_RESERVED, OFFSET_MASK, ZERO_FLAG, compressed_offset_bits
from snapchain.image.qcow2.tables import ImageFd, UInt64s
from snapchain.model.extents import ABSENT, DATA, ZERO

_THIN = 8
"""Tables with less than one used entry in so many are decoded entry by entry."""
_ZERO_KEY = np.int64(-(1 << 62))
_ABSENT_KEY = np.int64(-(1 << 62) + 1)


@dataclass(frozen=True, slots=True)
class Decoded:
    """One batch of L2 tables.

    runs: ZERO and DATA; clusters: host offsets of allocated plain clusters in guest order
    misread: see `subclusters.misread_bitmaps`; None where that has been ruled out
    """

    runs: Runs
    clusters: Int64s
    misread: Int64s | None = None


@dataclass(frozen=True, slots=True)
class Cells:
    """Rows of neighbouring cells of `unit` bytes; row i begins at guest offset `guest[i]`.

    kind: int8[rows, width]; host: int64[rows, width], used where DATA; guest: int64[rows]
    """

    kind: Int8s
    host: Int64s
    guest: Int64s
    unit: int

    def runs(self) -> Runs:
        """ZERO and DATA cells; DATA joined where contiguous in guest and host."""
        if (self.kind == ABSENT).all():
            return Runs.none()
        width = self.kind.shape[1]
        row_bytes = width * self.unit
        key = self.host - (np.arange(width, dtype=np.int64) * self.unit + self.guest[:, None])
        key[self.kind == ZERO] = _ZERO_KEY
        key[self.kind == ABSENT] = _ABSENT_KEY
        flat = key.ravel()
        fresh = np.empty(len(flat), np.bool_)
        fresh[0] = True
        np.not_equal(flat[1:], flat[:-1], out=fresh[1:])
        fresh[width::width] |= np.diff(self.guest) != row_bytes
        first = np.flatnonzero(fresh)
        last = np.append(first[1:], len(flat)) - 1
        kind = self.kind.ravel()[first]
        held = kind != ABSENT
        first, last, kind = first[held], last[held], kind[held]
        host = np.where(kind == DATA, self.host.ravel()[first], -1)
        return Runs(self._offset(first), self._offset(last) + self.unit, kind, host, np.zeros(len(first), np.int32))

    def _offset(self, cell: Int64s) -> Int64s:
        width = self.kind.shape[1]
        offset: Int64s = self.guest[cell // width] + cell % width * self.unit
        return offset


def decode_standard(image: ImageFd, guest: Int64s, tables: UInt64s) -> Decoded:
    """Tables of 8-byte entries, one a row. Raises Corrupt for entries that break the format."""
    guest, tables = _without_gaps(guest, tables, image.header.cluster_size)
    compressed = compressed_entries(image, guest, tables)
    zero = (tables & np.uint64(ZERO_FLAG)) != 0
    if compressed is not None:
        zero &= ~compressed
    if image.header.version == 2 and zero.any():
        raise Corrupt(f"zero cluster in a version 2 image, {place(guest, zero, image)}", subject=image.subject)
    host = cluster_offsets(image, guest, tables, compressed, reserved=L2_RESERVED)
    kind = np.where(host != 0, np.int8(DATA), np.int8(ABSENT))
    kind[zero] = ZERO
    runs = Cells(kind, host, guest, image.header.cluster_size).runs()
    if compressed is not None:
        runs = in_guest_order(runs, compressed_runs(image, guest, tables, compressed))
    return Decoded(runs, host[host != 0])


def _without_gaps(guest: Int64s, tables: UInt64s, cluster_size: int) -> tuple[Int64s, UInt64s]:
    """Sparse tables as rows of one entry each, without the empty ones: the cost follows the mapped entries."""
    width = tables.shape[1]
    cell = np.flatnonzero(tables)
    if len(cell) * _THIN > tables.size:
        return guest, tables
    return guest[cell // width] + cell % width * cluster_size, tables.reshape(-1)[cell][:, None]


def compressed_entries(image: ImageFd, guest: Int64s, tables: UInt64s) -> Mask | None:
    """The mask of compressed entries; None for none, which saves the passes for them."""
    seen = int(np.bitwise_or.reduce(tables, axis=None))
    if not seen & COMPRESSED:
        return None
    compressed: Mask = (tables & np.uint64(COMPRESSED)) != 0
    copied = compressed & ((tables & np.uint64(COPIED)) != 0)
    if copied.any():
        raise Corrupt(f"compressed cluster with the copied flag, {place(guest, copied, image)}", subject=image.subject)
    return compressed


def cluster_offsets(
    image: ImageFd, guest: Int64s, tables: UInt64s, compressed: Mask | None, *, reserved: int
) -> Int64s:
    """Host offset of each plain cluster, 0 where there is none; aligned and inside the file, or Corrupt."""
    bad = (tables & np.uint64(reserved)) != 0
    host = (tables & np.uint64(OFFSET_MASK)).view(np.int64)
    if compressed is not None:
        bad &= ~compressed
        host[compressed] = 0
    if bad.any():
        raise Corrupt(f"L2 entry with reserved bits set, {place(guest, bad, image)}", subject=image.subject)
    unaligned = (host & (image.header.cluster_size - 1)) != 0
    if unaligned.any():
        raise Corrupt(
            f"data cluster at offset {int(host[unaligned][0])} is not aligned to a cluster, "
            f"{place(guest, unaligned, image)}",
            subject=image.subject,
        )
    outside = host >= image.size
    if outside.any():
        raise Corrupt(
            f"data cluster at offset {int(host[outside][0])} lies outside the file of {image.size} bytes, "
            f"{place(guest, outside, image)}",
            subject=image.subject,
        )
    return host


def compressed_runs(image: ImageFd, guest: Int64s, tables: UInt64s, compressed: Mask) -> Runs:
    """One run for each compressed cluster; checks that it lies in the file."""
    size = image.header.cluster_size
    bits = compressed_offset_bits(image.header.cluster_bits)
    cell = np.flatnonzero(compressed)
    entry = tables.ravel()[cell].view(np.int64) & np.int64(COMPRESSED - 1)
    start = guest[cell // tables.shape[1]] + cell % tables.shape[1] * size
    host = entry & np.int64((1 << bits) - 1)
    end = ((host >> 9) + (entry >> bits) + 1) << 9
    # QEMU ends the file where the data of the last one ends; its last sector may be partly missing.
    outside = (end - image.size >= 512) | (host >= image.size) | (host == 0)
    if outside.any():
        raise Corrupt(
            f"compressed cluster at offset {int(host[outside][0])} lies outside the file of {image.size} bytes, "
            f"at guest offset {int(start[outside][0])}",
            subject=image.subject,
        )
    kind = np.full(len(start), DATA, np.int8)
    return Runs(start, start + size, kind, host, (end - host).astype(np.int32))


def in_guest_order(*parts: Runs) -> Runs:
    """Runs of several kinds of entry, merged in guest order."""
    filled = [part for part in parts if len(part)]
    if len(filled) == 1:
        return filled[0]
    merged = Runs.concatenated(*parts)
    return merged[np.argsort(merged.start, kind="stable")]


def place(guest: Int64s, wrong: Mask, image: ImageFd) -> str:
    """The guest offset of the first wrong entry, for messages."""
    row, column = divmod(int(wrong.argmax()), wrong.shape[1])
    return f"at guest offset {int(guest[row]) + column * image.header.cluster_size}"
