"""Epochs: a sender in an older epoch than the disk's was replaced by another host, and is refused.

An epoch rises by one at each handover: a disk whose epochs are used up could never be handed over again. To skip
epochs, or to end a handover, a human must name the epoch.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from snapchain.errors import Conflict
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.os_errors import os_errors
from snapchain.model.guest_state import describe_takeover
from snapchain.replica import names
from snapchain.replica.catalogue import Catalogue
from snapchain.replica.guest_store import disks_of, guest_of, read_standing, takeover_of
from snapchain.replica.store import Replica, ReplicaDisk
from snapchain.source.handed_over import HandedOver

_FIRST_EPOCHS = 1 << 16
"""In which a sender may begin a disk that is new here: it may have been handed over elsewhere before."""


def check_epoch(disk: ReplicaDisk, catalogue: Catalogue, epoch: int, *, by_name: bool = False) -> None:
    """Raises Conflict where a sender of that epoch may not write the disk. by_name: a human has named the epoch."""
    if epoch < catalogue.epoch and (takeover := takeover_of(disk, epoch)) is not None:
        raise Conflict(
            f"{takeover}; the sender writes this disk in epoch {epoch}",
            subject=disk.directory,
            hint="start no guest on the images there; `snapchain fence` shows what they hold that no point has",
        )
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
    is_new = not catalogue.layers and not catalogue.points and catalogue.epoch == 1
    if not by_name and epoch > (_FIRST_EPOCHS if is_new else catalogue.epoch + 1):
        raise Conflict(
            f"the sender writes this disk in epoch {epoch}, and here it is in epoch {catalogue.epoch}: an epoch rises "
            "by one at a time",
            subject=disk.directory,
            hint=f"if it was handed over elsewhere meanwhile, name the epoch: `snapchain send --epoch {epoch}`",
        )


def enter_epoch(disk: ReplicaDisk, catalogue: Catalogue, epoch: int, *, by_name: bool = False) -> Catalogue:
    """The catalogue in the sender's epoch, durably: from now on older ones are refused. The disk is locked.

    Raises Conflict as `check_epoch`, and where the disk was handed over to this host, which has not given it on; Busy
    where its guest runs.
    """
    check_epoch(disk, catalogue, epoch, by_name=by_name)
    if epoch == catalogue.epoch:
        return catalogue
    if catalogue.handover is None:
        _check_guest_is_not_here(disk)
    with ExitStack() as locks:
        if catalogue.handover is not None:
            _check_ended(disk, catalogue.handover, locks, by_name=by_name)
        # Whoever writes it now has it from somebody else than from the handover that was.
        catalogue = catalogue.after(epoch=epoch, handover=None)
        disk.write(catalogue)
    return catalogue


def _check_guest_is_not_here(disk: ReplicaDisk) -> None:
    """Raises Conflict where this replica's host runs the guest that the disk belongs to, on other disks of it.

    The disk of a guest's records has no overlay that would say so. A later epoch of it would count for all disks.
    """
    guest = guest_of(disk.name)
    standing = read_standing(disk.root, guest) if guest else None
    if standing is None or not standing.is_taken_over:
        return
    for other in disks_of(Replica(disk.root), guest):
        found = other.read()
        if found is None or found.handover is None or found.handover.token != standing.token:
            continue
        overlay = overlay_of(other, found.handover)
        if overlay.exists() and overlay.stat().st_mode & 0o222:
            raise Conflict(
                f"{describe_takeover(standing)}; no other host can name a later one",
                subject=disk.directory,
                hint="move the guest from that host, or withdraw what it has begun",
            )


def _check_ended(disk: ReplicaDisk, handover: HandedOver, locks: ExitStack, *, by_name: bool) -> None:
    """Raises Conflict or Busy for a handover that is still in force: the guest's overlay is there, and can be written.

    The overlay stays locked as long as `locks`.
    """
    overlay = overlay_of(disk, handover)
    with os_errors(overlay):
        try:
            status = overlay.stat()
        except FileNotFoundError:
            return
        if not status.st_mode & 0o222:
            return  # this host has given the disk on (source/ownership.py)
    locks.enter_context(ImageLock(overlay, LockMode.WRITE))
    from snapchain.replica.handover import is_untouched  # inside: few streams end a handover

    if not is_untouched(disk, overlay):
        raise Conflict(
            "this disk was handed over to the host of this replica, and a guest has written to it there",
            subject=overlay,
            hint="migrate it from that host; or, if what the guest has written may be lost, remove that file there",
        )
    if not by_name:
        raise Conflict(
            f"this disk was handed over to the host of this replica, in epoch {handover.epoch}, and was not given on",
            subject=overlay,
            hint="take it back with `snapchain migrate --take-back`; or, if no guest will run on that file, name the "
            f"epoch: `snapchain send --epoch {handover.epoch + 1}`",
        )


def overlay_of(disk: ReplicaDisk, handover: HandedOver) -> Path:
    """The file that the guest of a handover writes. Raises Corrupt for a name that no handover has."""
    folder, _, name = handover.overlay.partition("/")
    subject = str(disk.path(names.CATALOGUE))
    return disk.path(names.ACTIVE) / names.check_offered(name if folder == names.ACTIVE else "", subject=subject)
