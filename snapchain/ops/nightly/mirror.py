"""A destination that is a copy of another one (`copy_of`): after all shipments a night copies to it what it lacks.

    here   1 2 3 4 5
    away   1   3       ->  4 5     with rules of its own only what is newer than the newest point that both have:
                                   2 was there, and was dropped

Disks and guests are copied one by one, and only those of this configuration: a fault of one stops no other.
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Sequence
from dataclasses import replace

from snapchain.destination.guest_record import record_disk
from snapchain.destination.protocol import Destination
from snapchain.destination.records import PointsMergeReport
from snapchain.errors import PartialFailure
from snapchain.host.terminal import counted
from snapchain.model.consistency import Consistency
from snapchain.model.events import Event, Notice, Progress
from snapchain.ops import guest_points_merge
from snapchain.ops.copy.request import CopyRequest, DiskPlan, DiskReport
from snapchain.ops.copy.run import run as copy_points
from snapchain.ops.guest_points_merge import GuestPointsMergeReport, guest_at
from snapchain.ops.nightly.open_destination import OpenDestination
from snapchain.ops.nightly.report import CopyResult
from snapchain.ops.nightly.state import GuestReached, Reached
from snapchain.ops.nightly.turn import Night


def request_of(place: OpenDestination, name: str) -> CopyRequest:
    """For one disk or guest. With rules of its own, the copy has dropped points that are not to come back."""
    return CopyRequest(names=(glob.escape(name),), newer=not place.policy.is_empty)


class Mirror:
    """One copy in one run. results: of the disks and guests that were copied so far"""

    def __init__(self, night: Night, place: OpenDestination, *, guests: Collection[str]) -> None:
        assert place.config.copy_of is not None
        self._night, self._place, self._guests = night, place, guests
        self._source = night.places[place.config.copy_of]
        self.results: list[CopyResult] = []

    @property
    def source(self) -> OpenDestination:
        """What it is a copy of."""
        return self._source

    def copy(self, name: str) -> None:
        """Copy a disk or a guest that the source has, then drop points there by the rules.

        Raises PartialFailure for points that could not be copied, CutOffError when the time is over: what was copied
        stays, and the next run continues from there.
        """
        self._night.limits.check()
        with self._source.turn() as source, self._place.turn() as destination:
            report = copy_points(request_of(self._place, name), source, destination, on_event=self._heard)
            result = CopyResult(
                name=name,
                points=tuple(
                    point.point_there for disk in report.disks if self._counts(name, disk.disk) for point in disk.points
                ),
                present=sum(disk.present for disk in report.disks if self._counts(name, disk.disk)),
                bytes_read=report.bytes_read,
                bytes_stored=report.bytes_stored,
            )
            self.results.append(result)
            if result.points and not self._place.policy.is_empty:
                retention = self._retained(destination, name)
                self.results[-1] = result.model_copy(update={"retention": retention})
            if report.ok:
                self._keep(destination, name, self.results[-1])
        check_whole(report.disks)

    def _counts(self, name: str, disk: str) -> bool:
        """Whether points of this disk are counted: a guest point is counted once, by the disk that holds its record."""
        return disk == (record_disk(name) if name in self._guests else name)

    def _retained(self, destination: Destination, name: str) -> PointsMergeReport | GuestPointsMergeReport:
        zone, now, policy = self._night.config.zone, self._night.clock(), self._place.policy
        if name in self._guests:
            return guest_points_merge.run(destination, name, policy, zone=zone, now=now, on_event=self._heard)
        return destination.merging(name, policy, zone=zone, now=now).run(on_event=self._heard)

    def _keep(self, destination: Destination, name: str, result: CopyResult) -> None:
        """Remember what is safe there, so that its lag is reported like that of any other destination."""
        state, place = self._night.state, self._place.name
        shipped = {"shipped_bytes": result.bytes_read, "stored_bytes": result.bytes_stored}
        if name in self._guests:
            known, view = state.now.guests.get(name), guest_at(destination, name)
            if known is not None and view.points:
                newest = view.points[-1]
                guest = GuestReached(
                    captured=newest.time,
                    consistency=newest.consistency or Consistency.CRASH,
                    point=newest.point,
                    points=len(view.points),
                    **shipped,
                )
                state.put_guest(name, known.model_copy(update={"destinations": {**known.destinations, place: guest}}))
            return
        disk, (there,) = state.now.disks.get(name), destination.disks(name)
        if disk is not None and there.points:
            reached = Reached(
                captured=there.points[-1].time,
                point=there.points[-1].point,
                points=len(there.points),
                layers=there.layers,
                **shipped,
            )
            state.put_disk(name, disk.model_copy(update={"destinations": {**disk.destinations, place: reached}}))

    def _heard(self, event: Event) -> None:
        match event:
            case Notice():
                if self._night.is_new(event.text):
                    self._night.on_event(event.within(self._place.name))
            case Progress(phase):
                self._night.on_event(replace(event, phase=f"{phase} to {self._place.name}"))
        self._night.limits.check()


def check_whole(disks: Sequence[DiskReport] | Sequence[DiskPlan]) -> None:
    """Raises PartialFailure for what is not copied."""
    for disk in disks:
        if disk.failed is not None:
            raise PartialFailure(disk.failed)
    refused = [(disk.disk, point) for disk in disks for point in disk.refused]
    if refused:
        name, point = refused[0]
        raise PartialFailure(
            f"{counted(len(refused), 'point')} cannot be copied, the first: {name}@{point.point}: {point.message}",
            hint="`snapchain verify` of the source tells what is damaged; once it is repaired, `snapchain copy` copies "
            "the points that were left out",
        )
