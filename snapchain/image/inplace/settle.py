"""Reference counts made what the tables say, and the file cut behind its last used cluster.

Needs nothing but the file, so it is what is left to do after a crash, too.  Counts that are too low are raised first.
"""

from __future__ import annotations

import numpy as np

from snapchain.errors import Corrupt
from snapchain.image.inplace.disk import Disk
from snapchain.image.qcow2.refcounts import counts_per_block, pack_counts, stored_blocks
from snapchain.image.qcow2.references import references
from snapchain.image.qcow2.tables import ImageFd


def settle(fd: int, *, subject: object = None) -> int:
    """Of an image that nobody else has open, open for reading and writing; the bytes that were cut off.

    Raises Corrupt for tables that lie outside the file, or clusters without a place for their count.
    """
    disk = Disk(fd, subject=subject)
    image = disk.image()
    exact = references(image)
    _write_counts(disk, image, exact.astype(np.uint64))
    size = image.header.cluster_size
    used = np.flatnonzero(exact)
    end = (int(used[-1]) + 1) * size
    before = disk.size
    if end < before:
        disk.truncate(end)
        disk.sync()
    return max(before - end, 0)


def _write_counts(disk: Disk, image: ImageFd, exact: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
    bits = 1 << image.header.fields.refcount_order
    per_block = counts_per_block(image)
    counted = 0
    writes: list[tuple[int, bytes, bool]] = []
    for first, offset, stored in stored_blocks(image):
        wanted = np.zeros(per_block, np.uint64)
        piece = exact[first : first + per_block]
        wanted[: len(piece)] = piece
        counted += int((piece != 0).sum())
        if (wanted > stored).any():
            writes.append((offset, pack_counts(np.maximum(wanted, stored), bits), True))
        if (wanted != stored).any():
            writes.append((offset, pack_counts(wanted, bits), False))
    if counted != int((exact != 0).sum()):
        raise Corrupt(
            "some of its clusters have no reference count",
            subject=disk.subject,
            hint="`qemu-img check -r all` makes the counts anew",
        )
    for raising in (True, False):
        chosen = [(offset, block) for offset, block, raises in writes if raises is raising]
        for offset, block in chosen:
            disk.write(block, offset)
        if chosen:
            disk.sync()
