"""The last of a night: clones of some guests boot from their newest guest points, by turns, and are removed again.

    [test]                     what is left of a killed run goes first: its clone is ended, and its directory removed
    guests = 2                 the guests whose last test is oldest, those whose last one failed besides
    directory = "/var/tmp"     -> serve its disks -> boot -> agent, or `check` -> end the clone

A clone has no network.  What a night begins here ends with the window, the run's time, or its own `time`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from snapchain.errors import Corrupt
from snapchain.host.files import free_bytes, make_directories
from snapchain.host.hooks import missing
from snapchain.model.events import Event, Notice
from snapchain.ops.failover.trial import TrialReport, TrialRequest, clone_name, remove_clone, trial
from snapchain.ops.guest_points_merge import guest_at
from snapchain.ops.nightly.config import BootTests, Nightly
from snapchain.ops.nightly.guest_list import SelectedGuest
from snapchain.ops.nightly.maintenance import turns
from snapchain.ops.nightly.plan import CutOffError
from snapchain.ops.nightly.report import BootTestReport, Outcome
from snapchain.ops.nightly.state import State, TestState
from snapchain.ops.nightly.steps import Steps
from snapchain.ops.nightly.turn import Night


@dataclass(frozen=True, slots=True)
class Wanted:
    """A guest at a destination. guest: its name there"""

    guest: str
    destination: str

    @property
    def key(self) -> str:
        """Of its state."""
        return f"{self.guest}@{self.destination}"


def wanted(config: Nightly, guests: Sequence[SelectedGuest], state: State) -> list[Wanted]:
    """The guests whose turn it is: those whose last test failed, and as many others as the configuration says."""
    settings = config.test
    if settings is None:
        return []
    all_of_them = {
        found.key: found
        for guest in guests
        if guest.fault is None
        for place in (*config.destinations_of(guest.settings), *config.copies_of(guest.settings))
        # A second site may be slow and cost by the byte: its copies boot where it is named.
        if (place.copy_of is None if settings.destinations is None else place.name in settings.destinations)
        # It is tested where a point of it has come; one that never came has no turn.
        if (reached := state.guests.get(guest.name)) is not None and place.name in reached.destinations
        for found in [Wanted(guest.name, place.name)]
    }
    had = {key: turn for key, each in state.tests.items() if (turn := each.turn) is not None}
    failed = [key for key in all_of_them if key in state.tests and state.tests[key].ok is False]
    return [all_of_them[key] for key in turns(list(all_of_them), had, settings.guests, damaged=failed)]


class BootTestRun:
    """All boot tests of one run. `run` does not raise for what is wrong with one: it reports."""

    def __init__(self, night: Night, settings: BootTests, guests: Sequence[SelectedGuest]) -> None:
        self._night, self._settings = night, settings
        self._wanted = wanted(night.config, guests, night.state.now)
        self._ends = time.monotonic() + settings.time
        self.reports: dict[str, BootTestReport] = {
            each.key: BootTestReport(
                guest=each.guest,
                destination=each.destination,
                outcome=Outcome.LEFT,
                left=("boot test: the run ended before its turn",),
            )
            for each in self._wanted
        }

    def run(self) -> None:
        """One after the other. An interrupt passes, and `reports` has what was done before it."""
        for each in self._wanted:
            begun = time.monotonic()
            steps = Steps()
            shown: TrialReport | None = None
            try:
                shown = steps.attempt("boot test", partial(self._one, each)).value
                if shown is not None and not shown.ok:
                    error = Corrupt(
                        f"the clone of guest point {shown.guest_point} did not boot: {shown.why_not}",
                        subject=each.guest,
                        hint="`snapchain failover --test` boots one by hand; the next runs test this guest again",
                    )
                    steps.note("boot test", error)
            finally:
                self.reports[each.key] = BootTestReport(
                    guest=each.guest,
                    destination=each.destination,
                    outcome=steps.outcome,
                    guest_point=None if shown is None else shown.guest_point,
                    booted=None if shown is None else shown.ok,
                    by=None if shown is None else shown.by,
                    boot_seconds=None if shown is None else shown.boot_seconds,
                    bytes_written=0 if shown is None else shown.bytes_written,
                    console=() if shown is None else shown.console,
                    seconds=round(time.monotonic() - begun, 3),
                    faults=tuple(steps.faults),
                    left=tuple(steps.left),
                )

    def _one(self, each: Wanted) -> TrialReport:
        night, settings = self._night, self._settings
        self._check_time()
        clean_up(night)
        if settings.check and (error := missing("check", settings.check)) is not None:
            raise error
        make_directories(settings.directory, mode=0o700)
        known = night.state.now.tests.get(each.key, TestState())
        # Its turn counts from now on: a test that is cut off each night must not keep the others from theirs.
        known = known.model_copy(update={"begun": night.clock()})
        night.state.put_test(each.key, known)
        request = TrialRequest(
            directory=settings.directory,
            name=clone_name(each.guest),
            restores=settings.full_restore,
            check=settings.check or (),
            console_says=settings.console_says,
            seconds=settings.timeout,
            space=free_bytes(settings.directory) // 2 if settings.space is None else settings.space,
            connect=settings.connect,
        )
        assert request.name is not None
        night.state.put_clone(settings.directory / request.name, settings.connect)
        try:
            with night.places[each.destination].turn() as destination:
                found = trial(destination, guest_at(destination, each.guest), request, on_event=self._heard)
        finally:
            if not (settings.directory / request.name).exists():
                night.state.put_clone(None)
        tested = {
            "tested": night.clock(),
            "ok": found.ok,
            "guest_point": found.guest_point,
            "boot_seconds": found.boot_seconds,
        }
        night.state.put_test(each.key, known.model_copy(update=tested))
        return found

    def _heard(self, event: Event) -> None:
        self._night.on_event(event)
        self._check_time()

    def _check_time(self) -> None:
        self._night.limits.check()
        if time.monotonic() >= self._ends:
            raise CutOffError("the time for boot tests has gone")


def clean_up(night: Night) -> None:
    """End and remove the clone of a run that was killed. Raises what keeps it from being removed."""
    state = night.state.now
    if state.clone is None:
        return

    def heard(words: str) -> None:
        night.on_event(Notice(words))

    remove_clone(Path(state.clone), connect=state.clone_connect, on_notice=heard)
    night.state.put_clone(None)
