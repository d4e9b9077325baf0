"""A domain of libvirt moves to another host: two libvirtds, sshd, real QEMUs, and whatever dies on the way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

from snapchain.host.virsh import Virsh
from snapchain.host.virsh_session import VirshSession
from tests.guest.agent_guest import Console, formatted, parts
from tests.guest.counting_guest import check_numbers, make_disks
from tests.guest.libvirt import definition
from tests.net.domains import Side, Spy, domain_hosts
from tests.net.namespaces import Cable
from tests.net.test_live_migration_over_ssh import children
from tests.waiting import wait_until

pytestmark = [pytest.mark.root, pytest.mark.serial]
NAME = "web1"
Hosts = tuple[Side, Side, Cable]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with domain_hosts(tmp_path) as found:
        near = found[0]
        near.define(NAME, make_disks(tmp_path / "images", ["vda", "vdb"]))
        wait_until(lambda: counted(near) > 3)
        yield found


def counted(side: Side) -> int:
    """The number that the guest has come to."""
    said = side.host.virsh("qemu-monitor-command", NAME, "--hmp", "xp /1wx 0x8000")
    return int(said.split(":")[1], 16)


def runs_on(side: Side) -> bool:
    if side.state_of(NAME) != "running":
        return False
    before = counted(side)
    return bool(wait_until(lambda: counted(side) > before + 3))


def tops(side: Side) -> list[Path]:
    """The active layers, by the definition that lasts."""
    rows = side.host.virsh("domblklist", NAME, "--inactive").splitlines()[2:]
    return [Path(row.split()[1]) for row in rows if row.strip()]


def check_stopped(side: Side) -> int:
    """End the guest, and look for missing numbers; the newest one."""
    side.host.virsh("destroy", NAME)
    return check_disks(side)


def check_disks(side: Side) -> int:
    """Look for missing numbers on the disks of a guest that does not run; the newest one."""
    images = tops(side)
    for image in images:
        subprocess.run(["qemu-img", "check", "-q", image], check=True)
    return check_numbers(images)


@contextmanager
def never_both(near: Side, far: Side) -> Iterator[list[str]]:
    """Watch the two libvirtds; at the end, no moment was seen at which the guest ran on both hosts."""
    seen: list[str] = []
    done = threading.Event()

    def state(session: VirshSession) -> str:
        with suppress(Exception):  # no such domain; libvirtd is dead
            return session.text("domstate", "--domain", NAME).strip()
        return ""

    def watch() -> None:
        with VirshSession(Virsh(far.host.uri)) as there, VirshSession(Virsh(near.host.uri)) as here:
            while not done.wait(0.02):
                # In this order: what has left is asked after what has come.
                if state(there) == "running" and state(here) == "running":
                    seen.append("both")

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
    assert not seen, "the guest ran on both hosts"


def check_clean(near: Side, far: Side) -> None:
    for side in (near, far):
        assert side.records() == []
        assert side.leftovers() == []


def test_there_and_back(hosts: Hosts, tmp_path: Path) -> None:
    """Defined there and forgotten here; no number is missing; nothing is left."""
    near, far, _ = hosts
    near.host.virsh("autostart", NAME)
    for turn, (source, target) in enumerate(((near, far), (far, near))):
        words = ("--dest-uri", target.host.uri) if turn else ()
        images = tops(source)
        with never_both(source, target):
            report = source.migrate(NAME, tmp_path / f"replica{turn}", *words)
        assert report["pause_within"], report
        assert report["memory_rounds"] >= 1
        assert [disk["epoch"] for disk in report["disks"]] == [turn + 2] * 2
        assert source.state_of(NAME) == ""
        assert "enable" in re.findall("Autostart: +(.*)", target.host.virsh("dominfo", NAME))
        assert runs_on(target)
        assert [str(path) for path in tops(target)] == [disk["overlay"] for disk in report["disks"]]
        assert not any(path.stat().st_mode & 0o222 for path in images)
        check_clean(near, far)
    check_stopped(near)
    near.host.virsh("start", NAME)  # by the definition that lasts
    assert runs_on(near)


@pytest.mark.soak
def test_what_is_refused_beforehand(hosts: Hosts, tmp_path: Path) -> None:
    """The guest is not touched, and nothing is left on either host."""
    near, far, _ = hosts
    address = far.way.url(tmp_path / "b")
    status, plan = near.snapchain("migrate", "--domain", NAME, address, "--dry-run")
    assert (status, len(plan["plan"]["disks"])) == (0, 2)

    def refused(*words: object) -> str:
        status, said = near.snapchain("migrate", "--domain", NAME, *words)
        assert status != 0
        assert near.state_of(NAME) == "running"
        check_clean(near, far)
        return str(said["error"]["message"])

    assert "to another host only" in refused(f"dir:{tmp_path}/b")
    assert "the switch alone takes about" in refused(address, "--max-downtime", "0.05")
    other = tmp_path / "other.xml"
    other.write_text(definition(NAME, {}))
    far.host.virsh("define", other)
    assert "already has a domain with this name" in refused(address)
    far.host.virsh("undefine", NAME)
    assert "this is not the libvirt of the replica's host" in refused(address, "--dest-uri", near.host.uri)
    near.host.virsh("snapshot-create-as", NAME, "s1", "--disk-only")
    assert "cannot take its snapshots along: s1" in refused(address)
    near.host.virsh("snapshot-delete", NAME, "s1", "--metadata")
    near.migrate(NAME, tmp_path / "b")
    assert where(near, far) == "far"


def where(near: Side, far: Side) -> str:
    """The host that has the guest after whatever happened; it runs there, or can be started. Nothing is left."""
    wait_until(lambda: not near.records() and not far.records())
    check_clean(near, far)
    states = [side.state_of(NAME) for side in (near, far)]
    has = "far" if states[1] else "near"
    side, other = (far, near) if has == "far" else (near, far)
    assert other.state_of(NAME) == "", states
    assert side.state_of(NAME) in ("running", "shut off"), states
    writable = [bool(path.stat().st_mode & 0o222) for path in tops(side)]
    assert all(writable)
    if side.state_of(NAME) == "shut off":
        check_disks(side)  # before it starts: then it counts from 1 again, over the oldest numbers
        side.host.virsh("start", NAME)
        assert runs_on(side)
        side.host.virsh("destroy", NAME)
        return has
    assert runs_on(side)
    check_stopped(side)
    return has


class Trap:
    """Something that happens once, at the first call or answer of this name. drops: and the connection ends there"""

    def __init__(self, event: str, strike: Callable[[], object], *, drops: bool = False) -> None:
        self.happened = threading.Event()
        self._event, self._strike, self._drops = event, strike, drops

    def __call__(self, event: str) -> bool:
        if event != self._event or self.happened.is_set():
            return False
        self.happened.set()
        self._strike()
        return self._drops


@contextmanager
def spied(near: Side, far: Side, folder: Path, trap: Callable[[str], bool]) -> Iterator[str]:
    """The URI for --connect. A spy on either host sees each call of a migration; ssh lies between them."""
    here, there = Spy(folder / "spy1", near.socket, trap), Spy(folder / "spy2", far.socket, trap)
    far.uri = there.uri
    try:
        yield here.uri
    finally:
        far.uri = None
        here.close()
        there.close()


def of_soak(*values: object) -> ParameterSet:
    return pytest.param(*values, marks=pytest.mark.soak)


def nothing() -> None:
    """The link just ends."""


@pytest.mark.parametrize("event", ["finish answer", *map(of_soak, ["finish call", "perform answer", "prepare answer"])])
def test_a_lost_answer_is_asked_for(hosts: Hosts, tmp_path: Path, event: str) -> None:
    """virsh lives, and its link does not. By libvirt alone the guest would then run on both hosts."""
    near, far, _ = hosts
    trap = Trap(event, nothing, drops=True)
    with never_both(near, far), spied(near, far, tmp_path, trap) as connect:
        with near.begin_migration(NAME, tmp_path / "b", "--connect", connect) as child:
            out, error = child.communicate(timeout=300)
        assert trap.happened.is_set(), out + error
        assert child.returncode != 0, out + error
        assert where(near, far) == ("far" if event == "finish answer" else "near")


@pytest.mark.soak
def test_a_snapshot_that_was_taken_meanwhile_is_noticed(hosts: Hosts, tmp_path: Path) -> None:
    """Only the tops are mirrored: what another program seals after the overlays were made would be missing there."""
    near, far, _ = hosts

    def snapshot() -> None:
        words = [f"--diskspec={name},file={tmp_path}/{name}.late.qcow2" for name in ("vda", "vdb")]
        near.host.virsh("snapshot-create-as", NAME, "--disk-only", "--no-metadata", *words)

    trap = Trap("begin call", snapshot)
    with never_both(near, far), spied(near, far, tmp_path, trap) as connect:
        with near.begin_migration(NAME, tmp_path / "b", "--connect", connect) as child:
            out, error = child.communicate(timeout=300)
        assert trap.happened.is_set(), out + error
        assert "a snapshot of it was taken" in out
        assert where(near, far) == "near"


@pytest.mark.soak
@pytest.mark.parametrize("event", ["prepare call", "perform call"])
def test_interrupted_by_the_user(hosts: Hosts, tmp_path: Path, event: str) -> None:
    """Ctrl-C: the guest goes on here, and nothing is left when the command has ended."""
    near, far, _ = hosts
    started: list[subprocess.Popen[str]] = []
    trap = Trap(event, lambda: started[0].send_signal(signal.SIGINT))
    with never_both(near, far), spied(near, far, tmp_path, trap) as connect:
        started.append(near.begin_migration(NAME, tmp_path / "b", "--connect", connect))
        with started[0] as child:
            out, error = child.communicate(timeout=300)
        assert trap.happened.is_set(), out + error
        assert child.returncode == 130, out + error
        check_clean(near, far)
        assert where(near, far) == "near"


# --- Whoever dies, at each call of libvirt: one guest that runs or can be started, nothing lost, nothing left.

EVENTS = [
    "begin answer",
    "prepare call",
    "prepare answer",
    "perform call",
    "perform answer",
    "finish call",
    "finish answer",
]
WHO = [
    "snapchain",
    "virsh",
    "ssh",
    "snapchain there",
    "libvirtd",
    "libvirtd there",
    "qemu",
    "qemu there",
    "the link",
]
NOT_YET = {("qemu there", event) for event in EVENTS[:2]}
"""It is not started by then."""
CASES = [of_soak(who, event) for who in WHO for event in EVENTS if (who, event) not in NOT_YET]


def with_words(pids: list[int], *words: bytes) -> list[int]:
    found = []
    for pid in pids:
        with suppress(OSError):
            if all(word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for word in words):
                found.append(pid)
    return found


def serving(side: Side) -> list[int]:
    """The snapchains that answer the other host."""
    mark = f"XDG_STATE_HOME={side.state['XDG_STATE_HOME']}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words, names = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            if b"serve-replica" in words and mark in names:
                found.append(int(process.name))
    return found


def named(name: str, pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        with suppress(OSError):  # it has ended meanwhile
            if Path(f"/proc/{pid}/comm").read_text() == f"{name}\n":
                found.append(pid)
    return found


def strike(who: str, hosts: Hosts, migrating: int) -> None:
    """Kill it. migrating: pid of the snapchain that moves the guest"""
    near, far, cable = hosts
    if who == "the link":
        cable.set(cut=1)
        return
    pids = {
        "snapchain": lambda: [migrating],
        "virsh": lambda: with_words(children(migrating), b"migrate"),
        "ssh": lambda: named("ssh", children(migrating)),
        "snapchain there": lambda: serving(far),
        "libvirtd": lambda: [near.host.pid],
        "libvirtd there": lambda: [far.host.pid],
        "qemu": lambda: [near.host.guest_pid(NAME)],
        "qemu there": lambda: [far.host.guest_pid(NAME)],
    }[who]()
    assert pids, who
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("who", "event"), CASES)
def test_whoever_dies(hosts: Hosts, tmp_path: Path, who: str, event: str) -> None:
    near, far, cable = hosts
    started: list[subprocess.Popen[str]] = []
    trap = Trap(event, lambda: strike(who, hosts, started[0].pid))
    with never_both(near, far), spied(near, far, tmp_path, trap) as connect:
        started.append(near.begin_migration(NAME, tmp_path / "b", "--connect", connect))
        with started[0] as child:
            out, error = child.communicate(timeout=900)
        assert trap.happened.is_set(), out + error
        assert (child.returncode == 0) <= (who in ("qemu", "snapchain there", "ssh")), out + error
        cable.set(cut=0)
        for name, side in (("libvirtd", near), ("libvirtd there", far)):
            if who == name:
                side.host.start()
        wait_until(lambda: ended(near, far))
        has = where(near, far)
    if who == "snapchain" and event == "finish answer":
        assert has == "far"


def ended(near: Side, far: Side) -> bool:
    """Whether the move is over; a user would do this too."""
    if near.records():
        near.snapchain("migrate", "--domain", NAME, "--abort")
    elif far.records():
        (far.folder / "empty").mkdir(exist_ok=True)
        far.snapchain("doctor", far.folder / "empty")
    return not near.records() and not far.records()


@pytest.mark.soak
def test_a_linux_with_files_goes_there_and_back(tmp_path: Path) -> None:
    """It writes and syncs all the time; its filesystems are clean at the end, and no file is torn."""
    kernel, initrd = parts()
    boot = f"<kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>console=ttyS0 quiet panic=-1</cmdline>"
    place = Path("run/qemu/console")
    serial = "<serial type='unix'><source mode='bind' path='/run/libvirt/qemu/console'/></serial>"
    disks = {name: formatted(tmp_path / f"{name}.qcow2") for name in ("vda", "vdb")}
    with domain_hosts(tmp_path) as (near, far, _):
        near.define(NAME, disks, os_more=boot, more=serial, memory=128)
        console = Console()
        console.connect(near.host.folder / place)
        for words in (b"AGENT GUEST READY", b"# "):
            console.read_until(words)
        console.sh(
            "(n=0; while test ! -e /mnt/vda/stop; do n=$((n+1)); "
            "echo $n >/mnt/vda/$((n % 50)); echo $n >/mnt/vdb/$((n % 50)); echo $n >/mnt/vdb/last; done) & "
            "echo started"
        )
        console.close()
        for source, name in ((near, "b"), (far, "a")):
            report = source.migrate(NAME, tmp_path / name)
            assert report["pause_within"], report
        console = Console()
        console.connect(near.host.folder / place)
        console.sh("touch /mnt/vda/stop; sleep 1; sync; umount /mnt/vda /mnt/vdb")
        console.close()
        near.host.virsh("destroy", NAME)
        for disk in report["disks"]:
            raw = tmp_path / "disk.raw"
            subprocess.run(["qemu-img", "convert", "-O", "raw", disk["overlay"], raw], check=True)
            subprocess.run(["e2fsck", "-fn", raw], check=True, capture_output=True)
