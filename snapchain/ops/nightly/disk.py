"""One disk's night: snapshot, ship to every destination, merge locally, merge at the destinations.

The order is the safety: a local layer is merged only when every destination is found to hold it, and points go at a
destination only after a new one has come.  What is shipped is the sealed file, so the image itself is locked for the
length of the snapshot alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Any

from snapchain.destination.records import PointsMergeReport
from snapchain.errors import Busy, Conflict, NotFound, SnapchainError
from snapchain.merge import run as merge_run
from snapchain.model.events import Event, Notice, OnEvent, Progress
from snapchain.ops import snapshot
from snapchain.ops.merge import held_at
from snapchain.ops.nightly import local_chain
from snapchain.ops.nightly.config import Nightly
from snapchain.ops.nightly.hooks import HookRunner
from snapchain.ops.nightly.local_chain import ImageFacts, Sealed, look
from snapchain.ops.nightly.open_destination import OpenDestination
from snapchain.ops.nightly.plan import CutOffError, Limits
from snapchain.ops.nightly.report import DiskReport, Fault, Outcome, ShipResult
from snapchain.ops.nightly.selection import SelectedDisk
from snapchain.ops.nightly.state import Reached, StateFile
from snapchain.ops.nightly.steps import Steps
from snapchain.ops.ship.run import ShipReport, ShipRequest, opened

_TRIES = 2
"""Of a step that lost a race with another snapchain."""


@dataclass(frozen=True, slots=True)
class Night:
    """What all disks of a run share. facts: for the hooks."""

    config: Nightly
    places: dict[str, OpenDestination]
    state: StateFile
    limits: Limits
    clock: Callable[[], datetime]
    on_event: OnEvent
    facts: dict[str, object] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def is_new(self, message: str) -> bool:
        """Whether this note was not said yet in this run, of whichever disk; it is now. From any thread."""
        with self._lock:
            known = message in self._said
            self._said.add(message)
        return not known


@dataclass(frozen=True, slots=True)
class _Captured:
    """What is to be shipped. facts: of its chain; moment: when nothing could write to it; how: see DiskReport."""

    sealed: Sealed
    facts: ImageFacts
    moment: datetime
    how: str


def untouched(config: Nightly, disk: SelectedDisk) -> DiskReport:
    """The report on a disk of which nothing was begun."""
    return DiskReport(
        disk=disk.name,
        image=disk.image,
        outcome=Outcome.LEFT,
        destinations=tuple(
            ShipResult(destination=each.name, outcome=Outcome.LEFT) for each in config.destinations_of(disk.settings)
        ),
        left=("all of it: the run ended before its turn",),
    )


class DiskRun:
    """One disk in one run. `run` does not raise for what is wrong with the disk: it reports."""

    def __init__(self, night: Night, disk: SelectedDisk) -> None:
        self._night, self._disk, self._settings = night, disk, disk.settings
        self._places = [night.places[each.name] for each in night.config.destinations_of(disk.settings)]
        self._dirs = (*disk.settings.image_dirs, disk.image.parent)
        self._state = night.state.disk(disk.name, disk.image)
        self._steps, self._began = Steps(), time.monotonic()
        self._report, self._shipping = untouched(night.config, disk), False
        facts = {**night.facts, "disk": disk.name, "image": disk.image}
        self._hooks = HookRunner(disk.settings.hooks, facts, on_notice=lambda words: self._on_event(Notice(words)))

    def run(self) -> None:
        """Do what there is time for. An interrupt passes, and `report` has what was done before it."""
        self._began = time.monotonic()
        if self._steps.attempt("selection", self._check_selection).outcome is Outcome.OK and (
            self._steps.attempt("all of it", self._night.limits.check).outcome is Outcome.OK
        ):
            self._keep(begun=self._night.clock())
            try:
                self._with_hooks()
            finally:
                self._keep(begun=None)
        report = self.report
        self._keep(outcome=report.outcome.value, seconds=report.seconds)
        if report.outcome is not Outcome.LEFT:
            self._keep(reached=self._night.clock())

    def fail(self, error: Exception) -> None:
        """`run` has raised what it should not."""
        self._steps.note("all of it", error)

    @property
    def report(self) -> DiskReport:
        """As far as it has come."""
        steps, seconds = self._steps, round(time.monotonic() - self._began, 3)
        values: dict[str, Any] = {"outcome": steps.outcome, "faults": tuple(steps.faults), "left": tuple(steps.left)}
        values["moved_to"] = steps.moved_to
        if not self._shipping:  # nothing came to be shipped, for the same reason everywhere
            values["destinations"] = tuple(
                each.model_copy(update={"outcome": steps.outcome}) for each in self._report.destinations
            )
        return self._report.model_copy(update={**values, "seconds": seconds})

    def _check_selection(self) -> None:
        if self._disk.fault is not None:
            raise self._disk.fault

    def _with_hooks(self) -> None:
        steps = self._steps
        try:
            captured = self._sealed_between_hooks()
            if captured is not None:
                self._deliver(captured)
        finally:
            outcome, sealed = steps.outcome, self._report.sealed
            if outcome is Outcome.FAILED:
                error = str(steps.faults[0])
                steps.attempt(
                    "on_failure hook",
                    lambda: self._hooks.run("on_failure", outcome=outcome, sealed=sealed, error=error),
                )
            steps.attempt("after hook", lambda: self._hooks.run("after", outcome=outcome, sealed=sealed))

    def _sealed_between_hooks(self) -> _Captured | None:
        """What `before` may have stopped is started again in any case, as soon as can be."""
        in_use = Outcome.BUSY if self._settings.when_busy == "skip" else Outcome.FAILED
        steps = self._steps
        try:
            if (
                steps.attempt("before hook", lambda: self._hooks.run("before")).outcome is Outcome.OK
                and steps.attempt("open", self._check_anybody_there).outcome is Outcome.OK
            ):
                return steps.attempt("snapshot", self._capture, tries=_TRIES, busy=in_use).value
            return None
        finally:
            how = self._report.snapshot
            steps.attempt("after_snapshot hook", lambda: self._hooks.run("after_snapshot", snapshot=how))

    def _deliver(self, captured: _Captured) -> None:
        self._shipping = True
        for place in self._places:
            self._show_result(self._ship(place, captured))
        if self._settings.merge_above is not None:
            if all(each.point is not None for each in self._report.destinations):
                self._steps.attempt("local merge", lambda: self._merge(captured), tries=_TRIES)
            else:
                self._show(why_not_merged="not every destination holds it")
        for place, result in zip(self._places, self._report.destinations, strict=True):
            self._show_result(self._retain(place, result))

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

    def _check_anybody_there(self) -> None:
        """Without any destination a snapshot would only make the chain longer. Raises the error of the last of them."""
        for number, place in enumerate(self._places, start=1):
            try:
                place.reach(self._disk.name)
            except SnapchainError:
                if number == len(self._places):
                    raise
            else:
                return

    def _ship(self, place: OpenDestination, captured: _Captured) -> ShipResult:
        step = f"ship to {place.name}"
        done = self._steps.attempt(step, lambda: self._shipped(place, captured), tries=_TRIES)
        if done.value is None:
            return ShipResult(destination=place.name, outcome=done.outcome)
        report = done.value
        if report.damaged:
            self._steps.count(Outcome.DAMAGED)
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

    def _shipped(self, place: OpenDestination, captured: _Captured) -> ShipReport:
        sealed = captured.sealed
        with place.turn() as destination:
            self._night.limits.check()  # the turn may have been long in coming
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
        return report

    def _while_there_is_time(self, event: Event) -> None:
        """Shipping may end in the middle: what was sent is not sent again. A first shipment can take several nights."""
        self._on_event(event)
        self._night.limits.check()

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
        planned, cut = local_chain.plan(image, settings, at=at, budget=None), None
        left = limits.left("merge")
        if left is not None and local_chain.moved(planned) > left:
            smaller = local_chain.plan(image, settings, at=at, budget=left)
            cut = f"the budget of bytes to merge has {left} left, and this needs {local_chain.moved(planned)}"
            # What is larger than a whole budget would else never be done.
            planned = smaller if smaller.steps or limits.has_begun("merge") else planned
        for notice in planned.notices:
            self._on_event(Notice(notice))
        self._show(why_not_merged=cut or local_chain.why_longer(planned, settings))
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
        if cut is not None and (self._report.chain_length or 0) > cap:
            raise CutOffError(cut)

    def _retain(self, place: OpenDestination, result: ShipResult) -> ShipResult:
        """Let points go by the rules, where a new one has come."""
        if result.point is None or place.policy.is_empty:
            return result
        done = self._steps.attempt(f"merge at {place.name}", lambda: self._retained(place), tries=_TRIES)
        if done.value is None:
            return result.model_copy(update={"outcome": done.outcome})
        kept = {"points": len(done.value.points_kept), "layers": done.value.layers_after}
        reached = self._state.destinations[place.name].model_copy(update=kept)
        self._keep(destinations={**self._state.destinations, place.name: reached})
        return result.model_copy(update={"retention": done.value, **kept})

    def _retained(self, place: OpenDestination) -> PointsMergeReport:
        with place.turn() as destination:
            self._night.limits.check()
            zone, now = self._night.config.zone, self._night.clock()
            work = destination.merging(self._disk.name, place.policy, zone=zone, now=now)
            return work.run(on_event=partial(self._on_event, where=f" at {place.name}"))

    def _show(self, **values: Any) -> None:
        self._report = self._report.model_copy(update=values)

    def _show_result(self, result: ShipResult) -> None:
        known = self._report.destinations
        self._show(destinations=tuple(result if each.destination == result.destination else each for each in known))

    def _show_chain(self, facts: ImageFacts, *, beyond: int) -> None:
        """facts: of the image, or of the chain below its fresh top, which hides nothing (beyond: 1)."""
        chain = {"chain_length": len(facts.files) + beyond, "shadowed_bytes": facts.shadowed_bytes}
        self._show(**chain)
        below = facts.files if beyond else facts.files[:-1]
        self._keep(**chain, layers=tuple(file.real_path for file in below))

    def _keep(self, **values: Any) -> None:
        self._state = self._state.model_copy(update=values)
        self._night.state.put_disk(self._disk.name, self._state)

    def _on_event(self, event: Event, *, where: str = "") -> None:
        match event:
            case Notice():
                if self._night.is_new(event.text):
                    self._night.on_event(event.within(self._disk.name))
            case Progress(phase):
                self._night.on_event(replace(event, phase=f"{phase} {self._disk.name}{where}"))
