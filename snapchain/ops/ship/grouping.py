"""Which files of a chain become one layer: what they overwrite of each other is neither sent nor stored.

    root | pending overlays | top

- Pending overlays become one layer.
- The top joins what is below it when it hides at least half of the data there: then both show at most twice what the
  top holds, and that is what reading them again costs when the top has changed.
- The root joins what is above it where that saves at least a sixteenth of all data, and 16 MiB: else layers apart,
  which can be merged and cut off one by one, are worth more.
- A fresh overlay says nothing; it goes with the layer above it, so that it is known at the destination, too.

docs/decisions/0101-one-grouping.md
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from snapchain.image import ImageChain, ImageFile
from snapchain.image.qcow2.format import MIN_EXTENDED_L2_CLUSTER_BITS, SUBCLUSTERS
from snapchain.model.extents import Extents, fold

_WORTH, _WORTH_BYTES = 16, 16 << 20
RAW_CLUSTER = 64 * 1024
"""The cluster size for a raw file, for the day when it is restored as qcow2."""


def groups(chain: ImageChain, first: int, *, below: int, each: bool) -> list[range]:
    """The files from number `first` on as layers, each a range of neighbours; only those that say something.

    below: size of what the first of them lies on, bytes; each: every file is a layer of its own
    """
    if each:
        return [range(at, at + 1) for at in range(first, len(chain.files))]
    found: list[range] = []
    silent: int | None = None
    for group in _joined(chain, first):
        lower = below if group.start == first else chain.files[group.start - 1].size
        if group.start and composed(chain, group) == Extents.absent(lower):
            silent = group.start if silent is None else silent
            continue
        found.append(range(group.start if silent is None else silent, group.stop))
        silent = None
    return found


def composed(chain: ImageChain, group: range) -> Extents:
    """What these files hold together."""
    return fold(chain.files[at].extents for at in group)


def _joined(chain: ImageChain, first: int) -> list[range]:
    count = len(chain.files)
    edges = sorted({at for at in (first, first or 1, count - 1, count) if first <= at <= count})
    parts = [range(start, stop) for start, stop in pairwise(edges)]
    held = [composed(chain, part).data_bytes for part in parts]
    worth = max(sum(held) // _WORTH, _WORTH_BYTES)
    # From the top down: what the top hides of the pending overlays is gone before the root is looked at.
    for at in range(len(parts) - 2, -1, -1):
        joined = range(parts[at].start, parts[at + 1].stop)
        saved = held[at] + held[at + 1] - composed(chain, joined).data_bytes
        with_top, with_root = joined.stop == count, joined.start == 0
        # The top may be written to after this: what it travels with is read again with it.
        pays = saved > 0 and (not with_top or 2 * saved >= held[at]) and (not with_root or saved >= worth)
        if pays:
            held[at : at + 2] = [held[at] + held[at + 1] - saved]
            parts[at : at + 2] = [joined]
    return parts


def geometry(files: Sequence[ImageFile]) -> tuple[int, int]:
    """(cluster size, grain) of the file that will hold these: as fine as the finest of them, and no finer."""
    grain = min(file.grain if file.header else RAW_CLUSTER for file in files)
    cluster = min(file.cluster_size or RAW_CLUSTER for file in files)
    if grain < cluster and grain * SUBCLUSTERS >= 1 << MIN_EXTENDED_L2_CLUSTER_BITS:
        return grain * SUBCLUSTERS, grain
    return grain, grain
