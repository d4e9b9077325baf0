"""sync of a guest: which requests its disks make, and how they are sealed, whether it runs or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from snapchain.guest.disks import active_path, disks_to_protect
from snapchain.guest.protocol import Guest, State
from snapchain.guest.source import RunningDisk, RunningDisks
from snapchain.image import scan
from snapchain.model.disk_name import check_disk_name
from snapchain.model.events import OnEvent, ignore
from snapchain.ops.ship.request import Divergence
from snapchain.ops.sync.request import Proof, SyncRequest
from snapchain.ops.sync.run import sealed_request
from snapchain.ops.sync.virsh import Guest as Migrating
from snapchain.source import ownership
from snapchain.source.notes import Notes
from snapchain.source.protocol import SetSealer


def requests_of(
    guest: Guest,
    *,
    prefix: str | None,
    disks: Sequence[str] = (),
    migrating: Callable[[str], Migrating | None],
    labels: Sequence[str] = (),
    divergence: Divergence = Divergence.REFUSE,
    image_dirs: Sequence[Path] = (),
    limit_rate: int | None = None,
    rounds: int | None = None,
    target_downtime: float | None = None,
    proof: Proof = Proof.RECORDED,
    on_event: OnEvent = ignore,
) -> tuple[list[SyncRequest], SetSealer | None]:
    """A request for each disk, and what seals them all at one instant; None for images at rest.

    prefix: of the disks' names at the replica, by default the guest's name; disks: names, by default all that can be
    protected; migrating: from a disk's name in the guest to what the commands need
    Raises as `disks_to_protect`, and Unsupported for an active layer that is no file.
    """
    found = disks_to_protect(guest, disks)
    runs = guest.state() is not State.OFF
    sources = [RunningDisk(guest, disk.name, image_dirs=image_dirs, on_event=on_event) for disk in found]
    requests = []
    for disk, source in zip(found, sources, strict=True):
        image = active_path(disk, guest=guest)
        image_format = disk.active.known_format
        with scan(image, format=image_format, image_dirs=(*image_dirs, image.parent), is_written=runs) as chain:
            epoch = ownership.epoch_of(chain, Notes())
        send = sealed_request(
            image,
            check_disk_name(f"{prefix or guest.name}/{disk.name}"),
            labels=labels,
            divergence=divergence.of_epoch(epoch),
            format=None if runs else image_format,  # else its source says it, for each active layer anew
            image_dirs=(*image_dirs, image.parent),
            limit_rate=limit_rate,
            opens=source if runs else None,
        )
        request = SyncRequest(
            send=send,
            rounds=rounds,
            target_downtime=target_downtime,
            proof=proof,
            guest=migrating(disk.name),
            overlay_name=f"{disk.name}.qcow2" if runs else None,
        )
        requests.append(request)
    return requests, RunningDisks(sources, image_dirs=image_dirs, on_event=on_event) if runs else None
