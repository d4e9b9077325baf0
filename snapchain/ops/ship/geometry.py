"""In what clusters a layer is sent that is made of several files."""

from __future__ import annotations

from collections.abc import Sequence

from snapchain.image import ImageFile
from snapchain.image.qcow2.format import MIN_EXTENDED_L2_CLUSTER_BITS, SUBCLUSTERS

_RAW_CLUSTER = 64 * 1024


def geometry(files: Sequence[ImageFile]) -> tuple[int, int]:
    """(cluster size, grain) of the file that will hold these: as fine as the finest of them, and no finer."""
    grain = min(file.grain if file.header else _RAW_CLUSTER for file in files)
    cluster = min(file.cluster_size or _RAW_CLUSTER for file in files)
    if grain < cluster and grain * SUBCLUSTERS >= 1 << MIN_EXTENDED_L2_CLUSTER_BITS:
        return grain * SUBCLUSTERS, grain
    return grain, grain
