"""A host is lost in each way, and comes back in each way: two hosts, a Linux guest with its agent and two ext4 disks.

lost       its QEMU is killed, its network is cut, its disks and its state are gone
from       a replica on the other host, a repository
comes back with a command of snapchain, a start by libvirt, an older copy of its images, a restored state directory
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from snapchain.ops.fence.hook import HookRequest, install
from tests.guest.agent_guest import AgentGuest, formatted
from tests.net.sites import Sites, two_sites
from tests.ops.guest_points import DOMAIN
from tests.ops.stacks import qemu_img
from tests.ops.test_failover import program
from tests.waiting import HANG

pytestmark = [pytest.mark.root, pytest.mark.soak]
DISKS = ("vda", "vdb")
MIB = 1 << 20
FILES = 6
REFUSED = "kvm2 has taken the guest web1 over by a failover after a fence program"


@dataclass
class World:
    """Guest web1 on host a: shipped at counter 41, at 42 since. away, here: the destination, as a and b reach it"""

    pair: Sites
    guest: AgentGuest
    images: Path
    copies: Path
    away: str
    here: str
    point: dict[str, Any]

    def tops(self) -> dict[str, Path]:
        """The active layers on host a."""
        return {name: self.images / f"{name}.1.qcow2" for name in DISKS}


@contextmanager
def world(pair: Sites, folder: Path, kind: str) -> Iterator[World]:
    a = pair.a
    images, copies = a.folder / "images", folder / "copies"
    images.mkdir(parents=True)
    disks = {name: formatted(images / f"{name}.qcow2") for name in DISKS}
    away, here = pair.b.url, f"dir:{pair.b.replica}"
    if kind == "repository":
        away = here = str(folder / "repository")
        a.report("init", away, "--no-encryption")
    with AgentGuest(folder / "m", disks=disks) as guest:
        guest.sh(
            f"for i in $(seq {FILES}); do head -c 300000 /dev/urandom > /mnt/vda/f$i; done; "
            "(cd /mnt/vda && md5sum f* > /mnt/vdb/sums); echo 41 > /mnt/vdb/counter; sync"
        )
        point = a.report("ship", "--qmp", guest.qmp, "--agent", guest.agent, "--quiesce", "require", away)
        assert point["consistency"] == "filesystem"
        for part in ("images", "state"):
            shutil.copytree(a.folder / part, copies / part)
        guest.sh("echo 42 > /mnt/vdb/counter; head -c 300000 /dev/urandom > /mnt/vda/late; sync")
        yield World(pair, guest, images, copies, away, here, point)


def lose(found: World, how: str) -> None:
    """The host is lost to the other one. Where its QEMU goes on, the fence program ends it."""
    if how == "killed":
        os.kill(found.guest.process.pid, signal.SIGKILL)
    elif how == "cut":
        found.pair.cable.set(cut=1)
    else:
        shutil.rmtree(found.images)
        shutil.rmtree(found.pair.a.folder / "state")


def fence(found: World, folder: Path) -> Path:
    """Ends the QEMU of the old host, and is sure of it."""
    pid = found.guest.process.pid
    dead = f'test "$(cut -d" " -f3 /proc/{pid}/stat 2>/dev/null || echo X)" = Z || ! test -e /proc/{pid}'
    text = f'echo "$SNAPCHAIN_HOST $SNAPCHAIN_ROUND" >> {folder}/fenced; kill -9 {pid}; until {dead}; do :; done; true'
    return program(folder / "fence", text)


def taken_over(found: World, folder: Path, *more: str) -> dict[str, Any]:
    into = ["--into", str(found.pair.b.folder / "web1")] if found.here == found.away else []
    words = ["failover", f"{found.here}::web1", "--fence", str(fence(found, folder)), "--yes", *into, *more]
    report: dict[str, Any] = found.pair.b.report(*words)
    return report


def check_files(disks: dict[str, Path], folder: Path, counter: str) -> None:
    """All files up to the point are there, and nothing is wrong with the filesystems, as e2fsck sees them at rest."""
    raws = {}
    for name, path in disks.items():
        qemu_img("check", "-q", path)
        raws[name] = folder / f"{name}.raw"
        qemu_img("convert", "-O", "raw", path, raws[name])
        subprocess.run(["e2fsck", "-fn", raws[name]], check=True, capture_output=True)

    def read(disk: str, name: str) -> bytes:
        argv = ["debugfs", "-R", f"cat /{name}", str(raws[disk])]
        return subprocess.run(argv, check=True, capture_output=True).stdout

    assert read("vdb", "counter").decode().strip() == counter
    sums = dict(line.split()[::-1] for line in read("vdb", "sums").decode().splitlines())
    assert len(sums) == FILES
    for name, said in sums.items():
        assert hashlib.md5(read("vda", name), usedforsecurity=False).hexdigest() == said, name


def paths(report: dict[str, Any]) -> dict[str, Path]:
    return {each["name"]: Path(each["path"]) for each in report["disks"]}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Sites]:
    with two_sites(tmp_path) as found:
        yield found


@pytest.mark.parametrize("kind", ["replica", "repository"])
@pytest.mark.parametrize("how", ["killed", "cut", "gone"])
def test_all_files_up_to_the_point(pair: Sites, tmp_path: Path, how: str, kind: str) -> None:
    with world(pair, tmp_path, kind) as found:
        lose(found, how)
        report = taken_over(found, tmp_path)
        assert found.guest.process.wait(HANG) == -signal.SIGKILL
        assert (tmp_path / "fenced").read_text().splitlines() == ["kvm1 1", "kvm1 2"]
        assert (report["state"], report["epoch"], report["master"], report["former"]) == ("active", 2, "kvm2", "kvm1")
        assert report["guest_point"] == found.point["guest_point"]
        assert report["loss"]["seconds"] > 0
        check_files(paths(report), tmp_path, "41")
        with suppress(OSError):
            pair.cable.set(cut=0)
        check_returns(found, tmp_path)


def check_returns(found: World, folder: Path) -> None:
    """Whatever the old host comes back with, it is refused; a state directory without marks, and old images, too."""
    a = found.pair.a
    for images_are_old, state_is_old in ((False, False), (False, True), (True, False), (True, True)):
        for part, is_old in (("images", images_are_old), ("state", state_is_old)):
            if is_old or not (a.folder / part).exists():
                shutil.rmtree(a.folder / part, ignore_errors=True)
                shutil.copytree(found.copies / part, a.folder / part)
        case = f"old images {images_are_old}, old state {state_is_old}"
        started = hooked(found, folder)
        assert started.returncode == 1, f"{case}: libvirt would start it: {started.stderr}"
        # On a busy machine the destination may not answer in time, which is a reason as well.
        assert REFUSED in started.stderr or "not known whether another host runs it" in started.stderr, case
        for name, top in found.tops().items():
            status, out, error = a.snapchain("ship", top, f"{found.away}::web1/{name}")
            assert status != 0, f"{case}: {out}"
            assert REFUSED in error, f"{case}: {error}"


def hooked(found: World, folder: Path) -> subprocess.CompletedProcess[str]:
    """As libvirt on the old host asks before it starts the guest."""
    a = found.pair.a
    hook = install(HookRequest(folder=folder / "qemu.d", at=[found.away], requires_answer=True)).path
    xml = DOMAIN
    block = (
        "<disk type='block' device='disk'>\n      <driver name='qemu' type='raw'/>\n      <source dev='/dev/vg0/b'/>"
    )
    for name, old, new in (
        ("vda", "<source file='/old/a.3.qcow2'/>", "<source file='{}'/>"),
        ("vdb", block, "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>"),
    ):
        assert old in xml
        xml = xml.replace(old, new.format(found.tops()[name]), 1)
    there = {"SNAPCHAIN_SSH": shlex.join(found.pair.b.sshd.ssh), "SNAPCHAIN_REMOTE": found.pair.b.served}
    argv = [*a.host.inside, hook, "web1", "prepare", "begin", "-"]
    environment = {**os.environ, **a.environment, **there}
    return subprocess.run(argv, input=xml, env=environment, capture_output=True, text=True, check=False)


def written(path: Path) -> int:
    """DATA of the top of a chain, bytes."""
    argv = ["qemu-img", "map", "--output=json", str(path)]
    rows = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    return sum(row["length"] for row in rows if row["depth"] == 0 and row["data"])


def test_the_way_back_moves_what_changed(pair: Sites, tmp_path: Path) -> None:
    """The old host lost nothing but its power. What crosses the cable is beside what changed since, on either side."""
    with world(pair, tmp_path, "replica") as found:
        lose(found, "killed")
        report = taken_over(found, tmp_path)
        overlays = paths(report)
        with AgentGuest(pair.b.folder / "m", disks=overlays) as guest:
            # Bytes that cannot be compressed, and that the guest need not make once more.
            guest.sh("echo 43 > /mnt/vdb/counter; for i in 1 2 3 4; do cat /mnt/vda/f*; done > /mnt/vda/new; sync")
            guest.sh("umount /mnt/vda /mnt/vdb")
        changed = sum(map(written, overlays.values()))
        tops = found.tops()
        changed += sum(map(written, tops.values()))  # what the old host wrote beyond the point is overwritten
        disks = [word for name, top in tops.items() for word in (top, f"{pair.b.url}::web1/{name}")]
        assert pair.a.report("fence", *disks)["taken_over"]
        back = f"dir:{pair.a.folder}/back"
        prepared = [word for name, top in tops.items() for word in (top, f"{back}::web1/{name}")]
        pair.a.report("failback", "--prepare", *prepared)
        there = pair.a.sshd.url(pair.a.folder / "back")
        before = pair.b.sent()
        moved = pair.b.report(
            "failback", *(word for name, path in overlays.items() for word in (path, f"{there}::web1/{name}"))
        )
        sent = pair.b.sent() - before
        print(f"\nchanged {changed} bytes, on the cable {sent}: {sent / changed:.3f}")
        assert sent <= 1.2 * changed
        check_files({each["disk"].partition("/")[2]: Path(each["overlay"]) for each in moved["disks"]}, tmp_path, "43")
        (row,) = pair.a.report("status", back)["guests"]
        assert (row["state"], row["master"], row["epoch"]) == ("switched", "kvm1", 3)
        (row,) = pair.b.report("status", found.here)["guests"]
        assert (row["state"], row["former"], row["epoch"]) == ("protected", "kvm2", 3)
