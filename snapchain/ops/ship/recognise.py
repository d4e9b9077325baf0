"""Whether files that a replica does not know show what it holds: told by reading them, and nothing crosses the wire.

A local merge, a copy or a restore gives files new identities; the content id of a view stays.  So where the inventories
say that the ways part, the views of the unknown files are counted from the common base up, and one that shows what the
replica's newest layer shows is where the rest goes on: the replica is behind by a merge, or not behind at all.
"""

from __future__ import annotations

from collections.abc import Callable

from snapchain.image import ImageChain
from snapchain.model.content import content_id
from snapchain.model.extents import Extents
from snapchain.model.inventory import Diverged
from snapchain.ops.ship.sources import same_source
from snapchain.replica.stream.messages import Inventory
from snapchain.source.counted_sums import CountedSums


def recognised(
    chain: ImageChain,
    count: int,
    found: Diverged,
    held: Inventory,
    sums: CountedSums,
    *,
    on_bytes: Callable[[int], None],
) -> int | None:
    """How many of the lowest files together show what the replica's newest layer shows; None when no number does.

    Where several numbers do, since a file says nothing new, the largest that costs no more reading: else that file
    would be sent again with every run.
    count: files that are to be sent; found: what the inventories say; on_bytes: told what is read
    Reads what the files above the common base hold, and what it hides. Errors as `CountedSums.count`.
    """
    known: int | None = None
    tip = held.layers[-1]
    files = enumerate(chain.files[:count])
    # Which file the replica's newest layer was made from, if it is one of these.
    newest = next((at for at, file in files if tip.sources and same_source(file.fingerprint, tip.sources[-1])), None)
    for number in range(found.first, count):
        view, below = chain.at(number), chain.at(number - 1) if number else None
        silent = below is not None and view.top.extents == Extents.absent(below.size)
        if known is not None and not silent and number > (newest or 0):
            return known
        total = sums.count(chain, number + 1, on_bytes=on_bytes)
        if view.size == tip.size and content_id(view.size, total) == tip.content_id:
            known = number + 1
    return known
