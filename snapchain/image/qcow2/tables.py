"""L1, L2 and refcount tables as numpy arrays, read in batches of bounded size.

A table is only followed after its offset has been checked. Tables in a hole of the file are not read, so a sparse file
with millions of tables costs no more than its L1 table.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snapchain.errors import Corrupt
from snapchain.image.holes import stored_range
from snapchain.image.physical import Int64s, Mask
from snapchain.image.pread import pread_into
from snapchain.image.qcow2.format import L1_RESERVED, OFFSET_MASK, REFCOUNT_TABLE_RESERVED
from snapchain.image.qcow2.header import Qcow2Header

UInt64s = npt.NDArray[np.uint64]
BATCH_BYTES = 2 << 20
BATCH_CLUSTERS = 16384
_SLICE = 1 << 18


@dataclass(frozen=True, slots=True)
class ImageFd:
    """An open qcow2 file, for the table readers. size: of the file, in bytes."""

    fd: int
    size: int
    header: Qcow2Header
    subject: object

    def entries(self, offset: int, count: int) -> UInt64s:
        """A table of `count` big-endian u64, in native order."""
        table = np.empty(count, np.uint64)
        pread_into(self.fd, table.data.cast("B"), offset=offset, subject=self.subject)
        return table.byteswap(inplace=True)

    def check_places(self, what: str, offsets: Int64s) -> None:
        """Raises Corrupt unless each offset is a whole, aligned cluster inside the file."""
        size = self.header.cluster_size
        unaligned = (offsets & (size - 1)) != 0
        if unaligned.any():
            raise Corrupt(
                f"{what} at offset {int(offsets[unaligned.argmax()])} is not aligned to a cluster", subject=self.subject
            )
        if len(offsets) and int(offsets.max()) + size > self.size:
            raise Corrupt(
                f"{what} at offset {int(offsets.max())} lies outside the file of {self.size} bytes",
                subject=self.subject,
            )


def read_l1(image: ImageFd) -> tuple[npt.NDArray[np.int32], Int64s]:
    """(index, offset) of the L2 tables that exist, in guest order."""
    table = image.entries(image.header.fields.l1_table_offset, image.header.l1_entries)
    reserved = np.bitwise_or.reduce(table, initial=np.uint64(0)) & np.uint64(L1_RESERVED)
    if reserved:
        wrong = int(((table & np.uint64(L1_RESERVED)) != 0).argmax())
        raise Corrupt(f"L1 entry {wrong} ({int(table[wrong]):#x}) has reserved bits set", subject=image.subject)
    table &= np.uint64(OFFSET_MASK)
    index = np.flatnonzero(table).astype(np.int32)
    offset: Int64s = table.view(np.int64)
    if len(index) < len(table):
        offset = offset[index]
    image.check_places("L2 table", offset)
    return index, offset


def read_refcount_blocks(image: ImageFd) -> Int64s:
    """Offsets of the refcount blocks."""
    fields = image.header.fields
    count = fields.refcount_table_clusters << (fields.cluster_bits - 3)
    table = image.entries(fields.refcount_table_offset, count)
    offset = table[table != 0]
    if (offset & np.uint64(REFCOUNT_TABLE_RESERVED | 1 << 63)).any():
        raise Corrupt("a refcount table entry has reserved bits set", subject=image.subject)
    blocks: Int64s = offset.view(np.int64)
    image.check_places("refcount block", blocks)
    return blocks


def l2_batches(image: ImageFd, index: npt.NDArray[np.int32], offset: Int64s) -> Iterator[tuple[Int64s, UInt64s]]:
    """(guest offset of each row, rows as uint64[count, words]) in guest order; rows are tables or parts of them.

    A batch holds BATCH_CLUSTERS clusters where they may split into subclusters, else BATCH_BYTES of tables.
    """
    size = image.header.cluster_size
    if len(offset) * size > os.fstat(image.fd).st_blocks * 512:
        held = _outside_holes(image, offset)
        index, offset = index[held], offset[held]
    step = max(1, BATCH_BYTES // size)
    for first in range(0, len(offset), step):
        guest = index[first : first + step].astype(np.int64) * image.header.guest_bytes_per_l2
        tables = read_clusters(image, offset[first : first + step])
        if image.header.extended_l2:
            yield from _cut(guest, tables, size)
        else:
            yield guest, tables


def _cut(guest: Int64s, tables: UInt64s, cluster_size: int) -> Iterator[tuple[Int64s, UInt64s]]:
    """Extended tables in smaller batches: each entry may become 32 runs."""
    width = min(tables.shape[1] // 2, BATCH_CLUSTERS)
    parts = np.arange(0, tables.shape[1] // 2, width, dtype=np.int64)
    starts = (guest[:, None] + parts * cluster_size).ravel()
    rows = tables.reshape(-1, 2 * width)
    step = BATCH_CLUSTERS // width
    for first in range(0, len(rows), step):
        yield starts[first : first + step], rows[first : first + step]


def read_clusters(image: ImageFd, offset: Int64s) -> UInt64s:
    """These clusters, one a row; neighbours in the file are read with one call."""
    size = image.header.cluster_size
    tables = np.empty((len(offset), size // 8), np.uint64)
    buffer = tables.data.cast("B")
    order = np.argsort(offset)
    placed = offset[order]
    breaks = np.flatnonzero(np.diff(placed) != size) + 1
    firsts = np.concatenate([[0], breaks])
    lasts = np.concatenate([breaks, [len(placed)]])
    for first, last, start in zip(firsts.tolist(), lasts.tolist(), placed[firsts].tolist(), strict=True):
        pread_into(image.fd, buffer[first * size : last * size], offset=start, subject=image.subject)
    tables.byteswap(inplace=True)
    if (order[1:] > order[:-1]).all():
        return tables
    sorted_back = np.empty_like(tables)
    sorted_back[order] = tables
    return sorted_back


def _outside_holes(image: ImageFd, offset: Int64s) -> Mask:
    """Which clusters are not wholly in a hole of the file (a hole reads as zeroes: a table that maps nothing)."""
    size = image.header.cluster_size
    placed = np.sort(offset)
    # Starts and ends of clusters that may hold data: the file's extents that tables lie in.
    edges: list[int] = []
    at = 0
    while at < len(placed):
        found = stored_range(image.fd, int(placed[at]), size=image.size, subject=image.subject)
        if found is None:
            break
        data, hole = found
        # A cluster that begins before the data may reach into it. Two extents may share a cluster.
        edges += [max(data - size + 1, edges[-1] if edges else 0), hole]
        at = int(placed.searchsorted(hole, side="left"))
    del placed
    held = np.zeros(len(offset), np.bool_)
    if edges:
        bounds = np.array(edges, np.int64)
        for first in range(0, len(offset), _SLICE):
            part = slice(first, first + _SLICE)
            held[part] = np.searchsorted(bounds, offset[part], side="right") % 2 == 1
    return held
