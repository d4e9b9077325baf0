"""One guest's night: a snapshot of all disks, one guest point at every destination, live merges, retention.

The guest is opened anew for each step: it may be shut down, started or migrated between two of them, and a step looks
at it as it is then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from snapchain.destination.protocol import Destination as AnyDestination
from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, Unavailable
from snapchain.guest.address import open_guest
from snapchain.guest.disks import active_path, disks_to_protect, find_disk
from snapchain.guest.protocol import Guest
from snapchain.guest.snapshot import GuestSnapshot, SnapshotRequest
from snapchain.merge.pace import Pace
from snapchain.merge.plan import MergePlan
from snapchain.merge.request import At, MergeRequest
from snapchain.model.events import Notice
from snapchain.ops import guest_points_merge
from snapchain.ops.guest_chain_merge import plan_disk, run_disk
from snapchain.ops.guest_points import find_guest
from snapchain.ops.guest_points_merge import GuestPointsMergeReport
from snapchain.ops.guest_seal import MovedError, as_named_now, epoch_of, seal
from snapchain.ops.merge import held_at
from snapchain.ops.nightly import local_chain
from snapchain.ops.nightly.config import Guests, Nightly
from snapchain.ops.nightly.guest_list import SelectedGuest
from snapchain.ops.nightly.open_destination import OpenDestination
from snapchain.ops.nightly.report import Fault, GuestDiskResult, GuestReport, Outcome, ShipResult
from snapchain.ops.nightly.state import GuestReached
from snapchain.ops.nightly.turn import TRIES, Night, Turn, nothing_begun
from snapchain.ops.ship import guest as ship


def untouched_guest(config: Nightly, guest: SelectedGuest) -> GuestReport:
    """The report on a guest of which nothing was begun."""
    names = [each.name for each in config.destinations_of(guest.settings)]
    return GuestReport(guest=guest.name, option=guest.option, is_new=guest.is_new, **nothing_begun(names))


def wanted_disks(guest: Guest, settings: Guests) -> tuple[str, ...]:
    """Names of the disks to take; none for all that can be protected. Raises as `disks_to_protect`."""
    if not settings.exclude_disks:
        return settings.disks
    names = tuple(disk.name for disk in disks_to_protect(guest) if disk.name not in settings.exclude_disks)
    if not names:
        raise InvalidInput(
            "exclude_disks leaves none of the guest's disks", subject=guest.name, hint="exclude the guest instead"
        )
    return names


@dataclass(frozen=True, slots=True)
class _Captured:
    """What is to be shipped. snapshot: dated by this run's clock."""

    snapshot: GuestSnapshot


