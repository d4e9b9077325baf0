"""Seal the disks of a guest, whether it runs or not; and find what was sealed later, when merges have renamed it.

running, paused    a live snapshot: each disk gets a new active layer under a new path (guest/snapshot.py)
off                its images are at rest: sealed by a rename, their paths stay (source/sealing.py)
incoming           its disks are another host's, or will be its own in a moment: nothing is touched
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snapchain.errors import Busy, Conflict, SnapchainError
from snapchain.guest import snapshot
from snapchain.guest.disks import active_path, find_disk
from snapchain.guest.protocol import Guest, State
from snapchain.guest.snapshot import GuestSnapshot, SnapshotRequest
from snapchain.model.events import OnEvent, ignore
from snapchain.source.at_rest import ImageAtRest
from snapchain.source.protocol import Scope


class MovedError(Busy):
    """The guest waits for a migration, or has been migrated away: its images are not its own."""


def seal(guest: Guest, request: SnapshotRequest, *, on_event: OnEvent = ignore) -> tuple[GuestSnapshot, bool]:
    """Seal what a guest has written so far, all disks at one instant, and whether there was anything to seal.

    A guest that is off, and was since its last snapshot, gets no further overlay.
    Raises MovedError for a guest that is being migrated or was, Conflict where it was started or shut down meanwhile,
    and as `snapshot.plan` and `snapshot.run`.
    """
    _check_here(guest)
    planned = None
    try:
        planned = snapshot.plan(guest, request)
        unwritten = snapshot.sealed_already(planned, request)
        return unwritten or snapshot.run(guest, planned, request, on_event=on_event), unwritten is None
    except SnapchainError as error:
        is_off = guest.state() is State.OFF
        if planned is not None and is_off is not planned.is_off:
            raise Conflict(
                f"the guest was {'shut down' if is_off else 'started'} while its disks were being sealed",
                subject=guest.name,
                hint="run it again",
            ) from error
        raise


def _check_here(guest: Guest) -> None:
    if guest.state() is State.INCOMING:
        why = "the guest waits for a migration, or was migrated away: its images are not its own now"
    elif any(each.kind == "migration" for each in guest.activities()):
        why = "the guest is being migrated"
    else:
        return
    raise MovedError(why, subject=guest.name, hint="run it on the host where the guest runs")


def as_named_now(guest: Guest, taken: GuestSnapshot) -> GuestSnapshot | None:
    """A snapshot with its sealed files as they are called now; None when it is not the newest of the guest any more.

    A merge may have given the sealed layer another path. What it shows stays the same as long as the layer on it is
    the one of the snapshot.
    """
    disks = []
    known = {disk.name: disk for disk in guest.disks()}
    for each in taken.disks:
        disk = known.get(each.disk)
        if disk is None or len(disk.chain) < 2 or disk.active.path is None:
            return None
        below = disk.chain[-2].path
        if below is None or disk.active.path != each.overlay:
            return None
        layer = disk.chain[-2]
        disks.append(each.model_copy(update={"sealed": below, "sealed_format": layer.image_format}))
    return taken.model_copy(update={"disks": tuple(disks)})


def epoch_of(guest: Guest, disk: str, *, image_dirs: Sequence[Path] = ()) -> int:
    """In which epoch this host writes a disk. Raises as reading its sealed files does."""
    found = find_disk(guest, disk)
    path = active_path(found, guest=guest)
    source = ImageAtRest(path, format=found.active.known_format, image_dirs=(*image_dirs, path.parent))
    with source.opened(Scope.SEALED) as chain:
        return source.epoch(chain)
