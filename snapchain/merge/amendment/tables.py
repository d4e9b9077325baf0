"""The L2 tables that change, and those that come; and the L1 table, made anew where the disk outgrows it.

    end of the file | new data clusters | new L2 tables | new L1 table

New tables are written before anything points to them.  Entries in old ones are changed by whole sectors, and each is
right by itself: none relies on another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from snapchain.errors import Unsupported
from snapchain.image.physical import Int64s, Mask
from snapchain.image.pread import pread
from snapchain.image.qcow2.format import COPIED, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, SECTOR
from snapchain.image.qcow2.refcounts import counts_per_block, pack_counts, read_block, refcount_table, stored_blocks
from snapchain.image.qcow2.references import host_offsets
from snapchain.image.qcow2.tables import ImageFd, UInt64s
from snapchain.merge.amendment.plan import Amendment


class Tables:
    """Of one amendment. end: of the file with them, in bytes; l1_offset, l1_size: of the L1 table then, in entries."""

    def __init__(self, amendment: Amendment, image: ImageFd, l1: UInt64s) -> None:
        """l1: as it stands. Raises Unsupported where it would become too large."""
        header = image.header
        self._image = image
        self._size = header.cluster_size
        self._words = 2 if header.extended_l2 else 1
        per_table = self._size // 8 // self._words
        self._entry, self._bitmap = amendment.entry, amendment.bitmap
        self._within = amendment.cluster % per_table
        number = amendment.cluster // per_table
        self._cuts = np.append(np.flatnonzero(np.diff(number, prepend=-1)), len(number))
        self._used: Int64s = number[self._cuts[:-1]]
        needed = -(-amendment.view.size // header.guest_bytes_per_l2)
        if needed * 8 > MAX_L1_BYTES:
            raise Unsupported("the disk is too large for its clusters", subject=image.subject)
        self._old_l1 = l1
        l1 = np.pad(l1, (0, max(needed - len(l1), 0)))
        old = host_offsets(l1[self._used])
        # A table without any entry need not be made.
        self._new = (old == 0) & self._has_entries()
        begin = amendment.end + amendment.new_clusters * self._size
        self._offset: Int64s = np.where(self._new, begin + (np.cumsum(self._new) - 1) * self._size, old)
        self.end = begin + int(self._new.sum()) * self._size
        l1[self._used[self._new]] = self._offset[self._new].view(np.uint64) | np.uint64(COPIED)
        self._l1 = l1
        self.l1_size = len(l1)
        self.l1_offset = header.fields.l1_table_offset
        if len(l1) > len(self._old_l1):
            self.l1_offset = self.end
            self.end += -(-len(l1) * 8 // self._size) * self._size

    def _has_entries(self) -> Mask:
        if not len(self._used):
            return np.zeros(0, np.bool_)
        entries = self._entry if self._bitmap is None else self._entry | self._bitmap
        something: Mask = np.bitwise_or.reduceat(entries, self._cuts[:-1]) != 0
        return something

    def fresh(self) -> Iterator[tuple[int, bytes]]:
        """(file offset, bytes) of new tables, which nothing points to yet."""
        for part in np.flatnonzero(self._new).tolist():
            table = np.zeros(self._size // 8, ">u8")
            self._put(table, part, 0)
            yield int(self._offset[part]), table.tobytes()
        if len(self._l1) > len(self._old_l1):
            yield self.l1_offset, self._l1.astype(">u8").tobytes()

    def changed(self) -> Iterator[tuple[int, bytes]]:
        """(file offset, bytes): the sectors of old tables in which entries change."""
        for part in np.flatnonzero(~self._new & (self._offset != 0)).tolist():
            rows = slice(self._cuts[part], self._cuts[part + 1])
            words = self._within[rows] * self._words
            first = int(words[0]) * 8 // SECTOR * SECTOR
            stop = -(-(int(words[-1]) + self._words) * 8 // SECTOR) * SECTOR
            offset = int(self._offset[part])
            old = pread(self._image.fd, stop - first, offset=offset + first, subject=self._image.subject)
            table = np.frombuffer(old, ">u8").copy()
            self._put(table, part, first // 8)
            yield offset + first, table.tobytes()

    def _put(self, table: np.ndarray[tuple[int], np.dtype[np.uint64]], part: int, skipped: int) -> None:
        """The entries of a table into it, or into what is left of it without its first words."""
        rows = slice(self._cuts[part], self._cuts[part + 1])
        words = self._within[rows] * self._words - skipped
        table[words] = self._entry[rows]
        if self._bitmap is not None:
            table[words + 1] = self._bitmap[rows]

    def l1_entries(self) -> Iterator[tuple[int, bytes]]:
        """(file offset, bytes) of the entries in the old L1 table that point to new tables."""
        new = self._used[self._new]
        if len(self._l1) > len(self._old_l1) or not len(new):
            return
        for run in np.split(new, np.flatnonzero(np.diff(new) != 1) + 1):
            first, last = int(run[0]), int(run[-1])
            yield self.l1_offset + first * 8, self._l1[first : last + 1].astype(">u8").tobytes()


# --- Reference counts for clusters that come at the end of a file, before anything points to them.
#
# Where the blocks that are there reach far enough, they are changed; else table and blocks are made anew behind the new
# clusters, with counts for themselves, and the header is pointed to them.  Counts only grow here: what is too high in
# the end is a leak, which `settle` mends.


@dataclass(frozen=True, slots=True)
class NewCounts:
    """writes: (file offset, bytes); end: of the file then; table_offset, table_clusters: of a new table, if any."""

    writes: list[tuple[int, bytes]]
    end: int
    table_offset: int | None = None
    table_clusters: int = 0


def count_new(image: ImageFd, *, start: int, end: int) -> NewCounts:
    """One reference for each cluster in [start, end) of the file; what they had counts no more."""
    if start == end:
        return NewCounts([], end)
    size, bits = image.header.cluster_size, 1 << image.header.fields.refcount_order
    per_block = counts_per_block(image)
    table = refcount_table(image)
    first, last = start // size // per_block, (end // size - 1) // per_block
    if last >= len(table) or (table[first : last + 1] == 0).any():
        return _anew(image, start=start, end=end)
    writes = []
    for number in range(first, last + 1):
        counts = read_block(image, int(table[number]))
        begin = number * per_block
        counts[max(start // size - begin, 0) : min(end // size - begin, per_block)] = 1
        writes.append((int(table[number]), pack_counts(counts, bits)))
    return NewCounts(writes, end)


def _anew(image: ImageFd, *, start: int, end: int) -> NewCounts:
    size, bits = image.header.cluster_size, 1 << image.header.fields.refcount_order
    per_block = counts_per_block(image)
    blocks = table_clusters = 0
    while True:
        clusters = end // size + blocks + table_clusters
        need = -(-clusters // per_block)
        need_table = -(-need * 8 // size)
        if (need, need_table) == (blocks, table_clusters):
            break
        blocks, table_clusters = need, need_table
    if table_clusters * size > MAX_REFCOUNT_TABLE_BYTES:
        raise Unsupported("the file would be larger than qcow2 allows", subject=image.subject)
    counts = np.zeros(blocks * per_block, np.uint64)
    for begin, _, held in stored_blocks(image):
        # Counts behind the new end are leaks of clusters that are not there.
        piece = held[: max(len(counts) - begin, 0)]
        counts[begin : begin + len(piece)] = piece
    counts[start // size :] = 0
    counts[start // size : clusters] = 1
    table = np.zeros(table_clusters * size // 8, ">u8")
    table[:blocks] = end + (table_clusters + np.arange(blocks)) * size
    writes = [(end, table.tobytes())]
    for number in range(blocks):
        block = counts[number * per_block : (number + 1) * per_block]
        writes.append((end + (table_clusters + number) * size, pack_counts(block, bits)))
    return NewCounts(writes, clusters * size, end, table_clusters)
