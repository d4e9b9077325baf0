"""merge --domain/--qmp: make the chains of a guest's disks shorter, by block jobs while it runs, else at rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Busy, NotFound, SnapchainError
from snapchain.guest.protocol import Guest, GuestDisk, State
from snapchain.guest.snapshot import LeftOut
from snapchain.host.directory import real_path
from snapchain.merge import live, live_run, plan as at_rest, run as run_at_rest
from snapchain.merge.journal import unsettled
from snapchain.merge.live import LiveMergePlan
from snapchain.merge.live_chain import paths_of
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
        raise Busy("it is migrated at this moment", subject=guest.name, hint="wait for the end of the migration")
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


def _chosen(guest: Guest, names: Sequence[str]) -> tuple[list[GuestDisk], list[LeftOut]]:
    disks = guest.disks()
    known = {disk.name for disk in disks}
    for name in names:
        if name not in known:
            raise NotFound(
                f"{guest.name} has no disk of this name",
                subject=name,
                hint=f"its disks are: {', '.join(disk.name for disk in disks) or 'none'}",
            )
    if names:
        return [disk for disk in disks if disk.name in names], []
    chosen, left_out = [], []
    for disk in disks:
        why = disk.left_out
        if why is None and any(layer.path is None for layer in disk.chain):
            why = "a layer of its chain is no local file"
        if why is None:
            chosen.append(disk)
        else:
            left_out.append(LeftOut(disk=disk.name, reason=why))
    return chosen, left_out


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
            if isinstance(each, LiveMergePlan):
                report = live_run.run(guest, each, on_event=listener, pace=pace)
            else:
                for journal in unsettled(real_path(layer.path) for layer in each.layers):
                    live_run.note_switch(guest, journal)
                report = run_at_rest.run(each, on_event=listener)
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


def _of_disk(on_event: OnEvent, disk: str) -> OnEvent:
    def listen(event: Event) -> None:
        if isinstance(event, Progress):
            event = replace(event, phase=f"{event.phase} {disk}")
        elif isinstance(event, Notice):
            event = event.within(disk)
        on_event(event)

    return listen