class GuestRun(Turn[GuestReport, _Captured]):
    """One guest in one run."""

    def __init__(self, night: Night, guest: SelectedGuest) -> None:
        self._guest, self._settings = guest, guest.settings
        self._state = night.state.guest(guest.name, guest.guest, guest.option)
        super().__init__(
            night,
            guest.name,
            untouched_guest(night.config, guest),
            places=[night.places[each.name] for each in night.config.destinations_of(guest.settings)],
            hooks=guest.settings.hooks,
            facts={"guest": guest.name, "option": guest.option},
            fault=guest.fault,
            merge_above=guest.settings.merge_above,
        )

    @contextmanager
    def _opened(self) -> Iterator[Guest]:
        assert self._guest.address is not None, "a guest without an address has a fault"
        with open_guest(self._guest.address, on_event=self._on_event) as guest:
            yield guest

    def _captured_between_hooks(self) -> _Captured | None:
        in_use = Outcome.BUSY if self._settings.when_busy == "skip" else Outcome.FAILED
        steps = self._steps
        if (
            steps.attempt("before hook", lambda: self._hooks.run("before")).outcome is not Outcome.OK
            or steps.attempt("open", self._check_anybody_there).outcome is not Outcome.OK
        ):
            return None
        return steps.attempt("snapshot", self._capture, tries=TRIES, busy=in_use).value

    def _hook_facts(self) -> dict[str, object]:
        report = self._report
        return {"consistency": report.consistency, "instant": report.instant}

    def _capture(self) -> _Captured | None:
        settings, moment = self._settings, self._night.clock()
        with self._opened() as guest:
            self._show(state=guest.state())
            disks = wanted_disks(guest, settings)
            hooks = settings.hooks
            request = SnapshotRequest(
                disks=disks,
                quiesce=settings.quiesce,
                labels=settings.labels,
                pre_freeze=hooks.pre_freeze or (),
                post_thaw=hooks.post_thaw or (),
                image_dirs=settings.image_dirs,
            )
            try:
                taken, is_new = seal(guest, request, on_event=self._on_event)
            except MovedError as error:
                self._steps.count(Outcome.MOVED)
                self._steps.moved_to = "another host"
                self._on_event(Notice(str(error)))
                return None
        taken = taken.model_copy(update={"time": moment})
        self._show(
            snapshot="made" if is_new else "unchanged",
            instant=taken.instant,
            time=moment,
            consistency=taken.consistency,
            why_not=taken.why_not,
            frozen_seconds=taken.frozen_seconds,
            left_out=taken.left_out,
            disks=tuple(
                GuestDiskResult(disk=each.disk, sealed=each.sealed, chain_length=each.layers) for each in taken.disks
            ),
        )
        lengths = {each.disk: each.layers for each in taken.disks}
        self._keep(chain_lengths=lengths, frozen_seconds=taken.frozen_seconds)
        return _Captured(taken)

    def _shipped(self, destination: AnyDestination, place: OpenDestination, captured: _Captured) -> ShipResult:
        with self._opened() as guest:
            taken = as_named_now(guest, captured.snapshot) or captured.snapshot
            request = ship.GuestShipRequest(
                snapshot=SnapshotRequest(image_dirs=self._settings.image_dirs),
                taken=taken,
                name=self._guest.name,
                labels=self._settings.labels,
            )
            report = ship.run(guest, request, destination, on_event=self._while_there_is_time)
        view = find_guest(destination, self._guest.name)
        reached = GuestReached(
            captured=taken.time,
            consistency=taken.consistency,
            point=report.guest_point,
            points=len(view.points) if view is not None else 1,
            shipped_bytes=sum(each.bytes_read for each in report.disks),
            stored_bytes=sum(each.bytes_stored for each in report.disks),
        )
        self._keep(destinations={**self._state.destinations, place.name: reached})
        damaged = tuple(sorted({point for each in report.disks for point in each.damaged}))
        return ShipResult(
            destination=place.name,
            outcome=Outcome.DAMAGED if damaged else Outcome.OK,
            damaged=damaged,
            point=report.guest_point,
            layers_sent=sum(each.layers_sent for each in report.disks),
            bytes_read=reached.shipped_bytes,
            bytes_stored=reached.stored_bytes,
        )

    def _merge(self, captured: _Captured) -> None:
        cap = self._settings.merge_above
        assert cap is not None
        for disk in captured.snapshot.disks:
            if disk.layers > cap:
                self._merge_disk(disk.disk, cap)

    def _merge_disk(self, disk: str, cap: int) -> None:
        limits = self._night.limits
        limits.check()
        name = f"{self._guest.name}/{disk}"
        with self._opened() as guest:
            epoch = epoch_of(guest, disk, image_dirs=self._settings.image_dirs)
            at = tuple(held_at(place.name, place.open(), name, epoch=epoch) for place in self._places)
            planned, cut = self._within_budget(lambda budget: self._plan(guest, disk, cap, at, budget))
            for notice in planned.notices:
                self._on_event(Notice(notice))
            why = cut or local_chain.why_longer(planned, cap)
            values: dict[str, Any] = {"why_not_merged": why}
            if planned.steps or planned.unfinished:  # what a killed night has left is settled by any merge
                limits.take("merge", local_chain.moved(planned))
                try:
                    report = run_disk(guest, planned, on_event=self._on_event, pace=Pace(idle=self._settings.idle))
                except (Busy, Conflict, NotFound, Unavailable) as error:
                    # It was shut down, started, or somebody else is at work: the next night finds it as it is then.
                    values["why_not_merged"] = str(error)
                else:
                    values |= {"merge": report if report.merges else None, "chain_length": report.layers_after}
                    freed = self._state.merge_freed_bytes if self._has_merged() else 0
                    self._keep(
                        merge_freed_bytes=freed + report.bytes_freed,
                        chain_lengths={**self._state.chain_lengths, disk: report.layers_after},
                    )
                    for fault in report.failed:
                        told = {"kind": fault.kind, "message": fault.message, "subject": name, "hint": None}
                        self._steps.add(Fault(step="local merge", **told))
            self._show_disk(disk, **values)
        self._check_cut(cut, is_long=self._state.chain_lengths.get(disk, 0) > cap)

    def _has_merged(self) -> bool:
        return any(each.merge is not None for each in self._report.disks)

    def _plan(self, guest: Guest, disk: str, cap: int, at: tuple[At, ...], budget: int | None) -> MergePlan:
        dirs = self._settings.image_dirs
        active = active_path(find_disk(guest, disk), guest=guest)
        request = MergeRequest(
            image=active, image_dirs=(*dirs, active.parent), max_layers=cap, budget_bytes=budget, at=at
        )
        return plan_disk(guest, disk, request)

    def _retained(self, destination: AnyDestination, place: OpenDestination) -> GuestPointsMergeReport:
        zone, now = self._night.config.zone, self._night.clock()
        report = guest_points_merge.run(
            destination, self._guest.name, place.policy, zone=zone, now=now, on_event=self._at(place)
        )
        for failed in report.failed:
            told = {"kind": failed.kind, "message": failed.message, "subject": failed.disk, "hint": None}
            self._steps.add(Fault(step=f"merge at {place.name}", **told))
        return report

    def _keep_kept(self, place: OpenDestination, kept: dict[str, int]) -> None:
        reached = self._state.destinations[place.name].model_copy(update={"points": kept["points"]})
        self._keep(destinations={**self._state.destinations, place.name: reached})

    def _keep(self, **values: Any) -> None:
        self._state = self._state.model_copy(update=values)
        self._night.state.put_guest(self._guest.name, self._state)

    def _show_disk(self, name: str, **values: Any) -> None:
        known = self._report.disks
        self._show(
            disks=tuple(each.model_copy(update=values) if each.disk == name else each for each in known),
            why_not_merged=self._report.why_not_merged or values.get("why_not_merged"),
        )
