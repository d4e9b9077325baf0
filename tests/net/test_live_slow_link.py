"""Live migration over 100 Mbit/s with 80 ms and 1 % loss: it ends, within its bound or refused with the figures."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.guest.counting_guest import Counting, arrived, check_numbers, counts_on
from tests.guest.machine import Monitor
from tests.net.sites import Sites, two_sites
from tests.waiting import wait_until

pytestmark = [pytest.mark.root, pytest.mark.soak]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Sites]:
    with two_sites(tmp_path, delay=0.04, loss=0.01, rate=100e6 / 8) as found:
        yield found


@pytest.fixture
def guest(pair: Sites) -> Iterator[Counting]:
    counting = Counting(pair.a.folder / "guest", ("vda", "vdb"))
    with counting.machine:
        yield counting


def begin(pair: Sites, guest: Counting, *options: object) -> subprocess.Popen[str]:
    return pair.a.begin("migrate", "--qmp", guest.machine.qmp, pair.b.url, "--json", *options)


def ended(child: subprocess.Popen[str]) -> tuple[int, Any, str]:
    out, error = child.communicate(timeout=600)
    assert "Traceback" not in error, error
    return child.returncode, json.loads(out), error


def check_here(pair: Sites, guest: Counting) -> None:
    """It runs on as before, and nothing is left on either host."""
    wait_until(lambda: not pair.a.left() and not pair.b.left() and not pair.a.processes() and not pair.b.processes())
    assert arrived(pair.b.run) == []
    assert counts_on(guest.machine.monitor)
    assert guest.machine.ask("query-jobs") == []
    guest.machine.quit()
    check_numbers(guest.tops)


@pytest.mark.parametrize("options", [(), ("--auto-converge",), ("--bandwidth", "2M")])
def test_a_whole_move(pair: Sites, guest: Counting, options: tuple[str, ...]) -> None:
    """The pause is measured, and is what was said of it, or is reported as longer."""
    with begin(pair, guest, "--max-downtime", 20, *options) as child:
        status, report, error = ended(child)
    assert status == 0, (report, error)
    print(
        f"{' '.join(options) or 'whole'}: {report['seconds']:.0f} s, pause {report['pause']:.2f} s, predicted "
        f"{report['predicted_pause']:.2f}, {report['memory_rounds']} rounds"
    )
    assert report["pause_within"], report
    monitor = Monitor(Path(report["qmp"]))
    assert counts_on(monitor)
    monitor.quit()
    check_numbers([Path(disk["overlay"]) for disk in report["disks"]])


def test_a_bound_that_the_latency_forbids(pair: Sites, guest: Counting) -> None:
    """Three round trips of 80 ms are more than 0.2 s."""
    with begin(pair, guest, "--max-downtime", "0.2") as child:
        status, report, _ = ended(child)
    assert status == 4, report
    assert "the switch alone takes about" in report["error"]["message"]
    check_here(pair, guest)


@pytest.mark.parametrize("number", range(4))
def test_ctrl_c_at_any_moment(pair: Sites, guest: Counting, number: int) -> None:
    """The guest goes on here, unless the move was done by then; the command ends soon."""
    with begin(pair, guest, "--max-downtime", 20) as child:
        with suppress(subprocess.TimeoutExpired):
            child.wait(random.Random(number).uniform(1, 40))
        if child.poll() is None:
            os.kill(child.pid, signal.SIGINT)
        begun = time.monotonic()
        status, report, _ = ended(child)
        print(f"ended with {status} {time.monotonic() - begun:.1f} s after Ctrl-C")
    if status == 0:
        assert counts_on(Monitor(Path(report["qmp"])))
        return
    assert status == 130, report
    check_here(pair, guest)
