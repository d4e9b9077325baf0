"""Whether files that a replica does not know show what it holds: told by reading them, and nothing crosses the wire.

A local merge, a copy or a restore gives files new identities; the content id of a view stays.  So where the inventories
say that the ways part, the views of the unknown files are counted from the common base up, and one that shows what the
replica's newest layer shows is where the rest goes on: the replica is behind by a merge, or not behind at all.
"""

from __future__ import annotations

from collections.abc import Callable

from snapchain.image import ImageChain
from snapchain.model.content import Sum, content_id, empty_sum
from snapchain.model.extents import Extents
from snapchain.model.inventory import Diverged, Inside
from snapchain.ops.send_sources import same_source, source_of
from snapchain.replica.catalogue import decode_sum
from snapchain.replica.leaves import counted
from snapchain.replica.stream.messages import Inventory


def recognised(
    chain: ImageChain, count: int, found: Diverged, held: Inventory, *, on_bytes: Callable[[int], None]
) -> int | None:
    """How many of the lowest files together show what the replica's newest layer shows; None when no number does.

    Where several numbers do, since a file says nothing new, the largest that costs no more reading: else that file
    would be sent again with every run.
    count: files that are to be sent; found: what the inventories say; on_bytes: told what is read
    Reads what the files above the common base hold, and what it hides. Errors as ImageChain.read_into.
    """
    known: int | None = None
    tip = held.layers[-1]
    files = enumerate(chain.files[:count])
    # Which file the replica's newest layer was made from, if it is one of these.
    newest = next((at for at, file in files if tip.sources and same_source(source_of(file), tip.sources[-1])), None)
    total = decode_sum(held.layers[found.base_count - 1].content_sum) if found.base_count else empty_sum()
    for number in range(found.first, count):
        view, below = chain.at(number), chain.at(number - 1) if number else None
        silent = below is not None and view.top.extents == Extents.absent(below.size)
        if known is not None and not silent and number > (newest or 0):
            return known
        total = counted(view.top.extents, view, below, total, on_bytes=on_bytes)
        if view.size == tip.size and content_id(view.size, total) == tip.content_id:
            known = number + 1
    return known


def counted_up(
    chain: ImageChain, count: int, inside: Inside, held: Inventory, *, on_bytes: Callable[[int], None]
) -> Sum:
    """The content sum of the lowest `count` files, counted from where layers of the replica end as files do.

    Reads nothing where such an end is just there. Errors as ImageChain.read_into.
    """
    total = decode_sum(held.layers[inside.base_count - 1].content_sum) if inside.base_count else empty_sum()
    for number in range(inside.first, count):
        view, below = chain.at(number), chain.at(number - 1) if number else None
        total = counted(view.top.extents, view, below, total, on_bytes=on_bytes)
    return total
