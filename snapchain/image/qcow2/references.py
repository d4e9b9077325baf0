"""How often the tables of a qcow2 file use each host cluster: the counts that its refcount blocks should hold.

Counts the header, refcount table and blocks, the whole L1 table (also beyond the guest's end), L2 tables, data
clusters, compressed clusters by every host cluster that they touch, and persistent bitmaps.  Internal snapshots are
not followed: an image with snapshots uses more than is counted here.
Source: docs/interop/qcow2.txt, and `check` in block/qcow2-refcount.c of QEMU 7.2, which counts the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from snapchain.errors import Corrupt
from snapchain.image.physical import Int64s
from snapchain.image.pread import pread
from snapchain.image.qcow2.format import (
    BITMAP_ENTRY,
    COMPRESSED,
    L1_RESERVED,
    OFFSET_MASK,
    compressed_offset_bits,
)
from snapchain.image.qcow2.tables import ImageFd, UInt64s, l2_batches, read_refcount_blocks
from snapchain.model.extents import counted

UInt32s = npt.NDArray[np.uint32]


def whole_l1(image: ImageFd) -> UInt64s:
    """uint64[l1_size], every entry of the L1 table as stored; raises Corrupt for one that points outside the file."""
    table = image.entries(image.header.fields.l1_table_offset, image.header.fields.l1_size)
    if ((table & np.uint64(L1_RESERVED)) != 0).any():
        raise Corrupt("an L1 entry has reserved bits set", subject=image.subject)
    image.check_places("L2 table", host_offsets(table[table != 0]))
    return table


def host_offsets(entries: UInt64s) -> Int64s:
    """The host offsets in L1 entries, or in plain L2 entries; 0 for none."""
    return (entries & np.uint64(OFFSET_MASK)).view(np.int64)


def references(image: ImageFd) -> UInt32s:
    """uint32[clusters of the file], how often each is used. Raises Corrupt for a reference outside the file."""
    fields, header = image.header.fields, image.header
    count = _Count(image)
    count.range(0, header.cluster_size)
    count.range(fields.refcount_table_offset, fields.refcount_table_clusters * header.cluster_size)
    count.range(fields.l1_table_offset, fields.l1_size * 8)
    count.clusters(read_refcount_blocks(image))
    offset = host_offsets(whole_l1(image))
    index = np.flatnonzero(offset).astype(np.int32)
    offset = offset[index]
    count.clusters(offset)
    for _, tables in l2_batches(image, index, offset):
        entries = tables[:, 0::2] if header.extended_l2 else tables
        count.entries(entries[entries != 0])
    _count_bitmaps(image, count)
    return count.found()


class _Count:
    """Uses of host clusters, added up."""

    def __init__(self, image: ImageFd) -> None:
        self._image = image
        self._bits = image.header.cluster_bits
        self._counts = np.zeros(-(-image.size >> self._bits), np.uint32)

    def found(self) -> UInt32s:
        return self._counts

    def range(self, offset: int, length: int) -> None:
        """Count the clusters of a range of the file."""
        if length:
            last = (offset + length - 1) >> self._bits
            if last >= len(self._counts):
                raise Corrupt(f"a table at offset {offset} lies outside the file", subject=self._image.subject)
            self._counts[offset >> self._bits : last + 1] += np.uint32(1)

    def clusters(self, offsets: Int64s) -> None:
        """Count whole clusters."""
        self._add(offsets >> self._bits)

    def entries(self, entries: UInt64s) -> None:
        """Count the clusters that L2 entries point to."""
        squeezed = (entries & np.uint64(COMPRESSED)) != 0
        if squeezed.any():
            self._compressed(entries[squeezed])
            entries = entries[~squeezed]
        host = host_offsets(entries)
        self.clusters(host[host != 0])

    def _compressed(self, entries: UInt64s) -> None:
        bits = compressed_offset_bits(self._bits)
        packed = entries.view(np.int64) & np.int64(COMPRESSED - 1)
        begin = packed & np.int64((1 << bits) - 1)
        last = (((begin >> 9) + (packed >> bits) + 1) << 9) - 1
        # The last sector may reach beyond the end of the file.
        first, last = begin >> self._bits, np.minimum(last >> self._bits, len(self._counts) - 1)
        length = np.maximum(last - first + 1, 1)
        touched = np.repeat(first, length)
        touched += np.arange(len(touched)) - np.repeat(np.cumsum(length) - length, length)
        self._add(touched)

    def _add(self, clusters: Int64s) -> None:
        if not len(clusters):
            return
        places, times = counted(clusters)
        if int(places[-1]) >= len(self._counts):
            raise Corrupt(
                f"cluster {int(places[-1])} is used, but the file has {len(self._counts)}", subject=self._image.subject
            )
        self._counts[places] += times.astype(np.uint32)


def _count_bitmaps(image: ImageFd, count: _Count) -> None:
    """Count persistent bitmaps: their directory, and the table and clusters of each."""
    offset, length = image.header.bitmap_directory
    count.range(offset, length)
    directory = pread(image.fd, length, offset=offset, subject=image.subject) if length else b""
    at = 0
    while at + BITMAP_ENTRY.size <= len(directory):
        table_offset, table_entries, _, _, _, name_size, extra = BITMAP_ENTRY.unpack_from(directory, at)
        at += -(-(BITMAP_ENTRY.size + extra + name_size) // 8) * 8
        if table_offset + table_entries * 8 > image.size:
            raise Corrupt("a bitmap's table lies outside the file", subject=image.subject)
        count.range(table_offset, table_entries * 8)
        host = host_offsets(image.entries(table_offset, table_entries))
        count.clusters(host[host != 0])
