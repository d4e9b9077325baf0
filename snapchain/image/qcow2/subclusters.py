"""Extended L2 entries: a standard descriptor, then a bit for each of 32 subclusters "allocated" and "reads as zeroes".

Entries whose subclusters are all alike are treated as whole clusters; only mixed ones are spread out into 32 cells.
`l2_batches` hands over a bounded number at a time.  Source: docs/interop/qcow2.txt, "Extended L2 Entries".
"""

from __future__ import annotations

import numpy as np

from snapchain.errors import Corrupt
from snapchain.image.physical import Int64s, Runs
from snapchain.image.qcow2.entries import (
    Cells,
    Decoded,
    cluster_offsets,
    compressed_entries,
    compressed_runs,
    in_guest_order,
    place,
)
from snapchain.image.qcow2.format import COMPRESSED, COPIED, L2_RESERVED, OFFSET_MASK, SUBCLUSTERS, ZERO_FLAG
from snapchain.image.qcow2.tables import ImageFd, UInt64s
from snapchain.model.extents import ABSENT, DATA, ZERO

_ALL = (1 << SUBCLUSTERS) - 1


def decode_extended(image: ImageFd, guest: Int64s, tables: UInt64s) -> Decoded:
    """Tables of 16-byte entries, one a row. Raises Corrupt for entries that break the format."""
    descriptor = np.ascontiguousarray(tables[:, 0::2])
    bitmap = np.ascontiguousarray(tables[:, 1::2])
    allocated, zero = bitmap & np.uint64(_ALL), bitmap >> np.uint64(SUBCLUSTERS)
    compressed = compressed_entries(image, guest, descriptor)
    host = cluster_offsets(image, guest, descriptor, compressed, reserved=L2_RESERVED | ZERO_FLAG)
    wrong = ((allocated & zero) != 0) | ((host == 0) & (allocated != 0))
    if compressed is not None:
        wrong |= compressed & (bitmap != 0)
    if wrong.any():
        raise Corrupt(
            f"subcluster bitmap that contradicts itself or its cluster, {place(guest, wrong, image)}",
            subject=image.subject,
        )
    kind = np.full(host.shape, ABSENT, np.int8)
    kind[allocated == _ALL] = DATA
    kind[zero == _ALL] = ZERO
    parts = [Cells(kind, host, guest, image.header.cluster_size).runs()]
    if compressed is not None:
        parts.append(compressed_runs(image, guest, descriptor, compressed))
    mixed = (bitmap != 0) & (kind == ABSENT)
    if mixed.any():
        row, column = np.nonzero(mixed)
        start = guest[row] + column * image.header.cluster_size
        parts.append(_spread(image, start, host[row, column], bitmap[row, column]))
    return Decoded(in_guest_order(*parts), host[host != 0], misread_bitmaps(image, bitmap[bitmap != 0]))


def misread_bitmaps(image: ImageFd, bitmaps: UInt64s) -> Int64s | None:
    """Where bitmaps would point, were they standard L2 entries; None when one of them cannot be such an entry.

    An image whose extended L2 bit is set by mistake or malice has an entry in the place of every second bitmap. QEMU
    would show other bytes than were written and call the rest leaked; a true bitmap hardly ever looks like that.
    """
    host = (bitmaps & np.uint64(OFFSET_MASK)).view(np.int64)
    alike = (bitmaps & np.uint64(L2_RESERVED | ZERO_FLAG | COMPRESSED)) == 0
    alike &= (bitmaps & np.uint64(COPIED)) != 0
    alike &= (host != 0) & (host < image.size) & ((host & (image.header.cluster_size - 1)) == 0)
    return host if alike.all() else None


def _spread(image: ImageFd, start: Int64s, host: Int64s, bitmap: UInt64s) -> Runs:
    """The subclusters of these clusters."""
    unit = image.header.grain
    bit = np.arange(SUBCLUSTERS, dtype=np.uint64)
    bits = bitmap[:, None] >> bit
    kind = np.full(bits.shape, ABSENT, np.int8)
    kind[(bits & np.uint64(1)) != 0] = DATA
    kind[(bits >> np.uint64(SUBCLUSTERS) & np.uint64(1)) != 0] = ZERO
    return Cells(kind, host[:, None] + bit.view(np.int64) * unit, start, unit).runs()
