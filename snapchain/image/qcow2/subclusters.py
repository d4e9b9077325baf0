"""Extended L2 entries: a standard descriptor, then a bit for each of 32 subclusters "allocated" and "reads as zeroes".

Entries whose subclusters are all alike are treated as whole clusters; only mixed ones are spread out into 32 cells,
a bounded number at a time.  Source: docs/interop/qcow2.txt, "Extended L2 Entries".
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
from snapchain.image.qcow2.format import L2_RESERVED, SUBCLUSTERS, ZERO_FLAG
from snapchain.image.qcow2.tables import ImageFd, UInt64s
from snapchain.model.extents import ABSENT, DATA, ZERO

_ALL = (1 << SUBCLUSTERS) - 1
_SPREAD = 16384


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
    return Decoded(in_guest_order(*parts), host[host != 0])


def _spread(image: ImageFd, start: Int64s, host: Int64s, bitmap: UInt64s) -> Runs:
    """The subclusters of these clusters."""
    unit = image.header.grain
    bit = np.arange(SUBCLUSTERS, dtype=np.uint64)
    parts: list[Runs] = []
    for first in range(0, len(start), _SPREAD):
        chosen = slice(first, first + _SPREAD)
        bits = bitmap[chosen, None] >> bit
        kind = np.full(bits.shape, ABSENT, np.int8)
        kind[(bits & np.uint64(1)) != 0] = DATA
        kind[(bits >> np.uint64(SUBCLUSTERS) & np.uint64(1)) != 0] = ZERO
        places = host[chosen, None] + bit.view(np.int64) * unit
        parts.append(Cells(kind, places, start[chosen], unit).runs())
    return Runs.concatenated(*parts)
