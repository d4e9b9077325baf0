"""Who may write a disk: a sender in an older epoch than the disk's was replaced by another host, and is refused."""

from __future__ import annotations

from pathlib import Path

from snapchain.errors import Conflict
from snapchain.replica import names
from snapchain.replica.catalogue import Catalogue, HandedOver, read_record
from snapchain.replica.store import ReplicaDisk


def check_epoch(disk: ReplicaDisk, catalogue: Catalogue, epoch: int) -> None:
    """Raises Conflict where a sender of that epoch may not write the disk."""
    if catalogue.handover is not None and epoch <= catalogue.handover.epoch:
        raise Conflict(
            f"this disk was handed over to the host of this replica, in epoch {catalogue.handover.epoch}, and is "
            f"written there; the sender is in epoch {epoch}",
            subject=disk.directory,
            hint="send nothing from there; `snapchain migrate` moves the disk from this host to another, or takes it "
            "back",
        )
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
    # Whoever writes it now has it from somebody else than from the handover that was.
    catalogue = catalogue.after(epoch=epoch, handover=None)
    disk.write(catalogue)
    return catalogue


def epoch_of_overlay(path: Path) -> int:
    """The epoch in which a disk was handed over to this host, for a file in the `active` directory of a replica's disk.

    1 for all other files, and where nothing was handed over. Raises Corrupt for a catalogue that cannot be read.
    """
    handover = _handover(path)
    return 1 if handover is None else handover.epoch


def epoch_handed(path: Path) -> int:
    """The same, but only for the very file that was made for the guest then."""
    handover = _handover(path)
    return 1 if handover is None or handover.overlay != f"{names.ACTIVE}/{path.name}" else handover.epoch


def _handover(path: Path) -> HandedOver | None:
    if path.parent.name != names.ACTIVE:
        return None
    catalogue = read_record(Catalogue, path.parent.parent / names.CATALOGUE)
    return None if catalogue is None else catalogue.handover
