"""A guest at one moment, whether it runs or not; and what is done with its local chains later.

running, paused    a live snapshot: each disk gets a new active layer under a new path (guest/snapshot.py)
off                its images are at rest: sealed by a rename, their paths stay (source/sealing.py)
incoming           its disks are another host's, or will be its own in a moment: nothing is touched
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from snapchain.errors import Busy, Conflict
from snapchain.guest import snapshot as live
from snapchain.guest.protocol import Guest, State
from snapchain.guest.snapshot import DiskToSeal, GuestSnapshot, LeftOut, SnapshotRequest
from snapchain.guest.source import active_path, disks_to_protect, find_disk
from snapchain.image import ImageChain, scan
from snapchain.merge import live as live_merge, live_run, plan as merge_plan, run as merge_run
from snapchain.merge.pace import Pace
from snapchain.merge.plan import MergePlan
from snapchain.merge.request import MergeRequest
from snapchain.merge.run import MergeReport
from snapchain.model.consistency import Consistency
from snapchain.model.events import OnEvent, ignore
from snapchain.model.extents import Extents
from snapchain.source.at_rest import ImageAtRest, OfflineSet
from snapchain.source.protocol import Scope


class MovedError(Busy):
    """The guest waits for a migration, or has been migrated away: its images are not its own."""


def capture(guest: Guest, request: SnapshotRequest, *, on_event: OnEvent = ignore) -> tuple[GuestSnapshot, str]:
    """Seal what a guest has written so far, all disks at one instant; `made`, or `unchanged` for images at rest.

    Raises MovedError for a guest that is being migrated or was, Conflict where it was started or stopped meanwhile, and
    as `snapshot.plan` and `run` for a guest that runs, `sealing` for one that is off.
    """
    if any(each.kind == "migration" for each in guest.activities()):
        raise MovedError("it is being migrated", subject=guest.name, hint="the host on which it runs takes care of it")
    match guest.state():
        case State.INCOMING:
            raise MovedError(
                "it waits for a migration, or was migrated away: its images are not its own",
                subject=guest.name,
                hint="the host on which it runs takes care of it",
            )
        case State.OFF:
            return _capture_at_rest(guest, request, on_event)
        case _:
            try:
                planned = live.plan(guest, request)
                return live.run(guest, planned, request, on_event=on_event), "made"
            except Exception as error:
                if guest.state() is State.OFF:
                    raise _changed(guest, "was shut down") from error
                raise


def _capture_at_rest(guest: Guest, request: SnapshotRequest, on_event: OnEvent) -> tuple[GuestSnapshot, str]:
    found = disks_to_protect(guest, request.disks)
    time = datetime.now(UTC)
    images = []
    for disk in found:
        path = active_path(disk, guest=guest)
        dirs = (*request.image_dirs, path.parent)
        images.append(ImageAtRest(path, format=disk.active.image_format, image_dirs=dirs, on_event=on_event))
    try:
        sealed = [_sealed_below(image) for image in images]
        if how := "unchanged" if all(sealed) else "":
            paths = [path for path in sealed if path is not None]
        else:
            paths = list(OfflineSet(images).seal())
    except Busy as error:
        if guest.state() is not State.OFF:
            raise _changed(guest, "was started") from error
        raise
    disks = []
    for disk, image, path in zip(found, images, paths, strict=True):
        with scan(image.image, format=disk.active.image_format, image_dirs=(path.parent, *request.image_dirs)) as chain:
            below = chain.files[-2]
            disks.append(
                DiskToSeal(
                    disk=disk.name,
                    sealed=path,
                    sealed_format=below.format,
                    overlay=image.image,
                    virtual_size=chain.size,
                    layers=len(chain.files),
                )
            )
    left_out = tuple(
        LeftOut(disk=disk.name, reason=disk.left_out or "not asked for")
        for disk in guest.disks()
        if disk.name not in {each.name for each in found}
    )
    made = GuestSnapshot(
        guest=guest.name,
        instant=secrets.token_hex(16),
        time=time,
        consistency=Consistency.OFFLINE,
        disks=tuple(disks),
        left_out=left_out,
    )
    return made, how or "made"


def _sealed_below(image: ImageAtRest) -> Path | None:
    """The sealed file below a top in which nothing was written; None for any other."""
    with image.opened() as chain:
        image.check_not_given(chain)
        return chain.files[-2].path if _is_fresh(chain) else None


def _is_fresh(chain: ImageChain) -> bool:
    return len(chain.files) > 1 and chain.top.extents == Extents.absent(chain.files[-2].size)


def _changed(guest: Guest, what: str) -> Conflict:
    return Conflict(f"it {what} while it was being captured", subject=guest.name, hint="run it again")


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


def plan_merge(guest: Guest, disk: str, ask: Callable[[Path], MergeRequest]) -> MergePlan:
    """What a merge of the local chain of one disk would do, whether the guest runs or not. Raises as both do.

    ask: the request for the active layer, which has another path after each snapshot
    """
    request = ask(active_path(find_disk(guest, disk), guest=guest))
    return merge_plan.plan(request) if guest.state() is State.OFF else live_merge.plan(guest, disk, request)


def epoch_of(guest: Guest, disk: str, *, image_dirs: Sequence[Path] = ()) -> int:
    """In which epoch this host writes a disk. Raises as reading its sealed files does."""
    path = active_path(find_disk(guest, disk), guest=guest)
    source = ImageAtRest(path, image_dirs=(*image_dirs, path.parent))
    with source.opened(Scope.SEALED) as chain:
        return source.epoch(chain)


def run_merge(guest: Guest, planned: MergePlan, *, on_event: OnEvent = ignore, pace: Pace | None = None) -> MergeReport:
    """Do it. pace: of a live merge. Raises as merging does, Busy where the guest was started meanwhile."""
    if isinstance(planned, live_merge.LiveMergePlan):
        return live_run.run(guest, planned, on_event=on_event, pace=pace)
    return merge_run.run(planned, on_event=on_event)
