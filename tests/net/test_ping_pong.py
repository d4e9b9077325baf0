"""A guest that goes forth and back all the time: nothing lost, nothing left, and only what differs crosses the link."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pytest

from tests.guest.agent_guest import AgentGuest, Console, formatted, parts
from tests.guest.counting_guest import Counting, check_numbers, counts_on
from tests.guest.libvirt import definition
from tests.guest.machine import Machine, Monitor
from tests.libvirtd import LibvirtHost
from tests.net import alpine
from tests.net.sites import Site, Sites, two_sites
from tests.ops.stacks import qemu_img
from tests.waiting import wait_until

pytestmark = [pytest.mark.root, pytest.mark.soak]
MOVES = 30
MIB = 1 << 20
WRITES = (
    "(n=0; while test ! -e /tmp/stop; do n=$((n+1)); echo $n >>{first}/log; echo $n >{last}/last; sleep 0.02; "
    "dd if=/dev/zero of={first}/x$((n % 20)) bs=16k count=1 2>/dev/null; test $((n % 50)) != 0 || sync; done; "
    "touch /tmp/stopped) & echo began"
)
SEEN = (
    "echo 3 >/proc/sys/vm/drop_caches; "
    "for at in {all}; do cd $at/set; awk 'NR%4=={turn}' ../sums | md5sum -c | grep -v OK; done; "
    'awk \'NR>1 && $1!=p+1{{print "g" "ap",p,$1}} {{p=$1}} END{{print "written",p}}\' {first}/log'
)
"""One file in four each time, from the disk, and the numbers in the log: one that is missing shows."""


def files_that_stay(folder: Path, count: int = 24) -> Path:
    """A directory of files of 1 MiB that do not compress, with their sums beside them."""
    (folder / "set").mkdir(parents=True)
    rows = []
    for number in range(count):
        data = random.Random(f"{folder.name} {number}").randbytes(MIB)
        (folder / "set" / str(number)).write_bytes(data)
        rows.append(f"{hashlib.md5(data, usedforsecurity=False).hexdigest()}  {number}\n")
    (folder / "sums").write_text("".join(rows))
    return folder


class Moving(Protocol):
    """A guest that can move. mounts: of its filesystems, in it; site: where it runs"""

    mounts: list[str]
    site: Site

    @property
    def words(self) -> list[str]:
        """How a command names it, on the host where it runs."""
        ...

    def arrived(self, report: dict[str, Any], site: Site) -> None:
        """It has moved."""
        ...

    def sh(self, command: str) -> str:
        """A command in it."""
        ...

    def stop(self) -> None:
        """As its operator ends it, and wait for that."""
        ...


class ByQmp:
    """Without libvirt: its console is a socket beside its monitor, wherever it goes."""

    def __init__(self, machine: Machine, console: Console, site: Site, mounts: list[str]) -> None:
        self.mounts, self.site = mounts, site
        self._qmp, self._console = machine.qmp, console

    @property
    def words(self) -> list[str]:
        return ["--qmp", str(self._qmp)]

    def arrived(self, report: dict[str, Any], site: Site) -> None:
        self.site, self._qmp = site, Path(report["qmp"])
        self._console.close()
        self._console = Console()
        self._console.connect(self._qmp.with_name("console"))

    def sh(self, command: str) -> str:
        return self._console.sh(command)

    def stop(self) -> None:
        self._console.close()
        Monitor(self._qmp).quit()
        wait_until(lambda: not self.site.processes())


class ByLibvirt:
    """A domain; its console is a socket in its libvirt's directory, on either host."""

    words: ClassVar[list[str]] = ["--domain", "web1"]

    def __init__(self, site: Site, mounts: list[str]) -> None:
        self.mounts, self.site = mounts, site
        self._console = self._connected()

    def _connected(self) -> Console:
        console = Console()
        console.connect(libvirt_of(self.site).folder / "run" / "qemu" / "console")
        return console

    def booted(self) -> None:
        for words in (b"AGENT GUEST READY", b"# "):
            self._console.read_until(words)

    def arrived(self, _report: dict[str, Any], site: Site) -> None:
        self.site = site
        self._console.close()
        self._console = self._connected()

    def sh(self, command: str) -> str:
        return self._console.sh(command)

    def stop(self) -> None:
        self._console.close()
        libvirt_of(self.site).virsh("destroy", "web1")


def libvirt_of(site: Site) -> LibvirtHost:
    assert site.libvirt is not None
    return site.libvirt


def disks_with_files(site: Site, folder: Path) -> dict[str, Path]:
    """Two of 256 MiB."""
    images = site.folder / "images"
    images.mkdir()
    return {
        name: formatted(images / f"{name}.qcow2", size="256M", files=files_that_stay(folder / name))
        for name in ("vda", "vdb")
    }


