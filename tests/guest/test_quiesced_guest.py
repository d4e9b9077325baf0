"""A real guest with a real agent: its filesystems are clean in a quiesced snapshot, and it is never harmed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Unavailable
from snapchain.guest import journal
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.guest.agent import SocketAgent
from snapchain.guest.snapshot import GuestSnapshot, Quiesce, SnapshotRequest, plan, run
from snapchain.model.consistency import Consistency
from snapchain.model.events import ignore
from snapchain.ops import doctor
from tests.exhaustive import some
from tests.guest.agent_guest import AgentGuest, formatted
from tests.guest.spy import DROP, KILL, Fault, Place, Spy, call, changing, every
from tests.waiting import HANG, wait_until

REQUIRE = SnapshotRequest(quiesce=Quiesce.REQUIRE)
WRITES = (
    "n=0; while [ ! -e /run/stop ]; do n=$((n + 1)); for d in vda vdb; do echo $n >/mnt/$d/$((n % 50)); "
    "dd if=/dev/zero of=/mnt/$d/big bs=64k count=4 2>/dev/null; done; done"
)
"""Of the guest: small and large files on two disks, without a sync."""

LATE_HOOK = r'#!/bin/sh\n[ "$1" = thaw ] || until [ -e /run/go ]; do sleep 0.1; done\necho $1 >>/run/hooks\n'
"""Of the agent: it is called with freeze and thaw."""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """For sockets: their paths must be short."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


def formatted_disks(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    return {name: formatted(folder / f"{name}.qcow2", size="16M") for name in ("vda", "vdb")}


@pytest.fixture
def disks(tmp_path: Path) -> dict[str, Path]:
    return formatted_disks(tmp_path / "images")


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentGuest]:
    """One for all tests that leave it as it was: running, thawed, with some layers more."""
    folder = Path(tempfile.mkdtemp())
    with AgentGuest(folder, disks=formatted_disks(tmp_path_factory.mktemp("guest") / "images")) as found:
        yield found
    shutil.rmtree(folder)


def snapshot(socket: Path, request: SnapshotRequest = REQUIRE) -> GuestSnapshot:
    with open_guest(GuestAddress(qmp=socket)) as guest:
        return run(guest, plan(guest, request), request, on_event=ignore)


def is_clean(image: Path, folder: Path) -> bool:
    """Whether an ext4 needs no replay of its journal, and fsck finds nothing."""
    raw = folder / "fsck.raw"
    subprocess.run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", image, raw], check=True)
    head = subprocess.run(["dumpe2fs", "-h", raw], check=True, capture_output=True, text=True).stdout
    checked = subprocess.run(["e2fsck", "-fn", raw], check=False, capture_output=True, text=True)
    raw.unlink()
    return "needs_recovery" not in head and checked.returncode == 0


def is_frozen(guest: AgentGuest) -> bool:
    return SocketAgent(guest.agent).is_frozen(timeout=HANG)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_filesystems_of_a_quiesced_snapshot_are_clean(guest: AgentGuest, tmp_path: Path) -> None:
    """And those of one that is not need their journals: else the claim would mean nothing."""
    guest.sh(f"{{ {WRITES}; }} >/dev/null 2>&1 & true")
    for _ in range(3):
        report = snapshot(guest.qmp)
        assert report.consistency is Consistency.FILESYSTEM
        assert report.why_not is None
        assert report.frozen_seconds is not None
        assert report.frozen_seconds < 30
        assert all(is_clean(each.sealed, tmp_path) for each in report.disks)
    crash = snapshot(guest.qmp, SnapshotRequest(quiesce=Quiesce.NO))
    assert crash.consistency is Consistency.CRASH
    assert not is_clean(crash.disks[0].sealed, tmp_path)
    guest.sh("touch /run/stop; wait; sync")
    assert journal.find() == ([], [])


@pytest.mark.parametrize(
    ("words", "why"), [("hook=fail", "refused guest-fsfreeze-freeze"), ("no-agent", "did not answer in time")]
)
def test_an_agent_that_cannot(disks: dict[str, Path], run_dir: Path, words: str, why: str) -> None:
    with AgentGuest(run_dir, disks=disks, words=words) as guest:
        report = snapshot(guest.qmp, SnapshotRequest())
        assert report.consistency is Consistency.CRASH
        assert why in str(report.why_not)
        with pytest.raises(Unavailable, match=why):
            snapshot(guest.qmp)
        assert len(list(disks["vda"].parent.glob("vda*.qcow2"))) == 2
        guest.sh("echo one >/mnt/vda/file && sync")
        wait_until(lambda: not journal.find()[0])


