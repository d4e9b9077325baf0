"""What a disk and a guest have in common in a night: hooks around, capture, ship to each destination, merge, let go.

The order is the safety: a local layer is merged only when every destination is found to hold it, and points go at a
destination only after a new one has come.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Any, Generic, TypeVar

from snapchain.destination.protocol import Destination as AnyDestination
from snapchain.destination.records import PointsMergeReport
from snapchain.errors import SnapchainError
from snapchain.merge.plan import MergePlan
from snapchain.model.events import Event, Notice, OnEvent, Progress
from snapchain.ops.guest_points_merge import GuestPointsMergeReport
from snapchain.ops.nightly import local_chain
from snapchain.ops.nightly.config import Hooks, Nightly
from snapchain.ops.nightly.hooks import HookRunner
from snapchain.ops.nightly.open_destination import OpenDestination
from snapchain.ops.nightly.plan import CutOffError, Limits
from snapchain.ops.nightly.report import Outcome, ShipResult, TurnReport
from snapchain.ops.nightly.state import StateFile
from snapchain.ops.nightly.steps import Steps

TRIES = 2
"""Of a step that lost a race with another snapchain."""


@dataclass(frozen=True, slots=True)
class Night:
    """What all turns of a run share. facts: for the hooks."""

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


R = TypeVar("R", bound=TurnReport)
C = TypeVar("C")
"""What was captured, and is to be shipped."""
P = TypeVar("P", bound=MergePlan)


def nothing_begun(names: Sequence[str]) -> dict[str, Any]:
    """The fields of a report on what was not begun. names: of its destinations."""
    return {
        "outcome": Outcome.LEFT,
        "destinations": tuple(ShipResult(destination=each, outcome=Outcome.LEFT) for each in names),
        "left": ("all of it: the run ended before its turn",),
    }


class Turn(ABC, Generic[R, C]):
    """One disk or guest in one run. `run` does not raise for what is wrong with it: it reports.

    name: in the report and at the destinations; places: where it goes; facts: for its hooks
    """

    def __init__(
        self,
        night: Night,
        name: str,
        report: R,
        *,
        places: Sequence[OpenDestination],
        hooks: Hooks,
        facts: dict[str, object],
        fault: SnapchainError | None,
        merge_above: int | None,
    ) -> None:
        self._night, self._name, self._places, self._fault = night, name, places, fault
        self._merge_above = merge_above
        self._steps, self._began = Steps(), time.monotonic()
        self._report, self._shipping = report, False
        self._hooks = HookRunner(hooks, {**night.facts, **facts}, on_notice=lambda words: self._on_event(Notice(words)))

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
    def report(self) -> R:
        """As far as it has come."""
        steps, seconds = self._steps, round(time.monotonic() - self._began, 3)
        values: dict[str, Any] = {"outcome": steps.outcome, "faults": tuple(steps.faults), "left": tuple(steps.left)}
        values["moved_to"] = steps.moved_to
        if not self._shipping:  # nothing came to be shipped, for the same reason everywhere
            values["destinations"] = tuple(
                each.model_copy(update={"outcome": steps.outcome}) for each in self._report.destinations
            )
        return self._report.model_copy(update={**values, "seconds": seconds})

    @abstractmethod
    def _captured_between_hooks(self) -> C | None:
        """What is to be shipped; None where that failed or is not to be. Raises nothing but an interrupt."""

    @abstractmethod
    def _shipped(self, destination: AnyDestination, place: OpenDestination, captured: C) -> ShipResult:
        """Ship it. Raises as shipping does, and CutOffError."""

    @abstractmethod
    def _merge(self, captured: C) -> None:
        """Merge local layers that every destination holds. Raises as merging does, and CutOffError."""

    @abstractmethod
    def _retained(
        self, destination: AnyDestination, place: OpenDestination
    ) -> PointsMergeReport | GuestPointsMergeReport:
        """Let points go at a destination by its rules."""

    @abstractmethod
    def _keep_kept(self, place: OpenDestination, kept: dict[str, int]) -> None:
        """Remember how many points and layers there are now."""

    @abstractmethod
    def _keep(self, **values: Any) -> None:
        """Remember these values between runs."""

    def _hook_facts(self) -> dict[str, object]:
        """For the hooks at the end."""
        return {}

    def _check_selection(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _with_hooks(self) -> None:
        steps = self._steps
        try:
            captured = self._captured_between_hooks()
            if captured is not None:
                self._deliver(captured)
        finally:
            outcome, facts = steps.outcome, self._hook_facts()
            if outcome is Outcome.FAILED:
                error = str(steps.faults[0])
                steps.attempt(
                    "on_failure hook", lambda: self._hooks.run("on_failure", outcome=outcome, error=error, **facts)
                )
            steps.attempt("after hook", lambda: self._hooks.run("after", outcome=outcome, **facts))

    def _deliver(self, captured: C) -> None:
        self._shipping = True
        for place in self._places:
            self._show_result(self._ship(place, captured))
        if self._merge_above is not None:
            if all(each.point is not None for each in self._report.destinations):
                self._steps.attempt("local merge", lambda: self._merge(captured), tries=TRIES)
            else:
                self._show(why_not_merged="not every destination holds it")
        for place, result in zip(self._places, self._report.destinations, strict=True):
            self._show_result(self._retain(place, result))

    def _check_anybody_there(self) -> None:
        """Without any destination a snapshot would only make the chain longer. Raises the error of the last of them."""
        for number, place in enumerate(self._places, start=1):
            try:
                place.reach(self._name)
            except SnapchainError:
                if number == len(self._places):
                    raise
            else:
                return

    def _ship(self, place: OpenDestination, captured: C) -> ShipResult:
        def ship() -> ShipResult:
            with place.turn() as destination:
                self._night.limits.check()  # the turn may have been long in coming
                return self._shipped(destination, place, captured)

        done = self._steps.attempt(f"ship to {place.name}", ship, tries=TRIES)
        if done.value is None:
            return ShipResult(destination=place.name, outcome=done.outcome)
        if done.value.damaged:
            self._steps.count(Outcome.DAMAGED)
        return done.value

    def _while_there_is_time(self, event: Event) -> None:
        """Shipping may end in the middle: what was sent is not sent again. A first shipment can take several nights."""
        self._on_event(event)
        self._night.limits.check()

    def _retain(self, place: OpenDestination, result: ShipResult) -> ShipResult:
        """Let points go by the rules, where a new one has come."""
        if result.point is None or place.policy.is_empty:
            return result

        def retain() -> PointsMergeReport | GuestPointsMergeReport:
            with place.turn() as destination:
                self._night.limits.check()
                return self._retained(destination, place)

        done = self._steps.attempt(f"merge at {place.name}", retain, tries=TRIES)
        if done.value is None:
            return result.model_copy(update={"outcome": done.outcome})
        kept = {"points": len(done.value.points_kept), "layers": done.value.layers_after}
        self._keep_kept(place, kept)
        return result.model_copy(update={"retention": done.value, **kept})

    def _within_budget(self, plan: Callable[[int | None], P]) -> tuple[P, str | None]:
        """A merge plan that keeps to the night's budget of bytes, and why it is cut short, None where it is not.

        plan: for so many bytes at most; None: for any number
        """
        limits, planned = self._night.limits, plan(None)
        left = limits.left("merge")
        if left is None or local_chain.moved(planned) <= left:
            return planned, None
        smaller = plan(left)
        cut = f"the budget of bytes to merge has {left} left, and this needs {local_chain.moved(planned)}"
        # What is larger than a whole budget would else never be done.
        return smaller if smaller.steps or limits.has_begun("merge") else planned, cut

    def _check_cut(self, cut: str | None, *, is_long: bool) -> None:
        """Raises CutOffError where the budget has left a chain too long."""
        if cut is not None and is_long:
            raise CutOffError(cut)

    def _at(self, place: OpenDestination) -> OnEvent:
        return partial(self._on_event, where=f" at {place.name}")

    def _show(self, **values: Any) -> None:
        self._report = self._report.model_copy(update=values)

    def _show_result(self, result: ShipResult) -> None:
        known = self._report.destinations
        self._show(destinations=tuple(result if each.destination == result.destination else each for each in known))

    def _on_event(self, event: Event, *, where: str = "") -> None:
        match event:
            case Notice():
                if self._night.is_new(event.text):
                    self._night.on_event(event.within(self._name))
            case Progress(phase):
                self._night.on_event(replace(event, phase=f"{phase} {self._name}{where}"))