@contextmanager
def domain(site: Site, folder: Path) -> Iterator[Moving]:
    """As `small`, by libvirt."""
    kernel, initrd = parts()
    boot = f"<kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>console=ttyS0 quiet panic=-1</cmdline>"
    serial = "<serial type='unix'><source mode='bind' path='/run/libvirt/qemu/console'/></serial>"
    xml = site.folder / "web1.xml"
    xml.write_text(definition("web1", disks_with_files(site, folder), os_more=boot, more=serial, memory=128))
    libvirt_of(site).virsh("define", xml)
    libvirt_of(site).virsh("start", "web1", "--paused")
    guest = ByLibvirt(site, ["/mnt/vda", "/mnt/vdb"])
    libvirt_of(site).virsh("resume", "web1")
    guest.booted()
    yield guest


@contextmanager
def small(site: Site, folder: Path) -> Iterator[Moving]:
    """The guest with an agent, and two disks of 256 MiB with files."""
    disks = disks_with_files(site, folder)
    with AgentGuest(folder / "m", disks=disks) as machine:
        yield ByQmp(machine, machine.console, site, ["/mnt/vda", "/mnt/vdb"])


@contextmanager
def linux(site: Site, folder: Path) -> Iterator[Moving]:
    """Alpine, which runs from the disk that moves."""
    images = site.folder / "images"
    images.mkdir()
    top = images / "vda.qcow2"
    shutil.copyfile(alpine.part(".qcow2"), top)
    console, path = Console(), folder / "m" / "console"
    argv = [
        "-kernel", str(alpine.part(".kernel")), "-initrd", str(alpine.part(".initrd")),
        "-append", "root=/dev/vda rootfstype=ext4 modules=ext4,virtio_blk,virtio_pci console=ttyS0 quiet init=/bin/sh",
        "-chardev", f"socket,id=console,path={path},server=on,wait=off", "-serial", "chardev:console",
    ]  # fmt: skip
    with Machine(folder / "m", disks={"vda": top}, argv=argv, memory=256) as machine:
        console.connect(path)
        console.read_until(b"# ")
        console.sh("mount -o remount,rw / && mount -t proc proc /proc && mount -t tmpfs tmp /tmp && mkdir -p /m/set")
        console.sh("cd /m/set && cp /bin/busybox 1 && cp $(find /lib /usr/lib -type f -name 'lib*.so.*') .")
        console.sh("md5sum * >../sums && cd / && sync")
        yield ByQmp(machine, console, site, ["/m"])


KINDS = {"small": small, "alpine": linux, "domain": domain}


def move(guest: Moving, pair: Sites, *options: object) -> tuple[dict[str, Any], dict[str, float]]:
    """To the other host; the report, and what it took: seconds, bytes on the wire, and those that were no memory."""
    begun, sent = time.monotonic(), guest.site.sent()
    there = pair.other(guest.site)
    report: dict[str, Any] = guest.site.report("migrate", *guest.words, there.url, *options)
    wire = guest.site.sent() - sent
    cost = {"seconds": time.monotonic() - begun, "bytes": wire, "disks": wire - report["memory_bytes"]}
    guest.arrived(report, there)
    return report, cost


def check_left(guest: Moving, pair: Sites) -> None:
    """Of the move there is nothing but the guest; what it left is whole and cannot be written."""
    old = pair.other(guest.site)
    wait_until(lambda: not old.processes())
    assert old.left() == []
    assert len(guest.site.left()) <= 1, guest.site.left()  # where the sockets of its QEMU are
    assert len(guest.site.processes()) <= 1
    for image in old.folder.rglob("*.qcow2"):
        assert subprocess.run(["qemu-img", "check", "-q", image], check=False).returncode == 0, image
    for image in old.replica.glob("*/active/*.qcow2"):
        assert not image.stat().st_mode & 0o222, image


def chain_of(image: str) -> list[str]:
    argv = ["qemu-img", "info", "-U", "--backing-chain", "--output=json", image]
    rows = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    return [row["filename"] for row in rows]


