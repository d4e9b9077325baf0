"""A running guest moves to another host: two network namespaces, sshd, two QEMUs, and links that break."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.guest.agent_guest import AgentGuest, Console, formatted
from tests.guest.counting_guest import Counting, arrived, counts_on, run_directory
from tests.guest.machine import Monitor
from tests.guest.spy import Fault, Place, Spy, call, changing
from tests.guest.test_live_migration import LAST, PATIENT, SWITCH, check_settled, quit_and_check, unfinished
from tests.net.commands import reported, started
from tests.net.namespaces import Cable
from tests.net.sshd import SshHost
from tests.net.test_replica_over_ssh import remote
from tests.waiting import HANG, gone, wait_until

pytestmark = pytest.mark.root


@pytest.fixture
def run() -> Iterator[Path]:
    with run_directory() as folder:
        yield folder


class Moving:
    """The commands, run on the near host. Both hosts keep their state under one home, and their sockets apart."""

    def __init__(self, host: SshHost, run: Path, folder: Path) -> None:
        self.host, self.folder = host, folder
        near = run / "near"
        near.mkdir()
        far = {name: os.environ[name] for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME")} | {"XDG_RUNTIME_DIR": str(run)}
        words = " ".join(f"{name}={shlex.quote(value)}" for name, value in far.items())
        self.environment = {
            **os.environ,
            "XDG_RUNTIME_DIR": str(near),
            "SNAPCHAIN_SSH": shlex.join(host.ssh),
            "SNAPCHAIN_REMOTE": f"env {words} {remote()}",
        }

    def begin(self, *words: object) -> subprocess.Popen[str]:
        return started(["migrate", *words, "--json", *PATIENT], environment=self.environment)

    def go(self, qmp: Path, name: str = "b", *options: object) -> tuple[int, Any]:
        """The exit code, and what was reported."""
        return reported(self.begin("--qmp", qmp, self.host.url(self.folder / name), *options))


@pytest.fixture
def moving(far: tuple[SshHost, Cable], run: Path, tmp_path: Path) -> Moving:
    return Moving(far[0], run, tmp_path)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Counting]:
    counting = Counting(tmp_path / "source")
    with counting.machine:
        yield counting


def test_there_through_ssh(moving: Moving, guest: Counting, run: Path, tmp_path: Path) -> None:
    """No port but sshd's is open; memory and disks go through it. Nothing is left here."""
    status, report = moving.go(guest.machine.qmp)
    assert status == 0, report
    assert report["pause_within"], report
    assert guest.machine.process.wait(HANG) == 0
    assert list(run.glob("near/snapchain/*")) == []
    monitor = Monitor(Path(report["qmp"]))
    assert counts_on(monitor)
    quit_and_check(monitor, [Path(disk["overlay"]) for disk in report["disks"]])


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *children(child)]
    return found


def far_server(run: Path) -> list[int]:
    """The snapchain over there, which keeps the disks locked."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes()
            mark = f"XDG_RUNTIME_DIR={run}\0".encode()
            if b"serve-replica" in words and b"python" in words and mark in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


WHO = ["ssh", "the snapchain there", "snapchain", "the QEMU there"]
WHEN = {
    "mirrors": (8, Place.SENT),
    "memory": (13, Place.SENT),
    "switch": (SWITCH, Place.SENT),
    "quit": (LAST, Place.BEFORE),
}


@pytest.mark.parametrize(
    ("who", "when"),
    [
        pytest.param(who, when, marks=() if (who, when) == ("ssh", "switch") else pytest.mark.soak)
        for who in WHO
        for when in WHEN
    ],
)
def test_who_dies_when(moving: Moving, guest: Counting, run: Path, tmp_path: Path, who: str, when: str) -> None:
    """Each kind of process, at the steps that matter; by themselves the others bring it to its one right end."""
    started: list[subprocess.Popen[str]] = []

    def strike() -> None:
        victims = {
            "ssh": lambda: children(started[0].pid),
            "the snapchain there": lambda: far_server(run),
            "snapchain": lambda: [started[0].pid],
            "the QEMU there": lambda: arrived(run),
        }[who]()
        assert victims
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    number, place = WHEN[when]
    with Spy(tmp_path / "spy", guest.machine.qmp, Fault(number, place, call(strike)), counts=changing) as spy:
        started.append(moving.begin("--qmp", spy.path, moving.host.url(tmp_path / "b")))
        with started[0] as child:
            child.communicate(timeout=300)
        assert spy.happened
        if who == "the QEMU there" and when == "quit":
            assert child.returncode == 0
            return  # it ran there, and has crashed
        assert check_settled(guest, run, tmp_path / "b") == ("there" if when == "quit" else "here")


@pytest.mark.soak
def test_a_cut_link_is_noticed_and_the_guest_goes_on(
    far: tuple[SshHost, Cable], moving: Moving, guest: Counting, run: Path, tmp_path: Path
) -> None:
    """In the middle of the mirrors; nobody is told. The guest's writes wait for the link only until ssh gives it up."""
    _, cable = far
    with Spy(
        tmp_path / "spy", guest.machine.qmp, Fault(13, Place.SENT, call(lambda: cable.set(cut=1))), counts=changing
    ) as spy:
        with moving.begin("--qmp", spy.path, moving.host.url(tmp_path / "b")) as child:
            out, _ = child.communicate(timeout=400)
        assert child.returncode == 7, out
        assert guest.machine.status() == "running"
        cable.set(cut=0)
        wait_until(lambda: not unfinished())
        assert check_settled(guest, run, tmp_path / "b") == "here"


@pytest.mark.soak
def test_a_linux_with_files_goes_there_and_back(moving: Moving, run: Path, tmp_path: Path) -> None:
    """It writes and syncs all the time; its filesystems are clean at the end, and no file is torn."""
    disks = {name: formatted(tmp_path / f"{name}.qcow2") for name in ("vda", "vdb")}
    with AgentGuest(tmp_path / "m", disks=disks) as linux:
        linux.sh(
            "(n=0; while test ! -e /mnt/vda/stop; do n=$((n+1)); "
            "echo $n >/mnt/vda/$((n % 50)); echo $n >/mnt/vdb/$((n % 50)); echo $n >/mnt/vdb/last; done) & "
            "echo started"
        )
        status, report = moving.go(linux.qmp)
        assert status == 0, report
        assert linux.process.wait(HANG) == 0
    status, report = moving.go(Path(report["qmp"]), "a")
    assert status == 0, report
    console = Console()
    console.connect(Path(report["qmp"]).with_name("console"))
    console.sh("touch /mnt/vda/stop; sleep 1; sync; umount /mnt/vda /mnt/vdb")
    console.close()
    monitor = Monitor(Path(report["qmp"]))
    (qemu,) = arrived(run)
    monitor._socket.sendall(b'{"execute": "quit"}\n')
    wait_until(lambda: gone(qemu))
    monitor.close()
    for disk in report["disks"]:
        raw = tmp_path / "disk.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", disk["overlay"], str(raw)], check=True)
        subprocess.run(["e2fsck", "-fn", str(raw)], check=True, capture_output=True)
