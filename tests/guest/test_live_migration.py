"""migrate of a running guest, by QMP, on one host: nothing lost, and one guest that runs, whoever dies when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapchain.guest import journal
from tests.guest.counting_guest import Counting, arrived, check_numbers, counts_on, run_directory
from tests.guest.machine import Monitor


@pytest.fixture
def run() -> Iterator[Path]:
    with run_directory() as folder:
        yield folder


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Counting]:
    counting = Counting(tmp_path / "source")
    with counting.machine:
        yield counting


def snapchain(*words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    argv = [sys.executable, "-m", "snapchain", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=timeout, env=dict(os.environ))


def migrate(qmp: Path, replica: Path, *options: object) -> dict[str, Any]:
    """The report of a migration that succeeds."""
    done = snapchain("migrate", "--qmp", qmp, f"dir:{replica}", "--json", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def images(report: dict[str, Any]) -> list[Path]:
    return [Path(disk["overlay"]) for disk in report["disks"]]


def quit_and_check(monitor: Monitor, tops: list[Path]) -> int:
    """End a guest as its operator does; the newest number on its disks."""
    monitor._socket.sendall(b'{"execute": "quit"}\n')
    while monitor._lines.readline():
        pass
    monitor.close()
    for top in tops:
        done = subprocess.run(["qemu-img", "check", "-q", str(top)], check=False)
        assert done.returncode == 0, top
    return check_numbers(tops)


def test_a_guest_moves_there_and_back_and_there_again(guest: Counting, run: Path, tmp_path: Path) -> None:
    """Counter without a gap on three disks; the QEMU that it left has ended, and its files are read-only."""
    tops = list(guest.disks.values())
    qmp = guest.machine.qmp
    for turn, place in enumerate(("b", "a", "b", "a")):
        report = migrate(qmp, tmp_path / place)
        assert report["pause_within"], report
        assert [disk["epoch"] for disk in report["disks"]] == [turn + 2] * 3
        if turn == 0:
            assert guest.machine.process.wait(60) == 0
        assert len(arrived(run)) == 1
        assert not any(os.stat(path).st_mode & 0o222 for disk in report["disks"] for path in disk["fenced"])
        tops, qmp = images(report), Path(report["qmp"])
        assert not journal.find()[0]
    monitor = Monitor(qmp)
    assert counts_on(monitor)
    assert monitor.ask("query-jobs") == []
    quit_and_check(monitor, tops)
