"""One disk's night: snapshot, ship to every destination, merge locally, merge at the destinations.

What is shipped is the sealed file, so the image itself is locked for the length of the snapshot alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from snapchain.destination.protocol import Destination as AnyDestination
from snapchain.destination.records import PointsMergeReport
from snapchain.errors import Busy, Conflict, NotFound
from snapchain.merge import run as merge_run
from snapchain.model.events import Notice
from snapchain.ops import snapshot
from snapchain.ops.merge import held_at
from snapchain.ops.nightly import local_chain
from snapchain.ops.nightly.config import Nightly
from snapchain.ops.nightly.local_chain import ImageFacts, Sealed, look
from snapchain.ops.nightly.open_destination import OpenDestination
from snapchain.ops.nightly.report import DiskReport, Fault, Outcome, ShipResult
from snapchain.ops.nightly.selection import SelectedDisk
from snapchain.ops.nightly.state import Reached
from snapchain.ops.nightly.turn import TRIES, Night, Turn, nothing_begun
from snapchain.ops.ship.run import ShipRequest, opened


@dataclass(frozen=True, slots=True)
class _Captured:
    """What is to be shipped. facts: of its chain; moment: when nothing could write to it; how: see DiskReport."""

    sealed: Sealed
    facts: ImageFacts
    moment: datetime
    how: str


def untouched(config: Nightly, disk: SelectedDisk) -> DiskReport:
    """The report on a disk of which nothing was begun."""
    names = [each.name for each in config.destinations_of(disk.settings)]
    return DiskReport(disk=disk.name, image=disk.image, **nothing_begun(names))


class DiskRun(Turn[DiskReport, _Captured]):
    """One disk in one run."""

    def __init__(self, night: Night, disk: SelectedDisk) -> None:
        self._disk, self._settings = disk, disk.settings
        self._dirs = (*disk.settings.image_dirs, disk.image.parent)
        self._state = night.state.disk(disk.name, disk.image)
        super().__init__(
            night,
            disk.name,
            untouched(night.config, disk),
            places=[night.places[each.name] for each in night.config.destinations_of(disk.settings)],
            hooks=disk.settings.hooks,
            facts={"disk": disk.name, "image": disk.image},
            fault=disk.fault,
            merge_above=disk.settings.merge_above,
        )

    def _captured_between_hooks(self) -> _Captured | None:
        """What `before` may have stopped is started again in any case, as soon as can be."""
        in_use = Outcome.BUSY if self._settings.when_busy == "skip" else Outcome.FAILED
        steps = self._steps
        try:
            if (
                steps.attempt("before hook", lambda: self._hooks.run("before")).outcome is Outcome.OK
                and steps.attempt("open", self._check_anybody_there).outcome is Outcome.OK
            ):
                return steps.attempt("snapshot", self._capture, tries=TRIES, busy=in_use).value
            return None
        finally:
            how = self._report.snapshot
            steps.attempt("after_snapshot hook", lambda: self._hooks.run("after_snapshot", snapshot=how))

    def _hook_facts(self) -> dict[str, object]:
        return {"sealed": self._report.sealed}

    def _capture(self) -> _Captured:
        """Seal what was written since the last time."""
        settings, image = self._settings, self._disk.image
        moment = self._night.clock()  # before the look: whatever was written until now is in what is shipped
        facts = look(image, format=settings.format, image_dirs=self._dirs, on_event=self._on_event)
        self._show_chain(facts, beyond=0)
        if not settings.snapshot:
            self._show(snapshot="off", sealed=image)
            return _Captured(Sealed(image, settings.format, beyond=0), facts, moment, "off")
        if facts.fresh:
            below = facts.files[-2]
            self._show(snapshot="unchanged", sealed=below.path)
            return self._captured(Sealed(below.path, below.format, beyond=1), moment, "unchanged")
        planned = snapshot.plan(image, image_format=settings.format, image_dirs=self._dirs)
        made = snapshot.run(planned, on_event=self._on_event)
        self._show(snapshot="made", sealed=made.sealed)
        return self._captured(Sealed(made.sealed, planned.sealed_format, beyond=1), moment, "made")

    def _captured(self, sealed: Sealed, moment: datetime, how: str) -> _Captured:
        facts = look(sealed.path, format=sealed.format, image_dirs=self._dirs, on_event=self._on_event)
        self._show_chain(facts, beyond=sealed.beyond)
        return _Captured(sealed, facts, moment, how)

    def _shipped(self, destination: AnyDestination, place: OpenDestination, captured: _Captured) -> ShipResult:
        sealed = captured.sealed
        request = ShipRequest(
            image=sealed.path,
            top=self._disk.image,
            disk=self._disk.name,
            labels=self._settings.labels,
            time=None if captured.how == "off" else captured.moment,
            format=sealed.format,
            image_dirs=self._dirs,
        )
        with opened(request, destination, on_event=self._on_event) as work:
            self._night.limits.take("ship", work.plan().bytes_to_read)
            report = work.run(on_event=self._while_there_is_time)
        (there,) = destination.disks(self._disk.name)
        assert report.point is not None, "a destination that answers numbers each point"
        reached = Reached(
            captured=captured.moment,
            point=report.point,
            points=len(there.points),
            layers=there.layers,
            shipped_bytes=report.bytes_read,
            stored_bytes=report.bytes_stored,
        )
        self._keep(destinations={**self._state.destinations, place.name: reached})
        return ShipResult(
            destination=place.name,
            outcome=Outcome.DAMAGED if report.damaged else Outcome.OK,
            damaged=report.damaged,
            point=report.point,
            layers_sent=report.layers_sent,
            bytes_read=report.bytes_read,
            bytes_stored=report.bytes_stored,
            content_id=report.content_id,
        )

    def _merge(self, captured: _Captured) -> None:
        try:
            self._merge_some(captured)
        except (Conflict, NotFound):
            # Another snapchain may have merged here meanwhile; an image that is broken is told by looking at it.
            now = look(self._disk.image, format=self._settings.format, image_dirs=self._dirs)
            then = [file.source for file in captured.facts.files]
            if [file.source for file in now.files][: len(then)] == then:
                raise
            self._show(why_not_merged="its chain was changed meanwhile: another snapchain is at work on it")
            self._show_chain(now, beyond=0)

    def _merge_some(self, captured: _Captured) -> None:
        sealed, limits, settings, image = captured.sealed, self._night.limits, self._settings, self._disk.image
        limits.check()
        cap = settings.merge_above
        assert cap is not None
        if len(captured.facts.files) + sealed.beyond <= cap:
            return
        at = [held_at(place.name, place.open(), self._disk.name, epoch=captured.facts.epoch) for place in self._places]
        planned, cut = self._within_budget(lambda budget: local_chain.plan(image, settings, at=at, budget=budget))
        for notice in planned.notices:
            self._on_event(Notice(notice))
        self._show(why_not_merged=cut or local_chain.why_longer(planned, cap))
        if planned.steps:
            limits.take("merge", local_chain.moved(planned))
            try:
                report = merge_run.run(planned, on_event=self._on_event)
            except Busy as error:  # the guest was started again, as it may: merging under it is the live path
                self._show(why_not_merged=str(error))
                return
            self._keep(merge_freed_bytes=report.bytes_freed)
            self._show(merge=report)
            for fault in report.failed:
                told = {"kind": fault.kind, "message": fault.message, "subject": str(image), "hint": None}
                self._steps.add(Fault(step="local merge", **told))
            now = look(sealed.path, format=sealed.format, image_dirs=self._dirs, on_event=self._on_event)
            self._show_chain(now, beyond=sealed.beyond)
        self._check_cut(cut, is_long=(self._report.chain_length or 0) > cap)

    def _retained(self, destination: AnyDestination, place: OpenDestination) -> PointsMergeReport:
        zone, now = self._night.config.zone, self._night.clock()
        return destination.merging(self._disk.name, place.policy, zone=zone, now=now).run(on_event=self._at(place))

    def _keep_kept(self, place: OpenDestination, kept: dict[str, int]) -> None:
        reached = self._state.destinations[place.name].model_copy(update=kept)
        self._keep(destinations={**self._state.destinations, place.name: reached})

    def _show_chain(self, facts: ImageFacts, *, beyond: int) -> None:
        """facts: of the image, or of the chain below its fresh top, which hides nothing (beyond: 1)."""
        chain = {"chain_length": len(facts.files) + beyond, "shadowed_bytes": facts.shadowed_bytes}
        self._show(**chain)
        below = facts.files if beyond else facts.files[:-1]
        self._keep(**chain, layers=tuple(file.real_path for file in below))

    def _keep(self, **values: Any) -> None:
        self._state = self._state.model_copy(update=values)
        self._night.state.put_disk(self._disk.name, self._state)