def test_a_freeze_that_happens_later_is_thawed(disks: dict[str, Path], run_dir: Path) -> None:
    """The agent's hook takes longer than we wait; then it freezes."""
    with AgentGuest(run_dir, disks=disks, words="hook=hang") as guest:
        guest.sh(f"printf '{LATE_HOOK}' >/etc/hook")
        report = snapshot(guest.qmp, SnapshotRequest(freeze_seconds=1))
        assert report.consistency is Consistency.CRASH
        assert "did not answer in time" in str(report.why_not)
        [owed] = journal.find()[0]
        assert not owed.record.is_abandoned
        guest.sh("touch /run/go")
        wait_until(lambda: not journal.find()[0])
        assert not is_frozen(guest)
        assert guest.sh("cat /run/hooks").split().count("freeze") >= 1
        guest.sh("echo one >/mnt/vda/file && sync")


# --- Deaths of snapchain, at each command, with filesystems that may be frozen.


def child_snapshot(socket: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "snapchain", "snapshot", "--qmp", str(socket), "--quiesce", "require"]
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def faults(guest: AgentGuest, run_dir: Path, acts: tuple[Any, ...]) -> list[Fault]:
    with Spy(run_dir / "spy", guest.qmp, counts=changing) as spy:
        snapshot(spy.path)
        return list(every(spy.commands, acts))


def check_unharmed(guest: AgentGuest) -> None:
    """Thawed, running, and able to write."""
    wait_until(lambda: not [each for each in journal.find()[0] if each.record.operation == "thaw"])
    assert not is_frozen(guest)
    assert guest.status() == "running"
    guest.sh("echo one >/mnt/vda/file && echo two >/mnt/vdb/file && sync")


@pytest.mark.sampled
def test_sigkill_at_any_command(guest: AgentGuest, tmp_path: Path, run_dir: Path) -> None:
    """One guest for all: what the deaths leave must not add up, either."""
    for fault in some(faults(guest, run_dir, (KILL,)), each=2):
        with Spy(run_dir / "spy", guest.qmp, fault, counts=changing) as spy:
            with child_snapshot(spy.path) as child:
                assert child.wait() == -signal.SIGKILL, fault
            assert spy.happened, fault
            check_unharmed(guest)
            report = doctor.run(doctor.plan([]))
            assert report.well, report
        assert journal.find() == ([], []), fault
    last = snapshot(guest.qmp)
    assert last.consistency is Consistency.FILESYSTEM
    assert all(is_clean(each.sealed, tmp_path) for each in last.disks)
    with open_guest(GuestAddress(qmp=guest.qmp)) as opened:
        in_use = {layer.path for disk in opened.disks() for layer in disk.chain}
    assert set(last.disks[0].sealed.parent.glob("*.qcow2")) == in_use


@pytest.mark.sampled
def test_snapchain_and_its_watchdog_are_killed(guest: AgentGuest, run_dir: Path) -> None:
    """As by a service manager that kills all of a service: then the doctor thaws, and the next run would, too.

    The doctor finds exactly what was owed when the watchdog died: a thaw around the transaction, the overlays always.
    """
    owed_thaws: list[bool] = []

    def kill_watchdog() -> None:
        """Stopped first, so that it can do nothing between the look at what it owes and its death."""
        for found in journal.find()[0]:
            if found.record.operation == "thaw":
                pid = found.record.writer[0]
                os.kill(pid, signal.SIGSTOP)
                wait_until(partial(is_stopped, pid))
                owed_thaws.append(found.path.exists())
                os.kill(pid, signal.SIGKILL)

    reached = list(reversed(faults(guest, run_dir, (KILL,))))
    frozen = [fault for fault in reached if "transaction" in fault.name]
    assert frozen
    for fault in dict.fromkeys([*frozen[:1], *some(reached, each=5)]):
        owed_thaws.clear()
        kills = (Fault(fault.number, fault.place, call(kill_watchdog)), fault)
        with Spy(run_dir / "spy", guest.qmp, *kills, counts=changing) as spy, child_snapshot(spy.path) as child:
            assert child.wait() == -signal.SIGKILL, fault
            assert bool(owed_thaws) is (fault in frozen), fault
            is_owed = any(owed_thaws)
            planned = doctor.plan([])
            thaw = ["the guest was frozen"] if is_owed else []
            assert [each.says[:20] for each in planned.findings] == [*thaw, "a snapshot of the gu"], fault
            assert is_frozen(guest) is is_owed, fault
            report = doctor.run(planned)
            assert report.well, report
        check_unharmed(guest)
        assert journal.find() == ([], []), fault


def test_a_lost_monitor_thaws(guest: AgentGuest, run_dir: Path) -> None:
    """The connection to QEMU ends in the frozen window."""
    number = next(each.number for each in faults(guest, run_dir, (DROP,)) if "transaction" in each.name)
    fault = Fault(number, Place.SENT, DROP)
    with Spy(run_dir / "spy", guest.qmp, fault, counts=changing) as spy:
        report = snapshot(spy.path, SnapshotRequest())
    assert report.consistency is Consistency.CRASH
    assert "was lost" in str(report.why_not)
    check_unharmed(guest)
