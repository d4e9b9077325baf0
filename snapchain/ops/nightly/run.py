"""The runner of a whole night: the disks, several at once where that is wanted, then the destinations and copies.

Whatever ends it (its window, Ctrl-C, a disk's fault) the state, the metrics and the report are written; after a
kill the next run finds in the state what was reached.  What cannot be written is a fault like others.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from snapchain.errors import Interrupted, SnapchainError
from snapchain.host import files, process_limits
from snapchain.host.private import make_private
from snapchain.host.records import SYSTEM_STATE, state_dir
from snapchain.image.scan import MAX_DEPTH
from snapchain.model.events import Event, Notice, OnEvent, ignore
from snapchain.ops.nightly import metrics
from snapchain.ops.nightly.config import Nightly
from snapchain.ops.nightly.disk import DiskRun, untouched
from snapchain.ops.nightly.guest import GuestRun, untouched_guest
from snapchain.ops.nightly.guest_list import GuestList, SelectedGuest, guest_list
from snapchain.ops.nightly.hooks import HookRunner
from snapchain.ops.nightly.maintenance import Maintenance
from snapchain.ops.nightly.open_destination import OpenDestination
from snapchain.ops.nightly.plan import limits_of, order
from snapchain.ops.nightly.report import (
    BootTestReport,
    DestinationReport,
    DiskReport,
    GuestReport,
    NightlyReport,
    Outcome,
)
from snapchain.ops.nightly.selection import DiskList, SelectedDisk, disk_list
from snapchain.ops.nightly.state import DiskState, GuestState, StateFile
from snapchain.ops.nightly.steps import Steps
from snapchain.ops.nightly.turn import Night
from snapchain.ops.single_run import only_run

LAST_REPORT = "last-report.json"


def now_utc() -> datetime:
    """The clock of real runs."""
    return datetime.now(UTC)


def directory_of(config: Nightly, path: Path) -> Path:
    """Where the state of the configuration in the file `path` lies: as it says, or below the user's state directory.

    Root's is where the service keeps it, so that a run by hand knows of the service's, and waits for it.
    """
    if config.state is not None:
        return config.state
    mark = sha256(str(path.resolve()).encode()).hexdigest()[:12]
    system = os.geteuid() == 0 and not os.environ.get("XDG_STATE_HOME")
    return (SYSTEM_STATE if system else state_dir()) / "nightly" / f"{config.name}-{mark}"


def run(
    config: Nightly,
    path: Path,
    *,
    wait_seconds: float = 0.0,
    any_time: bool = False,
    clock: Callable[[], datetime] = now_utc,
    on_event: OnEvent = ignore,
) -> NightlyReport:
    """Run it. wait_seconds: for another run of this configuration; any_time: pay no heed to the window.

    Raises Busy when another run is at work, and what keeps it from finding that out. Everything else is in the report:
    faults, and that it was interrupted.
    """
    directory = directory_of(config, path)
    make_private(directory)

    def on_notice(words: str) -> None:
        on_event(Notice(words))

    with only_run(directory / "lock", wait=wait_seconds, on_wait=on_notice):
        state = StateFile.open(directory / "state.json", on_notice=on_notice)
        return _Run(config, path, directory, state, any_time=any_time, clock=clock, on_event=on_event).run()


class _Run:
    def __init__(
        self,
        config: Nightly,
        path: Path,
        directory: Path,
        state: StateFile,
        *,
        any_time: bool,
        clock: Callable[[], datetime],
        on_event: OnEvent,
    ) -> None:
        self._config, self._path, self._directory = config, path, directory
        self._on_event, self._stop, self._interrupted = on_event, threading.Event(), False
        self._started, self._began = clock(), time.monotonic()
        self._steps = Steps()
        self._descriptors = Descriptors(process_limits.limit())
        self._reports: dict[str, DiskReport] = {}
        self._guest_reports: dict[str, GuestReport] = {}
        self._destinations: dict[str, DestinationReport] = {}
        self._tests: tuple[BootTestReport, ...] = ()
        self._disk_list, self._guest_list = DiskList(), GuestList()
        limits = limits_of(
            now=self._started,
            clock=clock,
            window=None if any_time else config.window,
            zone=config.zone,
            seconds=config.budget.time,
            ship=config.budget.ship,
            merge=config.budget.merge,
        )
        places = {
            each.name: OpenDestination(each, config.keep_of(each), writing=True, on_notice=self._notice)
            for each in config.destinations
        }
        facts = {"nightly": config.name, "config": path.absolute()}
        self._night = Night(config, places, state, limits, clock, self._heard, facts)
        self._hooks = HookRunner(config.hooks, facts, on_notice=self._notice)

    def run(self) -> NightlyReport:
        """All of it."""
        steps, begun = self._steps, False
        try:
            self._disk_list = steps.attempt("selection", self._call_the_roll).value or self._disk_list
            if self._config.guests:
                self._guest_list = steps.attempt("selection", self._call_the_guests).value or self._guest_list
            if steps.attempt("all of it", self._night.limits.check).outcome is Outcome.OK:
                begun = True
                if steps.attempt("before hook", lambda: self._hooks.run("before")).outcome is Outcome.OK:
                    self._work([*self._disk_list.disks, *self._guest_list.guests])
                    self._keep_up()
                    self._test()
        except KeyboardInterrupt:
            self._interrupted = True
        report = self._saved()
        if not begun:
            return report
        try:
            self._end_hooks(report)
        except KeyboardInterrupt:
            self._interrupted = True
        again = self._report()
        same = (again.faults, again.left, again.interrupted) == (report.faults, report.left, report.interrupted)
        return report if same else self._saved()

    def _call_the_roll(self) -> DiskList:
        found = disk_list(self._config, self._night.state.now, now=self._started)
        for fault in found.faults:
            self._steps.note("selection", fault)
        return found

    def _call_the_guests(self) -> GuestList:
        found = guest_list(self._config, self._night.state.now, now=self._started)
        for fault in found.faults:
            self._steps.note("selection", fault)
        return found

    def _work(self, items: Sequence[SelectedDisk | SelectedGuest]) -> None:
        """Disks and guests, those first that the last runs did not reach."""
        state = self._night.state.now
        known: dict[str, DiskState | GuestState] = {f"disk {name}": each for name, each in state.disks.items()}
        known |= {f"guest {name}": each for name, each in state.guests.items()}
        turns = {key: turn for key, each in known.items() if (turn := each.turn)}
        queue = deque(order(items, _key, turns, now=self._started))

        def worker() -> None:
            while queue and not self._stop.is_set():
                try:
                    item = queue.popleft()
                except IndexError:
                    return
                with self._descriptors.taken(self._needed(item)):
                    if self._stop.is_set():
                        return
                    if isinstance(item, SelectedGuest):
                        self._run_guest(item)
                    else:
                        self._run_disk(item)

        workers = min(self._config.concurrency, len(items))
        if workers <= 1:
            worker()
            return
        with ThreadPoolExecutor(workers, "disk") as pool:
            running = [pool.submit(worker) for _ in range(workers)]
            try:
                wait(running)
            except BaseException:
                self._stop.set()
                raise
        for each in running:
            each.result()

    def _run_disk(self, disk: SelectedDisk) -> None:
        run = DiskRun(self._night, disk)
        try:
            run.run()
        except Exception as error:  # noqa: BLE001 - a bug of ours: the other disks have their turn all the same
            run.fail(error)
        finally:
            self._reports[disk.name] = run.report

    def _run_guest(self, guest: SelectedGuest) -> None:
        run = GuestRun(self._night, guest)
        try:
            run.run()
        except Exception as error:  # noqa: BLE001 - as above
            run.fail(error)
        finally:
            self._guest_reports[guest.name] = run.report

    def _needed(self, item: SelectedDisk | SelectedGuest) -> int:
        if isinstance(item, SelectedDisk):
            return needed(self._night.state.disk(item.name, item.image).chain_length)
        lengths = self._night.state.guest(item.name, item.guest, item.option).chain_lengths
        return needed(max(lengths.values(), default=None))

    def _keep_up(self) -> None:
        disks, guests = self._disk_list.disks, self._guest_list.guests
        # Copies first: when the window closes, a second site is worth more than a sample that was verified.
        for place in sorted(self._night.places.values(), key=lambda each: each.config.copy_of is None):

            def goes_there(item: SelectedDisk | SelectedGuest, place: OpenDestination = place) -> bool:
                settings = item.settings
                there = (*self._config.destinations_of(settings), *self._config.copies_of(settings))
                return place.config in there and item.fault is None

            upkeep = Maintenance(
                self._night,
                place,
                [disk.name for disk in disks if goes_there(disk)],
                guests=[guest.name for guest in guests if goes_there(guest)],
            )
            try:
                upkeep.run()
            finally:
                self._destinations[place.name] = upkeep.report
                for name in upkeep.damaged & self._reports.keys():
                    self._reports[name] = self._reports[name].damaged_at(place.name)
                for name in upkeep.damaged_guests & self._guest_reports.keys():
                    self._guest_reports[name] = self._guest_reports[name].damaged_at(place.name)

    def _test(self) -> None:
        """Last of all, so that it is in nobody's way."""
        settings = self._config.test
        if settings is None and self._night.state.now.clone is None:
            return
        from snapchain.ops.nightly import boot_tests  # inside: most nights have none

        cleaned = self._steps.attempt("clone of an earlier run", lambda: boot_tests.clean_up(self._night))
        if settings is None or cleaned.outcome is not Outcome.OK:
            return  # it may take the room of the next one
        tests = boot_tests.BootTestRun(self._night, settings, self._guest_list.guests)
        try:
            tests.run()
        finally:
            self._tests = tuple(tests.reports.values())

    def _end_hooks(self, report: NightlyReport) -> None:
        counts = {f"disks_{outcome.value}": count for outcome, count in report.counts.items()}
        facts = {"outcome": report.outcome.value, "report": self._directory / LAST_REPORT, **counts}
        if report.outcome is Outcome.FAILED:
            self._steps.attempt("on_failure hook", lambda: self._hooks.run("on_failure", **facts))
        self._steps.attempt("after hook", lambda: self._hooks.run("after", **facts))

    def _report(self) -> NightlyReport:
        found, state = self._disk_list, self._night.state
        if state.fault is not None:
            self._steps.note("state", state.fault)
        rows = [self._reports.get(disk.name) or untouched(self._config, disk) for disk in found.disks]
        places = [
            (self._destinations.get(each.name) or _unused(each)).model_copy(update={"traffic": each.bill})
            for each in self._night.places.values()
        ]
        roll = self._guest_list
        guests = [self._guest_reports.get(each.name) or untouched_guest(self._config, each) for each in roll.guests]
        turns = [*(row.outcome for row in rows), *(guest.outcome for guest in guests)]
        outcomes = [*turns, *(place.outcome for place in places), *(each.outcome for each in self._tests)]
        if self._interrupted:
            outcomes.append(Outcome.LEFT)
        return NightlyReport(
            name=self._config.name,
            config=self._path.absolute(),
            outcome=Outcome.worst([*outcomes, self._steps.outcome]),
            started=self._started,
            finished=self._night.clock(),
            seconds=round(time.monotonic() - self._began, 3),
            closes=self._night.limits.closes,
            counts=_counts(turns),
            disks=tuple(rows),
            guests=tuple(guests),
            destinations=tuple(places),
            tests=self._tests,
            faults=tuple(self._steps.faults),
            left=tuple(self._steps.left),
            no_longer_selected=found.gone,
            guests_gone=roll.gone,
            layers_left_out=found.layers,
            leftovers=found.leftovers,
            interrupted=self._interrupted,
        )

    def _saved(self) -> NightlyReport:
        """The report, also on disk and as metrics; that one of them could not be written is in it."""
        report = self._report()
        attempts = [self._steps.attempt("report", lambda: self._write(report))]
        if (path := self._config.metrics) is not None:
            attempts.append(self._steps.attempt("metrics", lambda: self._write_metrics(path, report)))
        if all(each.outcome is Outcome.OK for each in attempts):
            return report
        report = self._report()
        # Each of them again, so that the one that can be written tells of the other.
        with suppress(SnapchainError):
            self._write(report)
        with suppress(SnapchainError):
            if path is not None:
                self._write_metrics(path, report)
        return report

    def _write(self, report: NightlyReport) -> None:
        files.write_atomically(self._directory / LAST_REPORT, report.model_dump_json(indent=1).encode())

    def _write_metrics(self, path: Path, report: NightlyReport) -> None:
        former = self._disk_list.former | self._guest_list.former
        metrics.write(path, report, self._config, self._night.state.now, former=former)

    def _notice(self, words: str) -> None:
        self._on_event(Notice(words))

    def _heard(self, event: Event) -> None:
        """What all operations call while they work: here a worker learns that the run was interrupted."""
        if self._stop.is_set():
            raise Interrupted("the run was interrupted")
        self._on_event(event)


