"""Whether a disk at a replica is still what its catalogue says: links, sizes, and every byte, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from snapchain.image import ImageChain
from snapchain.model.content import content_id, empty_sum
from snapchain.replica.arrival import opened_chain
from snapchain.replica.leaves import counted
from snapchain.replica.store import ReplicaDisk


@dataclass(frozen=True, slots=True)
class Finding:
    """A layer that does not show what it should."""

    file: str
    shown: str
    recorded: str


def verify_disk(disk: ReplicaDisk, *, on_bytes: Callable[[int], None]) -> list[Finding]:
    """Read all layers, and compare what the chain shows at each with the catalogue; what is wrong, root first.

    A layer is counted from the sum recorded for the one below it: the lowest of the findings has a fault, those above
    it may only lie on it.
    on_bytes: told how much was read since it was last told
    Raises Corrupt when files are missing, replaced, or linked otherwise, or one cannot be read.
    """
    catalogue = disk.read()
    if catalogue is None or catalogue.tip is None:
        return []
    found: list[Finding] = []
    with opened_chain(disk, catalogue, catalogue.tip) as chain:
        below: ImageChain | None = None
        total = empty_sum()
        for number, layer in enumerate(catalogue.layers):
            view = chain.at(number)
            shown = content_id(view.size, counted(view.top.extents, view, below, total, on_bytes=on_bytes))
            if shown != layer.content_id:
                found.append(Finding(layer.file, shown, layer.content_id))
            below, total = view, layer.sum()
    return found
