"""Before a guest moves: its disks are shipped in rounds, and their overlays are made there.

Nothing of it needs a pause, and all of it stays useful when the migration is given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from snapchain.errors import Conflict, Unsupported
from snapchain.guest.disks import active_path, disks_to_protect
from snapchain.guest.protocol import Guest, GuestDisk
from snapchain.host import run_directory
from snapchain.model.disk_name import LARGEST_EPOCH
from snapchain.model.events import OnEvent
from snapchain.ops.migrate.live_check import per_second
from snapchain.ops.migrate.live_request import LiveRequest
from snapchain.ops.migrate.live_settle import MoveRecord, MovingDisk
from snapchain.ops.migrate.look import look_at, opened
from snapchain.ops.migrate.ready import active_of, make_overlay, overlay_name
from snapchain.ops.migrate.request import MigrateRequest, Move as MovedImage
from snapchain.ops.sync.guests import requests_of
from snapchain.ops.sync.request import SetReport
from snapchain.ops.sync.run import sync_set
from snapchain.replica.client import guest_at
from snapchain.replica.endpoint import GuestEndpoint
from snapchain.replica.stream.guest_messages import HandedDisk
from snapchain.source import ownership
from snapchain.source.notes import Given
from snapchain.source.protocol import Scope

_MEASURED_BYTES = 16 << 20
_REST_SECONDS = 10.0
"""What the active layers may still hold when the mirrors begin: they copy it while the guest runs."""


def ship(guest: Guest, request: LiveRequest, endpoint: GuestEndpoint, on_event: OnEvent) -> SetReport:
    """Seal and ship in rounds. Raises Conflict, with the figures, where the guest writes faster than it goes."""
    requests, sealer = requests_of(
        guest,
        prefix=request.prefix,
        migrating=lambda _: None,
        labels=request.labels,
        divergence=request.divergence,
        image_dirs=request.image_dirs,
        limit_rate=request.bandwidth,
        rounds=request.rounds,
        target_downtime=_REST_SECONDS,
        on_event=on_event,
    )
    disks = disks_to_protect(guest)
    named = [
        replace(each, overlay_name=overlay_name(disk.name, _epoch_here(guest, disk, request)), rest=_MEASURED_BYTES)
        for each, disk in zip(requests, disks, strict=True)
    ]
    report = sync_set(named, endpoint, sealer=sealer, on_event=on_event)
    if not report.ready:
        missing_layers = [what for disk in report.disks for what in disk.missing]
        raise Conflict(f"the destination is not ready: {'; '.join(missing_layers)}", subject=endpoint.url)
    if report.on_target is False:
        raise Conflict(
            f"the guest writes faster to its disks than the link carries: {report.bytes_left} bytes are left after "
            f"{len(report.disks[0].rounds)} rounds, at {per_second(report.rate or 0)}",
            subject=guest.name,
            hint="wait for a quieter hour, or raise --bandwidth",
        )
    return report


def _epoch_here(guest: Guest, disk: GuestDisk, request: LiveRequest) -> int:
    move = MovedImage(active_path(disk, guest=guest), "disk", disk.active.known_format)
    return look_at(MigrateRequest(moves=[move], running=True, image_dirs=_image_dirs([move], request)), move).epoch


def _image_dirs(moves: Sequence[MovedImage], request: LiveRequest) -> tuple[Path, ...]:
    return (*request.image_dirs, *dict.fromkeys(move.image.parent for move in moves))


def prepare(guest: Guest, request: LiveRequest, endpoint: GuestEndpoint, token: str, on_event: OnEvent) -> MoveRecord:
    """Have the overlays made; what is recorded of the move."""
    disks = disks_to_protect(guest)
    name = request.prefix or guest.name
    moves = [
        MovedImage(active_path(disk, guest=guest), f"{name}/{disk.name}", disk.active.known_format) for disk in disks
    ]
    images = MigrateRequest(
        moves=moves, running=True, divergence=request.divergence, image_dirs=_image_dirs(moves, request)
    )
    images.check()
    overlays, epochs = [], []
    for disk, move in zip(disks, moves, strict=True):
        look = look_at(images, move)
        with opened(images, move) as chain:
            ownership.check_not_given(chain)
            ownership.check_can_be_given(chain, image_dirs=images.image_dirs)
        file = overlay_name(disk.name, look.epoch)
        overlay, there = make_overlay(images, move, look, Scope.SEALED, endpoint, on_event, name=file)
        overlays.append(overlay)
        epochs += [look.epoch, there]
    # One for all its disks: the guest has one master.
    standing, _ = guest_at(endpoint, name)
    epoch = max(*epochs, standing.epoch) + 1
    if epoch + 1 > LARGEST_EPOCH:
        raise Unsupported(f"its epoch is {epoch - 1}, and there is none after it", subject=guest.name)
    found = []
    for disk, move, overlay in zip(disks, moves, overlays, strict=True):
        mark = Given(
            destination=endpoint.url,
            disk=move.disk,
            epoch=epoch,
            token=token,
            time=datetime.now(UTC),
            overlay=overlay,
            together=tuple(each.disk for each in moves),
        )
        handed = HandedDisk(disk=move.disk, epoch=epoch, overlay=active_of(overlay))
        found.append(MovingDisk(name=disk.name, image=move.image, format=move.format, handed=handed, mark=mark))
    return MoveRecord(
        token=token,
        destination=endpoint.url,
        name=name,
        disks=tuple(found),
        stage="moving",
        directory=run_directory.base() / "none",
        image_dirs=images.image_dirs,
    )


def check_same_layers(guest: Guest, record: MoveRecord) -> None:
    """Raises Conflict where a layer was sealed since the overlays were made: the mirrors would leave it out.

    From the mirrors on QEMU refuses that.
    """
    now = {disk.name: disk for disk in disks_to_protect(guest)}
    for each in record.disks:
        disk = now.get(each.name)
        if disk is None or active_path(disk, guest=guest) != each.image:
            raise Conflict(
                "a snapshot of it was taken while it was being prepared",
                subject=f"{guest.name}/{each.name}",
                hint="run it again",
            )
    if set(now) != {each.name for each in record.disks}:
        raise Conflict("it has got another disk meanwhile", subject=guest.name, hint="run it again")


def link_rate(shipped: SetReport) -> float | None:
    """Bytes a second, where so much was shipped that its time was spent on the wire."""
    return shipped.rate if sum(disk.bytes_sent for disk in shipped.disks) >= _MEASURED_BYTES else None
