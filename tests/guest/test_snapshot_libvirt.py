"""Snapshots of domains of a real libvirtd: the definition follows, and deaths of snapchain leave nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import SnapchainError, Unavailable
from snapchain.guest import journal
from snapchain.guest.address import open_guest
from snapchain.guest.protocol import Agent
from snapchain.guest.snapshot import GuestSnapshot, Quiesce, SnapshotRequest, plan, run
from snapchain.model.consistency import Consistency
from snapchain.model.events import ignore
from snapchain.ops import doctor
from snapchain.source.notes import Notes
from tests.exhaustive import EXHAUSTIVE
from tests.guest.agent_guest import formatted, parts
from tests.guest.libvirt import Domain
from tests.libvirtd import LibvirtHost
from tests.waiting import HANG, wait_until

pytestmark = pytest.mark.root

NO = SnapshotRequest(quiesce=Quiesce.NO)
DISKS = ("vda", "vdb", "vdc")
_NAMES = count()


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def disks(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in DISKS:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", folder / f"{name}.qcow2", "8M"], check=True)
    return {name: folder / f"{name}.qcow2" for name in DISKS}


@pytest.fixture
def domain(libvirt_host: LibvirtHost, tmp_path: Path, disks: dict[str, Path]) -> Iterator[Domain]:
    found = Domain.started(libvirt_host, tmp_path / "domain", disks, name=f"snap{next(_NAMES)}")
    yield found
    found.remove()


def snapshot(domain: Domain, request: SnapshotRequest = NO) -> GuestSnapshot:
    with open_guest(domain.address) as guest:
        return run(guest, plan(guest, request), request, on_event=ignore)


def files(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if not each.name.startswith(".snapchain-layer-"))


def test_the_definition_follows(domain: Domain, disks: dict[str, Path]) -> None:
    domain.write("vda", 0, 65536, 1)
    report = snapshot(domain, SnapshotRequest(labels=("x",)))
    assert report.starts_with == ()
    assert report.consistency is Consistency.CRASH
    for each in report.disks:
        assert each.sealed == disks[each.disk]
        assert domain.source(each.disk) == each.overlay
        assert domain.source(each.disk, "--inactive") == each.overlay
    domain.write("vda", 0, 65536, 2)
    domain.kill()
    domain.virsh("start")
    assert domain.reads("vda", 0, 65536, 2)
    note = Notes().of(disks["vda"])
    assert note.sealed is not None
    assert note.sealed.labels == ("x",)
    with pytest.raises(Unavailable, match="no channel for a guest agent"):
        snapshot(domain, SnapshotRequest(quiesce=Quiesce.REQUIRE))
    assert len(files(disks["vda"].parent)) == 6


def test_a_guest_that_is_off_is_sealed_at_rest(domain: Domain, disks: dict[str, Path]) -> None:
    """Under its paths, so that its definition stays as it is."""
    domain.kill()
    report = snapshot(domain, SnapshotRequest(labels=("x",)))
    assert report.consistency is Consistency.OFFLINE
    for each in report.disks:
        assert each.overlay == disks[each.disk]
        assert each.sealed == disks[each.disk].with_name(f"{each.disk}.1.qcow2")
        note = Notes().of(each.sealed)
        assert note.sealed is not None
        assert note.sealed.labels == ("x",)
    domain.virsh("start")
    assert domain.state() == "running"


@pytest.mark.parametrize(
    ("hook", "ended_by"),
    [
        ("--pre-freeze", "doctor"),
        ("--post-thaw", "next run"),
        pytest.param("--pre-freeze", "next run", marks=pytest.mark.soak),
        pytest.param("--post-thaw", "doctor", marks=pytest.mark.soak),
    ],
)
def test_sigkill_before_and_after_the_switch(domain: Domain, disks: dict[str, Path], hook: str, ended_by: str) -> None:
    domain.write("vda", 0, 65536, 1)
    argv: list[Any] = [sys.executable, "-m", "snapchain", "snapshot", "--domain", domain.name]
    argv += ["--connect", domain.host.uri, "--quiesce", "no", hook, "sh -c 'kill -9 $PPID'"]
    done = subprocess.run(argv, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert domain.state() == "running"
    switched = hook == "--post-thaw"
    assert len(files(disks["vda"].parent)) == 6
    if ended_by == "doctor":
        report = doctor.run(doctor.plan([], guest=domain.address))
        assert report.well, report
        assert len(report.treated) == 1
    else:
        snapshot(domain)
        assert not doctor.plan([]).findings
    assert journal.find() == ([], [])
    assert len(files(disks["vda"].parent)) == 3 * (1 + switched + (ended_by == "next run"))
    assert (Notes().of(disks["vda"]).sealed is not None) == (switched or ended_by == "next run")
    assert domain.reads("vda", 0, 65536, 1)
    domain.write("vda", 65536, 65536, 2)
    assert domain.reads("vda", 65536, 65536, 2)


@pytest.mark.sampled
def test_the_disks_of_a_snapshot_are_of_one_instant(domain: Domain) -> None:
    """A counter is written to all disks in their order, without a pause."""
    ends = threading.Event()
    written = 0

    def work() -> None:
        nonlocal written
        while not ends.is_set():
            written += 1
            for disk in DISKS:
                domain.io(disk, f"write -P {written % 256} 0 512")

    writer = threading.Thread(target=work)
    writer.start()
    try:
        wait_until(lambda: written > 1, alive=writer.is_alive)
        reports = [snapshot(domain) for _ in range(100 if EXHAUSTIVE else 2)]
    finally:
        ends.set()
        writer.join()
    domain.kill()
    for report in reports:
        found = [first_byte(each.sealed) for each in report.disks]
        steps = [(one - other) % 256 for one, other in pairwise(found)]
        assert sum(steps) <= 1, found


def first_byte(path: Path) -> int:
    taken = path.with_suffix(".taken")
    argv = ["qemu-img", "dd", "-f", "qcow2", "-O", "raw", "bs=512", "count=1", f"if={path}", f"of={taken}"]
    subprocess.run(argv, check=True, capture_output=True)
    value = taken.read_bytes()[0]
    taken.unlink()
    return value


# --- With a real agent in the domain.

KILLED_WHEN_FROZEN = """
import os, signal, sys
from snapchain.cli import main
from snapchain.guest import libvirt_snapshot
libvirt_snapshot.LibvirtSwitch.run = lambda _: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


