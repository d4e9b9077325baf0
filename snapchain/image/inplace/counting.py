"""Reference counts for clusters that come at the end of a file, before anything points to them.

Where the blocks that are there reach far enough, they are changed; else table and blocks are made anew behind the new
clusters, with counts for themselves, and the header is pointed to them.  Counts only grow here: what is too high in
the end is a leak, which `settle` mends.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from snapchain.errors import Unsupported
from snapchain.image.qcow2.format import MAX_REFCOUNT_TABLE_BYTES
from snapchain.image.qcow2.refcounts import counts_per_block, pack_counts, read_block, refcount_table, stored_blocks
from snapchain.image.qcow2.tables import ImageFd


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