def used(site: Site) -> int:
    """Bytes that images take on a host."""
    return sum(image.stat().st_blocks * 512 for image in site.folder.rglob("*.qcow2"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_linux_goes_forth_and_back_under_load(kind: str, tmp_path: Path) -> None:
    """Files that stay, files that change, and a log without a gap; filesystems clean at the end."""
    with two_sites(tmp_path, libvirt=kind == "domain") as pair, KINDS[kind](pair.a, tmp_path) as guest:
        guest.sh(WRITES.format(first=guest.mounts[0], last=guest.mounts[-1]))
        first, written, disks = None, 0, []
        for turn in range(MOVES):
            report, cost = move(guest, pair, "--max-downtime", 60)
            first = first or cost
            check_left(guest, pair)
            seen = guest.sh(SEEN.format(all=" ".join(guest.mounts), first=guest.mounts[0], turn=turn % 4))
            assert "gap" not in seen, seen
            assert "FAILED" not in seen, seen
            now = int(seen.rsplit("written", 1)[1])
            assert now > written, seen
            written = now
            disks = [disk["overlay"] for disk in report["disks"]]
            print(
                f"{kind} {turn + 1}: {cost['seconds']:.1f} s, {cost['bytes'] / MIB:.0f} MiB, of these layers "
                f"{report['bytes_sent'] / MIB:.1f}, memory {report['memory_bytes'] / MIB:.0f}; pause "
                f"{report['pause']:.3f} of {report['predicted_pause']:.3f} predicted "
                f"({report['predicted_pause'] / report['pause']:.1f}); {len(chain_of(disks[0]))} layers, "
                f"{used(pair.a) / MIB:.0f} and {used(pair.b) / MIB:.0f} MiB of images"
            )
            if turn >= 2:  # the first way back has nothing to go back to, without `failback --prepare`
                assert cost["disks"] < first["disks"] / 2, (cost, first)  # what the guest has written meanwhile
        guest.sh(f"touch /tmp/stop; while test ! -e /tmp/stopped; do sleep 1; done; {_unmounted(guest)}")
        guest.stop()
        for disk in disks:
            assert subprocess.run(["qemu-img", "check", "-q", disk], check=False).returncode == 0
            raw = tmp_path / "disk.raw"
            qemu_img("convert", "-O", "raw", disk, raw)
            done = subprocess.run(["e2fsck", "-fn", raw], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout


def _unmounted(guest: Moving) -> str:
    if guest.mounts == ["/m"]:
        return "sync; mount -o remount,ro /"
    return f"cd / && umount {' '.join(guest.mounts)}"


NIGHT = """time_zone = "UTC"
[keep]
last = 3
[[guests]]
qmp = "{qmp}"
merge_above = 4
[[destinations]]
name = "repository"
url = "{url}"
password_env = "SNAPCHAIN_PASSWORD"
"""


def test_daily_life_goes_on_between_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever host it is on: one series of points everywhere, merges as before, and chains that stay short."""
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", "secret")
    repository, third = tmp_path / "repository", f"dir:{tmp_path / 'third'}"
    with two_sites(tmp_path) as pair:
        counting = Counting(pair.a.folder / "guest")
        site, qmp = pair.a, counting.machine.qmp
        site.snapchain("init", repository)
        with counting.machine:
            for turn in range(1, 7):
                words = ("--qmp", qmp)
                site.report("snapshot", *words, "--label", f"turn-{turn}")
                shipped = [site.report("ship", *words, place) for place in (repository, third)]
                night = tmp_path / "night.toml"
                night.write_text(NIGHT.format(qmp=qmp, url=repository))
                site.report("nightly", night)
                assert shipped[0]["guest_point"] == 2 * turn - 1, shipped
                assert shipped[1]["guest_point"] == turn, shipped
                site.report("merge", *words, "--keep-last", 1, "--at", f"{repository}::web1")
                old, site = site, pair.other(site)
                report = old.report("migrate", *words, site.url, "--max-downtime", 60)
                qmp = Path(report["qmp"])
                for disk in report["disks"]:
                    if old.replica.exists():
                        old.report("merge", f"dir:{old.replica}::{disk['disk']}", "--keep-last", 1)
                    assert len(chain_of(disk["overlay"])) <= 8, chain_of(disk["overlay"])
                    assert len(list(Path(disk["overlay"]).parent.glob("*.qcow2"))) == 1
            monitor = Monitor(qmp)
            assert counts_on(monitor)
            monitor.quit()
        check_numbers([Path(disk["overlay"]) for disk in report["disks"]])
        for place in (repository, third):
            assert site.report("verify", f"{place}::web1", "--read-data")["ok"]
        for point in range(1, 7):
            out = tmp_path / f"out{point}"
            site.report("restore", f"{third}::web1@{point}", out)
            check_numbers([out / f"{name}.qcow2" for name in ("vda", "vdb", "vdc")])


def test_a_prepared_way_back_sends_only_the_difference(tmp_path: Path) -> None:
    """The images that it left become a replica there, a local copy: the guest comes back to that while it runs."""
    with two_sites(tmp_path) as pair, small(pair.a, tmp_path) as guest:
        report, there = move(guest, pair, "--max-downtime", 60)
        pairs = [word for disk in report["disks"] for word in (disk["image"], f"dir:{pair.a.replica}::{disk['disk']}")]
        pair.a.report("failback", "--prepare", *pairs)
        guest.sh(f"dd if=/dev/urandom of={guest.mounts[0]}/new bs=1M count=3 2>/dev/null; sync")
        back, cost = move(guest, pair, "--max-downtime", 60)
        assert 3 * MIB < back["bytes_sent"] < 12 * MIB < there["disks"] / 4, (back["bytes_sent"], there, cost)
        check_left(guest, pair)
        assert "FAILED" not in guest.sh(f"cd {guest.mounts[0]}/set && md5sum -c ../sums")
        guest.stop()
