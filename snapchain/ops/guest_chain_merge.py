"""merge --domain/--qmp: make the chains of a guest's disks shorter, by block jobs while it runs, else at rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Busy, SnapchainError
from snapchain.guest.disks import find_disk
from snapchain.guest.protocol import Guest, GuestDisk, State
from snapchain.guest.snapshot import LeftOut
from snapchain.host.path_resolution import real_path
from snapchain.merge import live, live_run, plan as at_rest, run as run_at_rest
from snapchain.merge.journal import unsettled
from snapchain.merge.live import LiveMergePlan
from snapchain.merge.live_chain import obstacle, paths_of
from snapchain.merge.pace import Pace
from snapchain.merge.plan import MergePlan
from snapchain.merge.request import At, MergeRequest
from snapchain.merge.run import MergeReport
from snapchain.model.events import Event, Notice, OnEvent, Progress, ignore


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestMergeRequest:
    """disks: names, empty for all; request: of each disk, whatever image it names; at: by disk, what destinations hold

    limit_rate: bytes a second, 0 for no limit; idle: so that the guest does not feel it
    """

    request: MergeRequest
    disks: Sequence[str] = ()
    at: Mapping[str, tuple[At, ...]] = field(default_factory=dict)
    limit_rate: int = 0
    idle: bool = False

    def of_disk(self, disk: GuestDisk) -> MergeRequest:
        """The request for one disk."""
        active = disk.active
        paths = paths_of(disk)
        return replace(
            self.request, image=paths[-1], image_format=active.image_format, at=tuple(self.at.get(disk.name, ()))
        )


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class DiskMergePlan(MergePlan):
    """Of a disk of a guest that is off."""

    disk: str


class GuestMergePlan(_Shown):
    """What `run` will do. runs: whether the guest has its images open, so that QEMU does the work."""

    guest: str
    runs: bool
    disks: tuple[LiveMergePlan | DiskMergePlan, ...]
    left_out: tuple[LeftOut, ...]
    idle: bool
    limit_rate: int


class DiskMergeReport(MergeReport):
    """What was done to one disk, as for an image at rest."""

    disk: str


class DiskFault(_Shown):
    """A disk that was not merged, and why. kind, message: of the error."""

    disk: str
    kind: str
    message: str
    hint: str | None = None


class GuestMergeReport(_Shown):
    """What was done. Layers and bytes of all disks together."""

    guest: str
    layers_before: int
    layers_after: int
    bytes_moved: int
    bytes_freed: int
    disks: tuple[DiskMergeReport, ...]
    failed: tuple[DiskFault, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def has_failed(self) -> bool:
        """Whether anything was left undone."""
        return bool(self.failed) or any(each.failed for each in self.disks)


def plan(guest: Guest, request: GuestMergeRequest) -> GuestMergePlan:
    """Look and decide; changes nothing. Raises NotFound for a disk, Busy for a guest that migrates, as `merge.plan`."""
    state = guest.state()
    if state is State.INCOMING:
        raise Busy(
            "the guest waits for a migration, or was migrated away: its images are not its own now",
            subject=guest.name,
            hint="run it on the host where the guest runs",
        )
    chosen, left_out = _chosen(guest, request.disks)
    plans: list[LiveMergePlan | DiskMergePlan] = []
    for disk in chosen:
        wanted = request.of_disk(disk)
        if state is State.OFF:
            found = at_rest.plan(wanted)
            fields = {name: getattr(found, name) for name in MergePlan.model_fields}
            plans.append(DiskMergePlan(**fields, disk=disk.name))
        else:
            plans.append(live.plan(guest, disk.name, wanted))
    return GuestMergePlan(
        guest=guest.name,
        runs=state is not State.OFF,
        disks=tuple(plans),
        left_out=tuple(left_out),
        idle=request.idle,
        limit_rate=request.limit_rate,
    )


def plan_disk(guest: Guest, disk: str, request: MergeRequest) -> MergePlan:
    """What a merge of one disk's chain would do, whether the guest runs or not. request: of its active layer

    Raises as `merge.plan.plan` and `merge.live.plan`.
    """
    return at_rest.plan(request) if guest.state() is State.OFF else live.plan(guest, disk, request)


def _chosen(guest: Guest, names: Sequence[str]) -> tuple[list[GuestDisk], list[LeftOut]]:
    if names:
        return [find_disk(guest, name) for name in dict.fromkeys(names)], []
    disks = [(disk, obstacle(disk)) for disk in guest.disks()]
    left_out = [LeftOut(disk=disk.name, reason=why) for disk, why in disks if why is not None]
    return [disk for disk, why in disks if why is None], left_out


def run(guest: Guest, planned: GuestMergePlan, *, on_event: OnEvent = ignore) -> GuestMergeReport:
    """Do it, disk after disk. A disk that failed is in the report, where another one was done.

    Raises what merging the only disk raises, or the first error where no disk was merged.
    """
    pace = Pace(limit=planned.limit_rate, idle=planned.idle)
    done: list[DiskMergeReport] = []
    failed: list[DiskFault] = []
    first_error: SnapchainError | None = None
    for each in planned.disks:
        listener = _of_disk(on_event, each.disk) if len(planned.disks) > 1 else on_event
        try:
            report = run_disk(guest, each, on_event=listener, pace=pace)
        except SnapchainError as error:
            first_error = first_error or error
            failed.append(DiskFault(disk=each.disk, kind=error.kind, message=str(error), hint=error.hint))
            continue
        fields = {name: getattr(report, name) for name in MergeReport.model_fields}
        done.append(DiskMergeReport(**fields, disk=each.disk))
    if first_error is not None and not done:
        raise first_error
    return GuestMergeReport(
        guest=planned.guest,
        layers_before=sum(each.layers_before for each in done),
        layers_after=sum(each.layers_after for each in done),
        bytes_moved=sum(each.bytes_moved for each in done),
        bytes_freed=sum(each.bytes_freed for each in done),
        disks=tuple(done),
        failed=tuple(failed),
        left_out=planned.left_out,
    )


def run_disk(guest: Guest, planned: MergePlan, *, on_event: OnEvent = ignore, pace: Pace | None = None) -> MergeReport:
    """Merge one disk's chain. pace: of a live merge. Raises as merging does, Busy where the guest was started."""
    if isinstance(planned, LiveMergePlan):
        return live_run.run(guest, planned, on_event=on_event, pace=pace)
    for journal in unsettled(real_path(layer.path) for layer in planned.layers):
        live_run.note_switch(guest, journal)
    return run_at_rest.run(planned, on_event=on_event)


def _of_disk(on_event: OnEvent, disk: str) -> OnEvent:
    def listen(event: Event) -> None:
        if isinstance(event, Progress):
            event = replace(event, phase=f"{event.phase} {disk}")
        elif isinstance(event, Notice):
            event = event.within(disk)
        on_event(event)

    return listen
