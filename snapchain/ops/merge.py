"""merge IMAGE: make one layer of several in a chain of files, by name or by rules."""

from __future__ import annotations

from snapchain.destination.protocol import Destination
from snapchain.destination.writing import Opening
from snapchain.merge.plan import MergePlan, plan
from snapchain.merge.request import At, MergeRequest
from snapchain.merge.run import MergeReport, run
from snapchain.model.disk_name import LARGEST_EPOCH
from snapchain.model.events import ignore
from snapchain.model.inventory import Held


def held_at(name: str, destination: Destination, disk: str, *, epoch: int = LARGEST_EPOCH) -> At:
    """What a destination holds of a disk, for a merge that must not hinder the next shipment.

    name: for people; epoch: in which this host writes the disk, where a later one there is to be refused. By default
    it is not: the merge changes files of this host alone, and their marks say whether they are its own.
    """
    with destination.look(Opening(disk=disk, epoch=epoch), on_event=ignore) as found:
        return At(name, tuple(Held(layer.id, layer.sources) for layer in found.held))


__all__ = ["At", "MergePlan", "MergeReport", "MergeRequest", "held_at", "plan", "run"]
