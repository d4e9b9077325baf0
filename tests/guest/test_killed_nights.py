"""SIGKILL of a night of a running guest, before and after each step: the guest runs, and the next night ends clean."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from snapchain.destinations import open_destination
from snapchain.ops.guest_points import guest_named
from snapchain.ops.nightly.report import Outcome
from tests.exhaustive import some
from tests.guest.nights import DISKS, PIECE, Host, row
from tests.ops.stacks import qemu_img

NIGHT = "snapchain.ops.nightly.guest"
STEPS = [
    (NIGHT, "seal"),
    ("snapchain.ops.ship.guest", "publish"),
    (NIGHT, "run_disk"),
    ("snapchain.ops.guest_points_merge", "run"),
    ("snapchain.ops.nightly.guest", "held_at"),
]


@pytest.mark.sampled
def test_killed_at_each_step(tmp_path: Path) -> None:
    cases = [(module, name, when) for module, name in STEPS for when in ("before", "after")]
    for number, (module, name, when) in enumerate(some(cases, each=5)):
        folder = tmp_path / f"{number}-{name}-{when}"
        folder.mkdir()
        host = Host(folder)
        host.configure('[keep]\nlast = 2\n\n[[guests]]\nqmp = "run/qmp"\nmerge_above = 4\n')
        with host.machine() as machine:
            for night in range(3):
                host.write(machine, "vda", night, night + 1)
                host.night(night)
            host.write(machine, "vdb", 7, 9)
            died = subprocess.run(
                [sys.executable, "-m", "tests.guest.dying_night", str(folder), "3", module, name, when],
                cwd=Path(__file__).parents[2],
                check=False,
            )
            assert died.returncode == -signal.SIGKILL, (name, when)
            assert machine.status() == "running"
            assert machine.reads("vdb", 7 * PIECE, PIECE, 9)
            host.write(machine, "vda", 9, 77)
            host.remember(4)
            report = host.night(4)
            assert report.outcome is Outcome.OK, (name, when, report.model_dump_json(indent=1))
            assert all((each.chain_length or 9) <= 5 for each in row(report).disks), (name, when)
            assert not machine.ask("query-jobs")
            assert row(report).is_new is False
        view = guest_named(open_destination(str(folder / "repo"), passphrase=lambda: None).disks(), "web1")
        assert view is not None
        assert len(view.points) == 2
        host.restores(str(folder / "repo"), 4, view.points[-1].point)
        for disk in DISKS:
            qemu_img("check", "-q", "-f", "qcow2", host.top(disk))
