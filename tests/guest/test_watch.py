"""watch with a real QEMU: points, chains, a destination that is away, death and restart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from snapchain.destinations import open_destination
from snapchain.errors import Busy, Interrupted
from snapchain.guest.address import GuestAddress
from snapchain.guest.snapshot import SnapshotRequest
from snapchain.model.retention import Policy
from snapchain.ops.guest_points import GuestView, guest_named
from snapchain.ops.watch.guest_work import WatchRequest
from snapchain.ops.watch.rounds import Rules
from snapchain.ops.watch.run import RoundReport, WatchReport
from snapchain.ops.watch.start import start
from tests.guest.nights import DISKS, PIECE, Host
from tests.ops.nightly import exposition
from tests.repository.second_reader import content_id
from tests.waiting import wait_until

EVERY = 300.0
START = datetime(2026, 3, 10, 22, 0, tzinfo=UTC)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


class Rounds:
    """A watch whose clock goes on only in its waits; `between` is what happens in the world meanwhile, by interval."""

    def __init__(self, host: Host, *, count: int, between: Callable[[int], None], limit: int | None = None) -> None:
        self.host, self.count, self.between = host, count, between
        self.rules = Rules(every=EVERY, merge_above=4, space_limit=limit)
        self.now, self.interval = START, 0
        self.reports: list[RoundReport] = []

    def clock(self) -> datetime:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        reached = int((self.now - START).total_seconds() // EVERY)
        while self.interval < reached:
            self.interval += 1
            if self.interval >= self.count:
                raise Interrupted("SIGTERM")
            self.between(self.interval)

    def run(self, *urls: str, policy: Policy | None = None) -> WatchReport:
        request = WatchRequest(
            guest=GuestAddress(qmp=self.host.folder / "run" / "qmp"),
            snapshot=SnapshotRequest(),
            policy=policy or Policy(),
            idle=False,
        )
        return start(
            request,
            {url: partial(open_destination, url, passphrase=lambda: None, writing=True) for url in urls},
            self.rules,
            metrics=self.host.folder / "watch.prom",
            on_round=self.reports.append,
            clock=self.clock,
            wait=self.wait,
        )

    @property
    def last(self) -> RoundReport:
        return self.reports[-1]


def view_at(url: str) -> GuestView:
    found = guest_named(open_destination(url, passphrase=lambda: None).disks(), "web1")
    assert found is not None
    return found


def test_rounds_of_a_writing_guest(host: Host) -> None:
    repo, replica = str(host.folder / "repo"), f"dir:{host.folder}/replica"
    with host.machine() as machine:

        def writes(number: int) -> None:
            for disk in DISKS:
                host.write(machine, disk, number % 5, number + 1)
            host.remember(number + 1)

        writes(0)
        rounds = Rounds(host, count=5, between=writes)
        done = rounds.run(repo, replica, policy=Policy(last=2))
        assert (done.guest, done.snapshots, done.points) == ("web1", 5, 10)
        assert all(max(report.chain_lengths.values()) <= 4 for report in rounds.reports if report.is_news)
        assert not any(report.faults for report in rounds.reports)
        assert machine.status() == "running"
    for url in (repo, replica):
        view = view_at(url)
        assert [each.point for each in view.points] == [4, 5]
        for each in view.points:
            for disk in DISKS:
                assert each.disks[f"web1/{disk}"].content_id == content_id(bytes(host.truths[each.point][disk]))
    host.restores(replica, 5, 5)
    text = exposition.read((host.folder / "watch.prom").read_text())
    assert exposition.value(text, "watch_rpo_lag_seconds", guest="web1", destination=repo) == 0.0
    assert exposition.value(text, "watch_chain_length", guest="web1", disk="vda") == host.files("vda")
    assert exposition.value(text, "watch_guest_point", destination=replica) == 5


def test_days_of_a_dead_destination_within_the_space_limit(host: Host) -> None:
    repo = host.folder / "repo"
    limit = 5 << 20
    with host.machine() as machine:

        def between(number: int) -> None:
            if number == 1:
                repo.rename(host.folder / "away")
            if number == 5:
                (host.folder / "away").rename(repo)
            for disk in DISKS:
                for piece in range(16):
                    host.write(machine, disk, piece, number + piece + 1)
            host.remember(number + 1)

        between(0)
        rounds = Rounds(host, count=7, between=between, limit=limit)
        rounds.run(str(repo))
        news = [report for report in rounds.reports if report.is_news]
        assert any(each.destinations[0].failures > 2 for each in news)
        assert any(report.merged for report in news if report.destinations[0].failures), "what waits is merged"
        assert all((report.waiting_bytes or 0) <= limit for report in rounds.reports)
        assert rounds.last.destinations[0].failures == 0
        assert machine.status() == "running"
        newest = view_at(str(repo)).points[-1]
    host.restores(str(repo), rounds.count, newest.point)


def test_two_watches_of_one_guest(host: Host) -> None:
    with host.machine():

        def between(number: int) -> None:
            with pytest.raises(Busy, match="another run is at work"):
                Rounds(host, count=1, between=lambda _: None).run(str(host.folder / "repo"))

        Rounds(host, count=2, between=between).run(str(host.folder / "repo"))


def test_killed_at_any_moment_it_goes_on(host: Host) -> None:
    """The real command, real time: SIGKILL as soon as a round has begun, then SIGTERM; the guest runs all the while."""
    repo = str(host.folder / "repo")
    qmp = str(host.folder / "run" / "qmp")
    argv = [sys.executable, "-m", "snapchain", "watch", "--qmp", qmp, "--every", "10s", repo]
    with host.machine() as machine:
        host.write(machine, "vda", 0, 1)
        before = _files(host)
        with subprocess.Popen([*argv, "--json"], stdout=subprocess.PIPE, text=True) as watch:
            wait_until(lambda: _files(host) != before, alive=lambda: watch.poll() is None)
            watch.kill()
        assert machine.status() == "running"
        host.write(machine, "vda", 1, 2)
        host.remember(1)
        with subprocess.Popen([*argv, "--json"], stdout=subprocess.PIPE, text=True) as watch:
            assert watch.stdout is not None
            first = json.loads(watch.stdout.readline())
            os.kill(watch.pid, signal.SIGTERM)
            rest = [json.loads(line) for line in watch.stdout.read().splitlines()]
            assert watch.wait() == 0
        assert first["snapshot"] is not None
        assert rest[-1]["snapshots"] == 1
        assert machine.status() == "running"
        assert machine.reads("vda", PIECE, PIECE, 2)
    host.restores(repo, 1, view_at(repo).points[-1].point)


def _files(host: Host) -> set[str]:
    return {path.name for path in host.images.glob("*.qcow2")}


def test_the_unit_for_systemd(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    from snapchain.cli import main

    argv = ["watch", "--domain", "web1", "--every", "5min", "/backup", "--metrics", "/var/lib/node/web1.prom"]
    assert main([*argv, "--print-systemd"]) == 0
    said = capsys.readouterr().out
    assert "KillMode=process" in said
    assert "snapchain-watch-web1.service" in said
    assert "ReadWritePaths=-/backup" in said
