"""Active layers whose names do not say what they are: libvirt calls an overlay web1.before-update, and QEMU knows."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.counting_guest import arrived, check_numbers, counts_on, make_disks, run_directory
from tests.guest.machine import Machine, Monitor
from tests.guest.test_live_migration import PATIENT, snapchain
from tests.waiting import gone, wait_until


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Machine]:
    folder = tmp_path / "source"
    base = make_disks(folder, ["vda"])["vda"]
    overlay = folder / "vda.before-update"
    words: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay]
    subprocess.run(words, check=True)
    with Machine(folder, disks={"vda": overlay}) as machine:
        assert counts_on(machine.monitor)
        yield machine


@pytest.mark.parametrize(
    "words",
    [
        ("ship", "--qmp", "{qmp}", "dir:{to}"),
        ("sync", "--qmp", "{qmp}", "dir:{to}", "--rounds", "1"),
        ("migrate", "--qmp", "{qmp}", "dir:{to}", *PATIENT),
    ],
    ids=lambda words: words[0] + words[-1],
)
def test_each_command(words: tuple[str, ...], guest: Machine, tmp_path: Path) -> None:
    with run_directory() as run:
        done = snapchain(*(word.format(qmp=guest.qmp, to=tmp_path / "replica") for word in words))
        assert done.returncode == 0, done.stdout + done.stderr
        if words[0] != "migrate":
            assert counts_on(guest.monitor)
            return
        (qmp,) = run.rglob("qmp")
        monitor = Monitor(qmp)
        assert counts_on(monitor)
        (qemu,) = arrived(run)
        monitor.quit()
        wait_until(lambda: gone(qemu))
        check_numbers(list((tmp_path / "replica").rglob("active/*.qcow2")))
