"""The loop of a watch over work that fails as a test wants: nothing ends it but an interrupt and a wrong request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Busy, Interrupted, InvalidInput, SnapchainError, Unavailable
from snapchain.guest.snapshot import GuestSnapshot
from snapchain.merge.run import MergeReport
from snapchain.model.consistency import Consistency
from snapchain.model.fingerprint import Fingerprint
from snapchain.model.inventory import Held
from snapchain.ops.nightly import metrics as nightly_metrics
from snapchain.ops.watch import metrics
from snapchain.ops.watch.rounds import DiskSight, Range, Rules
from snapchain.ops.watch.run import GUEST_PAUSE, HeldAt, Look, RoundReport, Shipped, Watch
from tests.ops.nightly import exposition

EVERY = 300.0
START = datetime(2026, 3, 10, 22, 0, tzinfo=UTC)


def merged(before: int, after: int, **more: Any) -> MergeReport:
    return MergeReport(
        image=Path("x"), result=None, strategy="commit", layers_before=before, layers_after=after, bytes_moved=0,
        bytes_freed=0, seconds=0.0, requests=0, removed=(), kept=(), finished=(), merges=(), failed=(), **more,
    )  # fmt: skip


@dataclass
class FakeWork:
    """One disk of one guest; `faults` has what the next call of a method raises, of `ship` by destination."""

    clock: Clock
    files: list[int] = field(default_factory=list)
    snapshots: int = 0
    points: dict[str, list[str]] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)
    faults: dict[str, SnapchainError | KeyboardInterrupt] = field(default_factory=dict)
    newest: str | None = None
    calls: list[str] = field(default_factory=list)

    def _maybe(self, what: str) -> None:
        self.calls.append(what)
        if what in self.faults:
            raise self.faults[what]

    def look(self, held: Mapping[str, HeldAt], snapshot: GuestSnapshot | None) -> Look:
        self._maybe("look")
        counts = {name: min(len(at.get("vda", ())), len(self.files)) for name, at in held.items()}
        disk = DiskSight(name="vda", sealed=tuple(self.files), active=10, held=counts)
        return Look("web1", (disk,), snapshot is not None and snapshot.instant == self.newest)

    def snapshot(self) -> GuestSnapshot:
        self._maybe("snapshot")
        self.snapshots += 1
        self.files.append(100)
        self.newest = f"{self.snapshots:032x}"
        return GuestSnapshot(
            guest="web1", instant=self.newest, time=START, consistency=Consistency.FILESYSTEM, frozen_seconds=0.25,
            disks=(),
        )  # fmt: skip

    def ship(self, snapshot: GuestSnapshot, target: str) -> Shipped:
        self._maybe(f"ship {target}")
        self.points.setdefault(target, []).append(snapshot.instant)
        self.stored[target] = len(self.files)
        return Shipped(guest_point=len(self.points[target]), bytes_read=100, bytes_stored=50)

    def held(self, target: str) -> HeldAt:
        mark = Fingerprint(inode=1, size=1, mtime_ns=1, ctime_ns=1)
        return {"vda": [Held(str(number), (mark,)) for number in range(self.stored[target])]}

    def keep(self, target: str) -> None:
        self._maybe(f"keep {target}")

    def squeeze(self, each: Range) -> MergeReport:
        self._maybe("squeeze")
        before = len(self.files) + 1
        self.files[each.first : each.last + 1] = [100]
        return merged(before, len(self.files) + 1)

    def settle(self, disk: str, held: Mapping[str, HeldAt], *, max_layers: int) -> MergeReport:
        self._maybe("settle")
        assert disk == "vda"
        assert set(held) <= {"vault", "kvm2"}
        before = len(self.files) + 1
        while len(self.files) + 1 > max_layers:
            self.files[1:3] = [100]
            self.stored = {name: count - 1 for name, count in self.stored.items()}
        return merged(before, len(self.files) + 1)


class Clock:
    """Goes on only when somebody waits; ends the watch at `end`."""

    def __init__(self, end: float) -> None:
        self.now, self.end = START, START + timedelta(seconds=end)

    def __call__(self) -> datetime:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        if self.now > self.end:
            raise Interrupted("SIGTERM")


def watch(
    path: Path, *targets: str, seconds: float, work: FakeWork | None = None, clock: Clock | None = None
) -> tuple[FakeWork, list[RoundReport]]:
    """A watch of so many seconds, with its reports; goes on from the state in `path`."""
    clock = clock or Clock(seconds)
    work = work or FakeWork(clock)
    reports: list[RoundReport] = []
    rules = Rules(every=EVERY, merge_above=5)
    done = Watch(
        "?", work, targets or ("vault",), rules, path / "state.json", on_round=reports.append, clock=clock,
        wait=clock.wait,
    ).run()  # fmt: skip
    assert done.rounds - len(reports) in (0, 1)  # 1: interrupted in the middle
    return work, reports


def test_rounds_until_it_is_ended_and_on_from_there(tmp_path: Path) -> None:
    work, reports = watch(tmp_path, seconds=5 * EVERY)
    assert work.points["vault"] == [f"{number:032x}" for number in range(1, 7)]
    assert [report.snapshot is not None for report in reports if report.is_news] == [True] * 6
    clock = Clock(6 * EVERY)
    clock.now = START + timedelta(seconds=5 * EVERY + 100)
    work.clock = clock
    watch(tmp_path, seconds=0, work=work, clock=clock)
    assert work.snapshots == 7, "started again, it waits for the rest of the interval"


def test_a_destination_that_fails_is_named_tried_again_and_caught_up_with(tmp_path: Path) -> None:
    clock = Clock(2 * EVERY)
    work = FakeWork(clock)
    work.faults["ship kvm2"] = Unavailable("no route to host", subject="kvm2")
    _, reports = watch(tmp_path, "vault", "kvm2", seconds=0, work=work, clock=clock)
    last = {each.destination: each for each in reports[-1].destinations}
    assert (last["kvm2"].error, last["kvm2"].guest_point, last["kvm2"].lag_seconds) == ("no route to host", None, None)
    assert last["kvm2"].failures > 3
    assert last["vault"].error is None
    text = exposition.read(metrics.encode(reports[-1]).decode())
    assert exposition.value(text, "watch_rpo_lag_seconds", destination="kvm2") == float("inf")
    assert exposition.value(text, "watch_rpo_lag_seconds", destination="vault") <= EVERY
    assert exposition.value(text, "watch_failures", destination="kvm2") == last["kvm2"].failures
    assert exposition.value(text, "watch_frozen_seconds", guest="web1") == 0.25
    del work.faults["ship kvm2"]
    clock.end += timedelta(seconds=2 * EVERY)
    _, reports = watch(tmp_path, "vault", "kvm2", seconds=0, work=work, clock=clock)
    assert work.points["kvm2"][-1] == work.points["vault"][-1]
    assert reports[-1].destinations[1].error is None


def test_a_guest_that_does_not_answer_is_asked_again(tmp_path: Path) -> None:
    clock = Clock(EVERY)
    work = FakeWork(clock)
    work.faults["look"] = Unavailable("the monitor does not answer", subject="web1")
    _, reports = watch(tmp_path, seconds=0, work=work, clock=clock)
    assert work.snapshots == 0
    assert len(reports) == EVERY // GUEST_PAUSE + 1
    assert reports[0].faults == ("web1: the monitor does not answer",)


def test_a_snapshot_that_fails_keeps_no_older_one_from_being_shipped(tmp_path: Path) -> None:
    clock = Clock(EVERY - 1)
    work = FakeWork(clock)
    work.faults["ship vault"] = Unavailable("away")
    watch(tmp_path, seconds=0, work=work, clock=clock)
    work.faults = {"snapshot": Busy("a foreign job is at work")}
    clock.now, clock.end = START + timedelta(seconds=2 * EVERY), START + timedelta(seconds=2 * EVERY + 60)
    _, reports = watch(tmp_path, seconds=0, work=work, clock=clock)
    assert work.points["vault"] == [f"{1:032x}"]
    assert reports[0].faults == ("a foreign job is at work",)


def test_a_merge_that_fails_is_told_and_stops_nothing(tmp_path: Path) -> None:
    clock = Clock(8 * EVERY)
    work = FakeWork(clock)
    work.faults["settle"] = Busy("a foreign job is at work")
    _, reports = watch(tmp_path, seconds=0, work=work, clock=clock)
    assert work.snapshots == 9
    told = [report for report in reports if report.faults]
    assert 3 <= len(told) <= 5


def test_a_wrong_request_ends_it(tmp_path: Path) -> None:
    work = FakeWork(Clock(EVERY))
    work.faults["ship vault"] = InvalidInput("the passphrase is not set")
    with pytest.raises(InvalidInput, match="passphrase"):
        watch(tmp_path, seconds=0, work=work, clock=work.clock)


@pytest.mark.parametrize("where", ["look", "snapshot", "ship vault", "keep vault", "settle"])
def test_an_interrupt_in_the_middle_of_anything_leaves_it_resumable(tmp_path: Path, where: str) -> None:
    clock = Clock(20 * EVERY)
    work = FakeWork(clock)
    work.faults[where] = Interrupted("SIGTERM")
    watch(tmp_path, seconds=0, work=work, clock=clock)
    assert work.calls[-1] == where
    work.faults = {}
    clock.end = clock.now + timedelta(seconds=2 * EVERY)
    watch(tmp_path, seconds=0, work=work, clock=clock)
    assert work.points["vault"][-1] == work.newest
    assert len(set(work.points["vault"])) == len(work.points["vault"])


def test_a_snapshot_whose_record_was_lost_is_made_anew(tmp_path: Path) -> None:
    """Killed between the snapshot and the state: the chain is one file longer, and nothing else is wrong."""
    clock = Clock(EVERY)
    work, _ = watch(tmp_path, seconds=0, work=FakeWork(clock), clock=clock)
    work.snapshot()
    clock.end = clock.now + timedelta(seconds=1)
    _, reports = watch(tmp_path, seconds=0, work=work, clock=clock)
    assert reports[0].snapshot == work.newest
    assert work.points["vault"][-1] == work.newest


def test_a_damaged_state_is_a_beginning(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    (tmp_path / "state.json").chmod(0o600)
    work, _ = watch(tmp_path, seconds=EVERY)
    assert work.snapshots == 2


def test_the_guide_names_every_metric_of_guests_and_no_other(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "guide" / "running-guests.md").read_text()
    _, reports = watch(tmp_path, seconds=EVERY)
    there = set(re.findall(r"^# TYPE (\S+)", metrics.encode(reports[-1]).decode(), re.MULTILINE))
    assert set(re.findall(r"`(snapchain_watch_[a-z_]+)", page)) == there
    source = Path(nightly_metrics.__file__).read_text()
    named = {f"snapchain_{name}" for name in re.findall(r'Family\(\s*"(guest[a-z_]*)"', source)}
    assert set(re.findall(r"`(snapchain_guests?_?[a-z_]*)", page)) == {*named, "snapchain_guests"}
