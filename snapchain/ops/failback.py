"""failback: a guest that was taken over goes back to its old host, and only what differs crosses the link.

    on the old host   prepare: the images there, marked since the failover, become a replica of their own: a local copy
    on the new host   run: the guest is shut down; the difference is sent as one layer, then the planned move (migrate)

The old images need not be the common point: what they hold beyond it is overwritten in the new layer.  They stay as
they are; `fence --keep-tail` keeps what they hold as points.  Each half is continued by the same command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import NotFound
from snapchain.host.retry import RetryPolicy
from snapchain.image import scan
from snapchain.model.events import OnEvent, ignore
from snapchain.ops.disk_set import check_disks
from snapchain.ops.migrate.run import MigratePlan, MigrateReport, MigrateRequest, migrate, plan as plan_migrate
from snapchain.ops.ship.request import Divergence, Files, ShipRequest
from snapchain.ops.ship.run import plan as plan_ship, run as ship
from snapchain.replica.disk_writer import ReplicaWriting
from snapchain.replica.endpoint import Endpoint
from snapchain.source import ownership
from snapchain.source.notes import Notes


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareRequest:
    """disks: an image of this host, and its name at the replica: all of one guest"""

    disks: Sequence[tuple[Path, str]]
    format: str | None = None
    image_dirs: Sequence[Path] = ()


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)


class PreparedDisk(_Shown):
    """A disk whose bytes are at the replica now. bytes_copied: DATA that this took; taken_over: by whom, and when"""

    image: str
    disk: str
    taken_over: str
    bytes_copied: int


class PrepareReport(_Shown):
    """What `prepare` did. destination: the replica that the guest comes back to"""

    destination: str
    disks: tuple[PreparedDisk, ...]
    bytes_copied: int


def plan_prepare(request: PrepareRequest, endpoint: Endpoint, *, on_event: OnEvent = ignore) -> PrepareReport:
    """What `prepare` would copy; changes nothing. Raises as that does."""
    return _each(request, endpoint, on_event, copies=False)


def prepare(request: PrepareRequest, endpoint: Endpoint, *, on_event: OnEvent = ignore) -> PrepareReport:
    """Make a replica of images that another host has taken over, or to which they were given.

    Raises NotFound where nobody has: then they are this host's still. Busy where a guest runs on one. All are judged
    before the first is copied; run again, it continues.
    """
    return _each(request, endpoint, on_event, copies=True)


def _each(request: PrepareRequest, endpoint: Endpoint, on_event: OnEvent, *, copies: bool) -> PrepareReport:
    check_disks(request.disks)
    writing = ReplicaWriting(endpoint, policy=RetryPolicy())
    marks = [_mark(request, image) for image, _ in request.disks]
    done = []
    for (image, disk), mark in zip(request.disks, marks, strict=True):
        asked = ShipRequest(
            image=image,
            disk=disk,
            files=Files.EACH,
            format=request.format,
            image_dirs=request.image_dirs,
            though_given=True,
        )
        if copies:
            count = ship(asked, writing, on_event=on_event).carried_bytes
        else:
            count = plan_ship(asked, writing, on_event=on_event).data_bytes
        done.append(PreparedDisk(image=str(image), disk=disk, taken_over=mark, bytes_copied=count))
    return PrepareReport(
        destination=endpoint.url, disks=tuple(done), bytes_copied=sum(each.bytes_copied for each in done)
    )


def _mark(request: PrepareRequest, image: Path) -> str:
    with scan(image, format=request.format, image_dirs=request.image_dirs) as chain:
        mark = ownership.given(chain, Notes())
    if mark is None:
        raise NotFound(
            "nobody is known to have taken it over, so there is no way back",
            subject=image,
            hint="`snapchain fence IMAGE DEST::DISK` asks the destination first",
        )
    return ownership.describe_gift(mark)


def plan(request: MigrateRequest, endpoint: Endpoint, *, on_event: OnEvent = ignore) -> MigratePlan:
    """What `run` would do; changes nothing."""
    return plan_migrate(replace(request, divergence=Divergence.COMPARE), endpoint, on_event=on_event)


def run(request: MigrateRequest, endpoint: Endpoint, *, on_event: OnEvent = ignore) -> MigrateReport:
    """Move a guest's disks to a replica that `prepare` has made: only what differs is sent. As `migrate`."""
    return migrate(replace(request, divergence=Divergence.COMPARE), endpoint, on_event=on_event)
