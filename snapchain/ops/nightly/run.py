"""The runner of a whole night: the disks, several at once where that is wanted, then the destinations.

Whatever ends it (its window, Ctrl-C, a disk's fault) the state, the metrics and the report are written; after a
kill the next run finds in the state what was reached.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from snapchain.errors import Interrupted
from snapchain.host import files
from snapchain.host.os_errors import os_errors
from snapchain.ops.events import Event, Notice, OnEvent, ignore
from snapchain.ops.nightly import metrics
from snapchain.ops.nightly.config import Nightly
from snapchain.ops.nightly.disk import DiskRun, Night
from snapchain.ops.nightly.hooks import HookRunner
from snapchain.ops.nightly.lock import only_run
from snapchain.ops.nightly.place import Place
from snapchain.ops.nightly.plan import limits_of, order
from snapchain.ops.nightly.report import DestinationReport, DiskReport, Fault, NightlyReport, Outcome
from snapchain.ops.nightly.selection import SelectedDisk, Selection, select
from snapchain.ops.nightly.state import State, StateFile
from snapchain.ops.nightly.steps import Steps
from snapchain.ops.nightly.upkeep import Upkeep
from snapchain.repository.known import state_dir

LAST_REPORT = "last-report.json"


def now_utc() -> datetime:
    """The clock of real runs."""
    return datetime.now(UTC)


def directory_of(config: Nightly, path: Path) -> Path:
    """Where the state of the configuration in the file `path` lies: as it says, or below the user's state directory."""
    if config.state is not None:
        return config.state
    mark = sha256(str(path.resolve()).encode()).hexdigest()[:12]
    return state_dir() / "nightly" / f"{config.name}-{mark}"


def known_images(state: State) -> set[Path]:
    """Images that earlier runs have brought to some destination."""
    return {disk.image for disk in state.disks.values() if disk.destinations}


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

    Raises Busy when another run is at work; faults of disks and destinations are in the report. After an interrupt
    Interrupted is raised once all is written.
    """
    directory = directory_of(config, path)
    with os_errors(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def on_notice(words: str) -> None:
        on_event(Notice(words))

    with only_run(directory / "lock", wait=wait_seconds, on_wait=on_notice):
        state = StateFile.open(directory / "state.json", on_notice=on_notice)
        report = _Run(config, path, directory, state, any_time=any_time, clock=clock, on_event=on_event).run()
    if report.interrupted:
        raise Interrupted("the run was interrupted")
    return report


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
        self._reports: dict[str, DiskReport] = {}
        self._destinations: list[DestinationReport] = []
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
            each.name: Place(each, config.keep_of(each), writing=True, on_notice=self._notice)
            for each in config.destinations
        }
        facts = {"nightly": config.name, "config": path.absolute()}
        self._night = Night(config, places, state, limits, clock, self._heard, facts)
        self._hooks = HookRunner(config.hooks, facts, on_notice=self._notice)

    def run(self) -> NightlyReport:
        """Never raises but for what it cannot write."""
        steps = self._steps
        selected = steps.attempt("selection", lambda: select(self._config, known=known_images(self._night.state.now)))
        found = selected.value or Selection((), (), ())
        steps.faults += [Fault.of("selection", fault) for fault in found.faults]
        reached = {name: disk.reached for name, disk in self._night.state.now.disks.items() if disk.reached}
        found = replace(found, disks=tuple(order(found.disks, lambda disk: disk.name, reached)))
        if steps.attempt("all of it", self._night.limits.check).outcome is not Outcome.OK:
            report = self._report(found)
            self._save(report)
            return report
        try:
            if steps.attempt("before hook", lambda: self._hooks.run("before")).outcome is Outcome.OK:
                self._work(found.disks)
                self._keep_up(found.disks)
        except KeyboardInterrupt:
            self._interrupted = True
        report = self._report(found)
        self._save(report)
        self._end_hooks(report)
        if len(steps.faults) > len(report.faults):
            report = self._report(found)
            self._save(report)
        return report

    def _work(self, disks: Sequence[SelectedDisk]) -> None:
        queue = deque(disks)

        def worker() -> None:
            while queue and not self._stop.is_set():
                try:
                    disk = queue.popleft()
                except IndexError:
                    return
                self._reports[disk.name] = DiskRun(self._night, disk).run()

        workers = min(self._config.concurrency, len(disks))
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

    def _keep_up(self, disks: Sequence[SelectedDisk]) -> None:
        for place in self._night.places.values():
            there = [
                disk.name
                for disk in disks
                if place.config in self._config.destinations_of(disk.settings) and disk.fault is None
            ]
            self._destinations.append(Upkeep(self._night, place, there).run())

    def _end_hooks(self, report: NightlyReport) -> None:
        counts = {f"disks_{outcome.value}": count for outcome, count in report.counts.items()}
        facts = {"outcome": report.outcome.value, "report": self._directory / LAST_REPORT, **counts}
        if report.outcome is Outcome.FAILED:
            self._steps.attempt("on_failure hook", lambda: self._hooks.run("on_failure", **facts))
        self._steps.attempt("after hook", lambda: self._hooks.run("after", **facts))

    def _report(self, found: Selection) -> NightlyReport:
        rows = [self._reports.get(disk.name) or _untouched(disk) for disk in found.disks]
        outcomes = [*(row.outcome for row in rows), *(each.outcome for each in self._destinations)]
        outcomes += [self._steps.outcome, *[Outcome.FAILED] * bool(self._steps.faults)]
        names = {row.disk for row in rows}
        finished = self._night.clock()
        return NightlyReport(
            name=self._config.name,
            config=self._path.absolute(),
            outcome=Outcome.worst(outcomes),
            started=self._started,
            finished=finished,
            seconds=round(time.monotonic() - self._began, 3),
            closes=self._night.limits.closes,
            counts=dict(Counter(row.outcome for row in rows)),
            disks=tuple(rows),
            destinations=tuple(self._destinations),
            faults=tuple(self._steps.faults),
            left=tuple(self._steps.left),
            no_longer_selected=tuple(
                name for name, disk in self._night.state.now.disks.items() if disk.destinations and name not in names
            ),
            layers_left_out=found.layers,
            interrupted=self._interrupted,
        )

    def _save(self, report: NightlyReport) -> None:
        files.write_atomically(self._directory / LAST_REPORT, report.model_dump_json(indent=1).encode())
        if (path := self._config.metrics) is not None:
            self._steps.attempt("metrics", lambda: metrics.write(path, report, self._night.state.now))

    def _notice(self, words: str) -> None:
        self._on_event(Notice(words))

    def _heard(self, event: Event) -> None:
        """What all operations call while they work: here a worker learns that the run was interrupted."""
        if self._stop.is_set():
            raise Interrupted("the run was interrupted")
        self._on_event(event)


def _untouched(disk: SelectedDisk) -> DiskReport:
    left = ("all of it: the run ended before its turn",)
    return DiskReport(disk=disk.name, image=disk.image, outcome=Outcome.LEFT, left=left)
