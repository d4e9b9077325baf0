"""Whether the reference counts of a qcow2 file match its tables, as in `qemu-img check`, in numpy.

    stored    the counts in the refcount blocks, of any width from 1 to 64 bits
    counted   how often header, tables, data clusters and compressed clusters use each host cluster (`references`)

More stored than counted is a leak, which only wastes space; less is an error, and a guest's next write may destroy
data.  Internal snapshots are not counted.
Source: docs/interop/qcow2.txt, "Host cluster management".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from snapchain.image.physical import Int64s
from snapchain.image.pread import pread
from snapchain.image.qcow2.references import UInt32s, references
from snapchain.image.qcow2.tables import ImageFd, UInt64s, read_refcount_blocks

_AT_MOST = (1 << 32) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Refcounts:
    """uint32[clusters], each cluster's references by the refcount blocks and by the tables.

    Covers the file, and any cluster beyond its end that has a count.
    """

    stored: UInt32s
    counted: UInt32s

    @property
    def leaks(self) -> int:
        """Clusters that are used less often than the blocks say."""
        return int((self.stored > self.counted).sum())

    @property
    def errors(self) -> int:
        """Clusters that are used more often than the blocks say."""
        return int((self.stored < self.counted).sum())


def refcounts(image: ImageFd) -> Refcounts:
    """The counts of a whole file; raises Corrupt for tables outside it."""
    counted = references(image)
    found = [(first, counts) for first, _, counts in stored_blocks(image) if counts.any()]
    length = max([len(counted), *(first + int(np.flatnonzero(counts)[-1]) + 1 for first, counts in found)])
    stored = np.zeros(length, np.uint32)
    for first, counts in found:
        piece = counts[: length - first]
        stored[first : first + len(piece)] = np.minimum(piece, np.uint64(_AT_MOST))
    return Refcounts(stored, np.pad(counted, (0, length - len(counted))))


def refcount_table(image: ImageFd) -> Int64s:
    """int64[entries], offset of each refcount block, 0 for none; raises Corrupt for wrong ones."""
    read_refcount_blocks(image)  # checks the entries
    fields = image.header.fields
    table = image.entries(fields.refcount_table_offset, fields.refcount_table_clusters << (fields.cluster_bits - 3))
    return table.view(np.int64)


def stored_blocks(image: ImageFd) -> Iterator[tuple[int, int, UInt64s]]:
    """(first cluster, file offset, uint64[counts per block]) of each refcount block."""
    table = refcount_table(image)
    per_block = counts_per_block(image)
    for number in np.flatnonzero(table).tolist():
        yield number * per_block, int(table[number]), read_block(image, int(table[number]))


def counts_per_block(image: ImageFd) -> int:
    """Host clusters that one refcount block counts."""
    return image.header.cluster_size * 8 >> image.header.fields.refcount_order


def read_block(image: ImageFd, offset: int) -> UInt64s:
    """uint64[counts per block], the block at a file offset."""
    block = pread(image.fd, image.header.cluster_size, offset=offset, subject=image.subject)
    return unpack_counts(block, 1 << image.header.fields.refcount_order)


def unpack_counts(block: bytes, bits: int) -> UInt64s:
    """The counts of one block; below a byte the first count lies in the lowest bits."""
    if bits >= 8:
        return np.frombuffer(block, f">u{bits // 8}").astype(np.uint64)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    raw = np.frombuffer(block, np.uint8)
    return ((raw[:, None] >> shifts) & np.uint8((1 << bits) - 1)).astype(np.uint64).ravel()


def pack_counts(counts: UInt64s, bits: int) -> bytes:
    """The reverse of `unpack_counts`; below a byte the counts must fill whole bytes."""
    if bits >= 8:
        return counts.astype(f">u{bits // 8}").tobytes()
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    cells = counts.astype(np.uint8).reshape(-1, 8 // bits) << shifts
    packed: np.ndarray[tuple[int], np.dtype[np.uint8]] = np.bitwise_or.reduce(cells, axis=1).astype(np.uint8)
    return packed.tobytes()
