"""A guest lives on two hosts, in random order: moves, moves that are killed or cut, snapshots, shipments, merges.

ROUNDS_SEED and ROUNDS_SECONDS choose another life, and a longer one.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.guest.counting_guest import Counting, arrived, check_numbers, counts_on
from tests.guest.machine import Monitor
from tests.guest.one_master import OneMaster
from tests.net.sites import Sites, two_sites
from tests.net.test_live_migration_over_ssh import children
from tests.waiting import wait_until

pytestmark = [pytest.mark.root, pytest.mark.soak]
SECONDS = float(os.environ.get("ROUNDS_SECONDS", "300"))
SEED = os.environ.get("ROUNDS_SEED", "1")
OURS = (0, 4, 5, 7, 9, 130)
"""Exit codes of a command that was disturbed: done, refused, busy, unavailable, in another state, interrupted."""


class Life:
    """The guest, wherever it is. said: what was done, for a failure"""

    def __init__(self, pair: Sites, counting: Counting, folder: Path, chance: random.Random) -> None:
        self.pair, self.chance = pair, chance
        self.site, self.qmp = pair.a, counting.machine.qmp
        self.first = counting
        self.repository, self.third = folder / "repository", f"dir:{folder / 'third'}"
        self.points = {str(self.repository): 0, self.third: 0}
        self.said: list[str] = []

    # --- What is done to it.

    def snapshot(self) -> None:
        self.run("snapshot")

    def ship(self) -> None:
        place = self.chance.choice([str(self.repository), self.third])
        if self.run("ship", place):
            self.points[place] += 1

    def merge(self) -> None:
        self.run("merge", "--keep-last", 2)

    def merge_where_it_was(self) -> None:
        old = self.pair.other(self.site)
        for disk in sorted(old.replica.glob("web1*")):
            status, out, error = old.snapchain(
                "merge", f"dir:{old.replica}::{disk.name.replace('%2F', '/')}", "--keep-last", 1
            )
            assert status == 0, out + error

    def move(self) -> None:
        assert self.run(*self._move()), self.said

    def move_interrupted(self) -> None:
        self._disturbed(lambda child: os.kill(child.pid, signal.SIGINT))

    def move_killed(self) -> None:
        self._disturbed(lambda child: os.killpg(child.pid, signal.SIGKILL))

    def move_without_ssh(self) -> None:
        self._disturbed(lambda child: _kill(self.chance, children(child.pid)))

    def move_without_peer(self) -> None:
        there = self.pair.other(self.site)
        self._disturbed(lambda _: _kill(self.chance, there.sshd.sessions() + there.processes(), most=3))

    def move_on_a_bad_link(self) -> None:
        self.pair.cable.set(loss=0.02, delay=0.04)
        try:
            self._disturbed(self._blip)
        finally:
            self.pair.cable.set(loss=0.0, delay=0.0)

    def _blip(self, _: object) -> None:
        with self.pair.cable.cut():
            time.sleep(self.chance.uniform(0.1, 3.0))

    def _move(self) -> list[object]:
        return ["migrate", self.pair.other(self.site).url, "--max-downtime", 60]

    def _disturbed(self, disturb: Callable[[subprocess.Popen[str]], None]) -> None:
        verb, *words = self._move()
        with self.site.begin(verb, "--qmp", self.qmp, *words) as child:
            delay = self.chance.uniform(0.5, 12.0)
            with suppress(subprocess.TimeoutExpired):
                child.wait(delay)
            if child.poll() is None:
                self.said.append(f"  disturbed after {delay:.1f} s")
                with suppress(ProcessLookupError):
                    disturb(child)
            out, error = child.communicate(timeout=600)
        self.said.append(f"  {verb}: {child.returncode} {out} {error}")
        assert "Traceback" not in error, self.said
        assert child.returncode in (*OURS, -signal.SIGKILL), self.said

    def run(self, verb: object, *words: object) -> bool:
        """A command about it that nothing disturbs. Whether it ended well."""
        status, out, error = self.site.snapchain(verb, "--qmp", self.qmp, *words)
        self.said.append(f"  {verb} on {self.site.name}: {status} {out} {error}")
        assert status == 0, self.said
        return True

    # --- How it is.

    def settle(self) -> None:
        """Whoever lives has ended what was begun: one guest runs, and nothing else of ours."""
        pair = self.pair
        for site in (pair.a, pair.b):
            wait_until(lambda site=site: not list((site.folder / "state").glob("snapchain/guests/*.json")))  # type: ignore[misc]
        qemus = {site.name: arrived(site.run) for site in (pair.a, pair.b)}
        here = self.first.machine.process.poll() is None
        assert sum(map(len, qemus.values())) + here == 1, (qemus, here, self.said)
        for site in (pair.a, pair.b):
            wait_until(lambda site=site: set(site.processes()) <= set(qemus[site.name]))  # type: ignore[misc]
            assert len(list(site.run.glob("snapchain/*"))) == len(qemus[site.name]), (site.left(), self.said)
        if not here:
            self.site = pair.a if qemus["kvm1"] else pair.b
            (self.qmp,) = self.site.run.glob("snapchain/*/qmp")

    def monitors(self) -> list[Path]:
        there = [path for site in (self.pair.a, self.pair.b) for path in site.run.glob("snapchain/*/test.qmp")]
        return [self.first.machine.folder / "test.qmp", *there]


def _kill(chance: random.Random, pids: list[int], *, most: int = 2) -> None:
    for pid in chance.sample(pids, min(len(pids), chance.randint(1, most))):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_life_on_two_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never two guests that run, always one; all points restore, and no number is missing on any disk."""
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", "secret")
    chance, end = random.Random(SEED), time.monotonic() + SECONDS
    rounds = 0
    with two_sites(tmp_path) as pair:
        counting = Counting(pair.a.folder / "guest", ("vda", "vdb"))
        counting.machine.monitor.close()
        with counting.machine:
            life = Life(pair, counting, tmp_path, chance)
            assert pair.a.snapchain("init", life.repository)[0] == 0
            deeds = [
                *3 * [life.move], life.snapshot, *2 * [life.ship], life.merge, life.merge_where_it_was,
                life.move_interrupted, life.move_killed, life.move_without_ssh, life.move_without_peer,
                life.move_on_a_bad_link,
            ]  # fmt: skip
            life.snapshot()
            while time.monotonic() < end:
                deed = chance.choice(deeds)
                rounds += 1
                life.said.append(f"{rounds}: {deed.__name__} on {life.site.name}")
                print(life.said[-1], flush=True)
                with OneMaster(life.monitors):
                    deed()
                    life.settle()
                monitor = Monitor(life.qmp)
                assert counts_on(monitor), life.said
                monitor.close()
            tops = tops_of(life.qmp)
            Monitor(life.qmp).quit()
        check_numbers(tops)
        for place, count in life.points.items():
            if count:
                assert life.site.report("verify", f"{place}::web1", "--read-data")["ok"], life.said
                out = tmp_path / f"out-{'third' if place == life.third else 'repository'}"
                life.site.report("restore", f"{place}::web1", out)
                check_numbers([out / "vda.qcow2", out / "vdb.qcow2"])
    print(f"{rounds} rounds, points: {life.points}")


def tops_of(qmp: Path) -> list[Path]:
    monitor = Monitor(qmp)
    rows = monitor.ask("query-block")
    monitor.close()
    return [Path(row["inserted"]["file"]) for row in rows if "inserted" in row]
