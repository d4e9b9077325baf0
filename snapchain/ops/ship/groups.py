"""Which files of a chain travel together, as one layer: what they overwrite of each other need not travel."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from snapchain.image import ImageChain
from snapchain.model.extents import Extents, fold

_WORTH, _WORTH_BYTES = 16, 16 << 20
"""Root and pending overlays become one layer where that spares at least a sixteenth of all data to be sent, and 16 MiB:
else layers apart, which can be cut off and merged one by one, are worth more. The top joins them for half."""


def groups(chain: ImageChain, first: int, *, below: int, each: bool) -> list[range]:
    """The files from number `first` on as layers, each a range of neighbours; only those that say something.

    below: size of what the first of them lies on, bytes; each: every file is a layer of its own
    A fresh overlay goes with the layer above it, so that it is known at the replica, too.
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


def _joined(chain: ImageChain, first: int) -> Iterator[range]:
    count = len(chain.files)
    edges = sorted({at for at in (first, first or 1, count - 1, count) if first <= at <= count})
    apart = [range(start, stop) for start, stop in pairwise(edges)]
    held = [composed(chain, group).data_bytes for group in apart]
    worth = max(sum(held) // _WORTH, _WORTH_BYTES)
    at = 0
    while at + 1 < len(apart):
        joined = range(apart[at].start, apart[at + 1].stop)
        together = composed(chain, joined).data_bytes
        # The top may be written to after this, as nobody has sealed it: what it travels with would go again, too.
        least = sum(held) // 2 if joined.stop == count else worth
        if held[at] + held[at + 1] - together >= max(least, worth):
            apart[at : at + 2], held[at : at + 2] = [joined], [together]
        else:
            at += 1
    yield from apart