def is_clean(image: Path) -> bool:
    """Whether an ext4 needs no replay of its journal, and fsck finds nothing."""
    raw = image.with_suffix(".fsck")
    subprocess.run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", image, raw], check=True)
    head = subprocess.run(["dumpe2fs", "-h", raw], check=True, capture_output=True, text=True).stdout
    checked = subprocess.run(["e2fsck", "-fn", raw], check=False, capture_output=True)
    raw.unlink()
    return "needs_recovery" not in head and checked.returncode == 0


@pytest.mark.serial
def test_a_domain_with_an_agent(libvirt_host: LibvirtHost, tmp_path: Path) -> None:
    """Frozen and thawed through libvirt, also when snapchain dies in between."""
    kernel, initrd = parts()
    os_more = f"<kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>console=ttyS0 quiet panic=-1</cmdline>"
    serial = f"<serial type='file'><source path='{tmp_path}/console'/><target port='0'/></serial>"
    disks = {name: formatted(tmp_path / f"{name}.qcow2", size="16M") for name in ("vda", "vdb")}
    name = f"snap{next(_NAMES)}"
    domain = Domain.started(
        libvirt_host, tmp_path / "domain", disks, name=name, memory=128, os_more=os_more, more=serial,
        agent=tmp_path / "agent",
    )  # fmt: skip
    try:
        with open_guest(domain.address) as guest:
            agent = guest.agent()
            assert agent is not None
            wait_until(lambda: answers(agent))
            report = snapshot(domain, SnapshotRequest(quiesce=Quiesce.REQUIRE))
            assert report.consistency is Consistency.FILESYSTEM
            assert all(is_clean(each.sealed) for each in report.disks)
            argv = ["snapshot", "--domain", domain.name, "--connect", domain.host.uri, "--quiesce", "require"]
            done = subprocess.run([sys.executable, "-c", KILLED_WHEN_FROZEN, *argv], check=False)
            assert done.returncode == -signal.SIGKILL
            wait_until(lambda: not [each for each in journal.find()[0] if each.record.operation == "thaw"])
            assert not agent.is_frozen(timeout=HANG)
        assert doctor.run(doctor.plan([])).well
        assert journal.find() == ([], [])
        assert domain.state() == "running"
    finally:
        domain.remove()


def answers(agent: Agent) -> bool:
    try:
        agent.ping(timeout=1)
    except SnapchainError:
        return False
    return True