def _counts(outcomes: Sequence[Outcome]) -> dict[Outcome, int]:
    """Also the zeros; but for `moved`, which most hosts never meet and programs need not know."""
    return {each: count for each in Outcome if (count := outcomes.count(each)) or each is not Outcome.MOVED}


def _key(item: SelectedDisk | SelectedGuest) -> str:
    return f"{'guest' if isinstance(item, SelectedGuest) else 'disk'} {item.name}"


def _unused(place: OpenDestination) -> DestinationReport:
    return DestinationReport(
        destination=place.name,
        outcome=Outcome.LEFT,
        copy_of=place.config.copy_of,
        left=("all of it: the run ended before its turn",),
    )


# --- Bounds the disks at work by file descriptors: a chain of 190 files takes 600 of them.
#
# A disk waits until those before it have released enough.  One whose chain alone needs more than the limit runs when no
# other disk does: that may suffice.

_A_FILE = 3
"""Descriptors for a file of a chain: to read it, to lock it, and to look at it again."""
_A_DISK = 32
"""For what is written, the destinations, and programs that are started."""
_OURS = 64
"""For the run itself."""


def needed(chain_length: int | None) -> int:
    """Descriptors for the work on a disk. chain_length: as it was last seen; None for one that was never seen."""
    return _A_FILE * (MAX_DEPTH if chain_length is None else chain_length + 1) + _A_DISK


class Descriptors:
    """The descriptors that are left for disks; thread-safe."""

    def __init__(self, limit: int) -> None:
        """limit: of open files of this process."""
        self._left = limit - _OURS
        self._at_work = 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Wait until `count` are left, or no disk is at work; release them at the end."""
        with self._changed:
            self._changed.wait_for(lambda: count <= self._left or not self._at_work)
            self._left -= count
            self._at_work += 1
        try:
            yield
        finally:
            with self._changed:
                self._left += count
                self._at_work -= 1
                self._changed.notify_all()
