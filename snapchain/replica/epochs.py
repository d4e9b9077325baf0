"""Who may write a disk: a sender in an older epoch than the disk's was replaced by another host, and is refused."""

from __future__ import annotations

from snapchain.errors import Conflict
from snapchain.replica.catalogue import Catalogue
from snapchain.replica.store import ReplicaDisk


def check_epoch(disk: ReplicaDisk, catalogue: Catalogue, epoch: int) -> None:
    """Raises Conflict where a sender of that epoch may not write the disk."""
    if epoch < catalogue.epoch:
        raise Conflict(
            f"the sender writes this disk in epoch {epoch}, and here it is in epoch {catalogue.epoch}: "
            "another host has taken it over since",
            subject=disk.directory,
            hint="send nothing from there; if that host is the one that may write it, send with --epoch "
            f"{catalogue.epoch}",
        )


def enter_epoch(disk: ReplicaDisk, catalogue: Catalogue, epoch: int) -> Catalogue:
    """The catalogue in the sender's epoch, durably: from now on older ones are refused. The disk is locked.

    Raises Conflict as `check_epoch`.
    """
    check_epoch(disk, catalogue, epoch)
    if epoch == catalogue.epoch:
        return catalogue
    catalogue = catalogue.after(epoch=epoch)
    disk.write(catalogue)
    return catalogue
