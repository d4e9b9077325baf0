"""What clusters the merged file has, decided from what the inputs still contribute.

The largest contributor's cluster size: most data then keeps its shape, and its compressed clusters fit.  Smaller
cells of other layers that do not fill a cluster are filled up from the view below.  Subclusters survive: where a
contributor has them, the result has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from snapchain.image.file import ImageFile
from snapchain.image.qcow2.format import (
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MIN_EXTENDED_L2_CLUSTER_BITS,
    SUBCLUSTERS,
    guest_bytes_per_l2,
)
from snapchain.image.qcow2.layout import DEFAULT_CLUSTER_SIZE
from snapchain.model.extents import DATA, Extents, Int64s


@dataclass(frozen=True, slots=True)
class Geometry:
    """cluster_size in bytes; extended_l2: each cluster has 32 subclusters."""

    cluster_size: int
    extended_l2: bool = False

    @property
    def grain(self) -> int:
        """The smallest piece that is allocated on its own, bytes."""
        return self.cluster_size // SUBCLUSTERS if self.extended_l2 else self.cluster_size


def surviving_bytes(merged: Extents, files: int) -> Int64s:
    """int64[files], DATA bytes that each file of the chain still gives to a composed map."""
    held = merged.val >= DATA
    total = np.zeros(files, np.int64)
    np.add.at(total, merged.val[held], merged.lengths[held])
    return total


def choose(
    files: Sequence[ImageFile],
    first: int,
    merged: Extents,
    *,
    cluster_size: int | None = None,
    extended_l2: bool | None = None,
) -> Geometry:
    """The clusters of a file that holds `merged`, the composition of files[first:]; what is given is not chosen."""
    share = surviving_bytes(merged, len(files))
    inputs = [number for number in range(first, len(files)) if files[number].header is not None]
    givers = [number for number in inputs if share[number]] or inputs[-1:]
    if extended_l2 is None:
        extended_l2 = any(header.extended_l2 for number in givers if (header := files[number].header))
    if cluster_size is not None:
        return Geometry(cluster_size, extended_l2)
    # Of equal ones the uppermost: it will be asked most.
    largest = max(givers, key=lambda number: (int(share[number]), number), default=None)
    bits = (files[largest].cluster_size if largest is not None else DEFAULT_CLUSTER_SIZE).bit_length() - 1
    if extended_l2:
        bits = max(bits, MIN_EXTENDED_L2_CLUSTER_BITS)
    # A lower layer may have been much smaller than the disk is now.
    while bits < MAX_CLUSTER_BITS and _l1_bytes(merged.size, bits, extended_l2=extended_l2) > MAX_L1_BYTES:
        bits += 1
    return Geometry(1 << bits, extended_l2)


def _l1_bytes(size: int, bits: int, *, extended_l2: bool) -> int:
    return -(-size // guest_bytes_per_l2(bits, extended_l2=extended_l2)) * 8
