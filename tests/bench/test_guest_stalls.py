"""The longest stall that a guest feels from snapchain, beside the same by hand: `make bench ARGS='-k stalls'`.

By hand is what an administrator would type: `virsh snapshot-create-as --disk-only --atomic [--quiesce]`, `virsh
blockcommit [--active --pivot]`, `virsh backup-begin`, and QEMU's `blockdev-backup`. Each contender has a guest of its
own, with the same kernel and a copy of the same image, and they take turns; all of it is whole processes.

The guest is a Linux that appends its clock to a file and syncs it, again and again: the longest gap between two lines
is what its programs feel of a freeze, a drained disk or a stalled main loop, to a hundredth of a second. (Writes by the
human monitor would be finer, but a job that ends while such a write is under way can hang QEMU 7.2.)

SNAPCHAIN_BENCH_ROUNDS sets the rounds (5). Load of others only ever adds time, so contenders are compared by medians
and by minima: snapchain is slower if both pass TOLERANCE, by more than a guest feels that is left alone. The longest
stall of all rounds is printed beside them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest

from tests.bench.measure import qemu_img, snapchain
from tests.guest.agent_guest import AgentGuest, Console, formatted, parts
from tests.guest.libvirt import Domain
from tests.guest.live_chain import names
from tests.libvirtd import LibvirtHost, libvirtd
from tests.waiting import wait_until

pytestmark = [pytest.mark.bench, pytest.mark.root, pytest.mark.timeout(3600)]

ROUNDS = int(os.environ.get("SNAPCHAIN_BENCH_ROUNDS", "5"))
TOLERANCE = 1.25
SIZE = "256M"
FILLED = 64
"""MiB that a guest writes between two snapshots, and a merge moves."""
Stalls = dict[tuple[str, str], list[float]]
"""(what was done, by whom) -> the longest stall of each round, in seconds."""
IDLE = "nothing"
WORDS = {"XDG_STATE_HOME": "state", "XDG_CACHE_HOME": "cache"}


# --- What is compared.


class Contender(Protocol):
    """Someone who snapshots and merges the disk vda of a guest."""

    def top(self) -> Path:
        """The active layer."""
        ...

    def snapshot(self) -> None: ...

    def merge(self, lowest: Path, uppermost: Path) -> None:
        """Sealed layers."""
        ...

    def pivot(self, lowest: Path) -> None:
        """All from there on, with the active layer."""
        ...


@dataclass
class Snapchain:
    """guest: the options that name it; active: its active layer; strategy: of merges of sealed layers"""

    folder: Path
    guest: tuple[str | Path, ...]
    active: Path
    strategy: str = "commit"
    quiesce: str = "no"

    def top(self) -> Path:
        return self.active

    def snapshot(self) -> None:
        said = json.loads(self._run("snapshot", "--quiesce", self.quiesce, "--json", "--quiet"))
        self.active = Path(said["disks"][0]["overlay"])

    def merge(self, lowest: Path, uppermost: Path) -> None:
        self._run("merge", "--from", lowest, "--to", uppermost, "--strategy", self.strategy)

    def pivot(self, lowest: Path) -> None:
        self._run("merge", "--from", lowest, "--strategy", "commit")
        self.active = lowest

    def ship(self, address: str) -> None:
        """By dirty bitmaps."""
        self._run("ship", "--bitmap", address)

    def _run(self, verb: str, *words: str | Path) -> str:
        return snapchain(self.folder, verb, *self.guest, *words).out


@dataclass
class ByHand:
    """virsh, as an administrator would use it."""

    domain: Domain
    folder: Path
    quiesce: tuple[str, ...] = ()
    number: int = 0

    def top(self) -> Path:
        return self.domain.source("vda")

    def snapshot(self) -> None:
        self.number += 1
        spec = f"vda,file={self.folder}/vda.{self.number}.qcow2"
        words = ("--disk-only", "--atomic", "--no-metadata", *self.quiesce)
        self.domain.virsh("snapshot-create-as", *words, "--diskspec", spec)

    def merge(self, lowest: Path, uppermost: Path) -> None:
        self.domain.virsh("blockcommit", "--path", "vda", "--base", lowest, "--top", uppermost, "--wait")

    def pivot(self, lowest: Path) -> None:
        self.domain.virsh("blockcommit", "--path", "vda", "--base", lowest, "--active", "--pivot", "--wait")

    def backup(self, target: Path) -> None:
        """A full push backup."""
        target.unlink(missing_ok=True)
        request = self.folder / "backup.xml"
        request.write_text(
            "<domainbackup mode='push'><disks><disk name='vda' type='file'>"
            f"<target file='{target}'/><driver type='qcow2'/></disk></disks></domainbackup>"
        )
        self.domain.virsh("backup-begin", "--backupxml", request)
        wait_until(lambda: "None" in self.domain.virsh("domjobinfo"))


def push_backup(monitor: AgentGuest, target: Path) -> None:
    """The same by QEMU's own command."""
    target.unlink(missing_ok=True)
    qemu_img("create", "-q", "-f", "qcow2", target, SIZE)
    file = {"driver": "file", "filename": str(target)}
    monitor.ask("blockdev-add", **{"node-name": "target", "driver": "qcow2", "file": file})
    monitor.ask("blockdev-backup", **{"job-id": "push"}, device="vda-top", target="target", sync="full")
    wait_until(lambda: not monitor.ask("query-jobs"))
    monitor.ask("blockdev-del", **{"node-name": "target"})


# --- How a stall is measured.


_LOOP = "(while [ ! -e /stop ]; do read up rest </proc/uptime; echo $up >>/mnt/vda/log; sync; done) & :"
_GAP = "awk '{ if (NR > 1 && $1 - last > most) most = $1 - last; last = $1 } END { print \"longest\", most + 0 }'"


def longest_gap(console: Console, action: Callable[[], None]) -> float:
    """Seconds between two lines that the guest writes and syncs during an action, to a hundredth."""
    console.sh(f"rm -f /stop /mnt/vda/log; {_LOOP}")
    time.sleep(0.3)
    action()
    said = console.sh(f"touch /stop; wait; {_GAP} /mnt/vda/log")
    found = re.findall(r"longest ([0-9.]+)", said)
    return float(found[-1])


# --- Guests.


@dataclass
class Rig:
    """Guests with an agent and a disk vda, each by its name."""

    folder: Path
    host: LibvirtHost
    stack: ExitStack
    consoles: dict[str, Console] = field(default_factory=dict)

    def image(self, name: str) -> Path:
        """The active layer of a guest as it was made: an ext4 with files, of which each guest has a copy."""
        template = self.folder / "vda.qcow2"
        if not template.exists():
            formatted(template, size=SIZE)
        folder = self.folder / name
        folder.mkdir()
        shutil.copy(template, folder / "base.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", folder / "vda.qcow2")
        return folder / "vda.qcow2"

    def _sockets(self) -> Path:
        return Path(self.stack.enter_context(tempfile.TemporaryDirectory()))

    def machine(self, name: str) -> AgentGuest:
        """A guest by QMP."""
        guest = self.stack.enter_context(AgentGuest(self._sockets(), disks={"vda": self.image(name)}, name=name))
        self.consoles[name] = guest.console
        return guest

    def domain(self, name: str) -> Domain:
        """A guest of libvirt."""
        kernel, initrd = parts()
        sockets = self._sockets()
        boot = f"<kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>console=ttyS0 quiet panic=-1</cmdline>"
        serial = f"<serial type='unix'><source mode='bind' path='{sockets}/console'/><target port='0'/></serial>"
        domain = Domain.started(
            self.host, self.folder / f"{name}-xml", {"vda": self.image(name)}, name=name, memory=128, os_more=boot,
            more=serial, agent=sockets / "agent",
        )  # fmt: skip
        self.stack.callback(domain.remove)
        self.consoles[name] = console = Console()
        self.stack.callback(console.close)
        console.connect(sockets / "console")
        wait_until(lambda: domain.xml().find("devices/channel/target[@state='connected']") is not None)
        console.sh("true")
        return domain

    def by_qmp(self, name: str, **more: str) -> Snapchain:
        """Snapchain, and a guest for it."""
        guest = self.machine(name)
        return Snapchain(self.folder, ("--qmp", guest.qmp), self.folder / name / "vda.qcow2", **more)

    def by_domain(self, name: str, **more: str) -> Snapchain:
        """Snapchain, and a domain for it."""
        domain = self.domain(name)
        options = ("--domain", domain.name, "--connect", self.host.uri)
        return Snapchain(self.folder, options, domain.source("vda"), **more)

    def by_hand(self, name: str, *quiesce: str) -> ByHand:
        """An administrator, and a domain."""
        return ByHand(self.domain(name), self.folder / name, quiesce)

    def gap(self, name: str, action: Callable[[], None]) -> float:
        """What a guest feels of an action."""
        return longest_gap(self.consoles[name], action)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LibvirtHost]:
    with libvirtd(tmp_path / "host") as found:
        yield found


@pytest.fixture
def rig(tmp_path: Path, host: LibvirtHost, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    for variable, name in WORDS.items():
        monkeypatch.setenv(variable, str(tmp_path / name))
    with ExitStack() as stack:
        yield Rig(tmp_path, host, stack)


# --- The measurements.


def test_stalls_of_snapshots_and_merges(rig: Rig) -> None:
    contenders: dict[str, Contender] = {
        "commit": rig.by_qmp("commit"),
        "stream": rig.by_qmp("stream", strategy="absorb"),
        "libvirt": rig.by_domain("libvirt"),
        "hand": rig.by_hand("hand"),
    }
    stalls: Stalls = {}
    for number in range(ROUNDS):
        for name, contender in turns(contenders, number):
            one_round(rig, name, contender, stalls)
    shown = {
        "commit": "snapchain --qmp",
        "stream": "snapchain --qmp, by stream",
        "libvirt": "snapchain --domain",
        "hand": "virsh",
    }
    assert not table(stalls, shown, theirs=["hand"])


def one_round(rig: Rig, name: str, contender: Contender, stalls: Stalls) -> None:
    """Three snapshots, a merge of the first two layers that they sealed, and a pivot that merges the rest."""

    def measure(what: str, action: Callable[[], None]) -> None:
        stalls.setdefault((what, name), []).append(rig.gap(name, action))

    lowest = contender.top()
    measure(IDLE, lambda: time.sleep(1))
    longest = []
    for _ in range(3):
        longest.append(rig.gap(name, contender.snapshot))
        rig.consoles[name].sh(f"dd if=/dev/urandom of=/mnt/vda/fill bs=1M count={FILLED} conv=notrunc && sync")
    stalls.setdefault(("snapshot", name), []).append(max(longest))
    chain = [lowest.parent / each for each in names(contender.top())]
    _, lowest, first, second, _ = chain
    measure("merge of sealed layers", lambda: contender.merge(first, second))
    assert len(names(contender.top())) == 4
    measure("merge with pivot", lambda: contender.pivot(lowest))
    assert contender.top() == lowest
    for path in (first, second, chain[-1]):
        path.unlink(missing_ok=True)


def test_stalls_of_bitmap_captures(rig: Rig) -> None:
    guest = rig.machine("bitmap")
    ours = Snapchain(rig.folder, ("--qmp", guest.qmp), rig.folder / "bitmap" / "vda.qcow2")
    snapchain(rig.folder, "init", "repo", "--no-encryption")
    hand = rig.by_hand("hand")
    for console in rig.consoles.values():
        console.sh(f"dd if=/dev/urandom of=/mnt/vda/fill bs=1M count={2 * FILLED} && sync")
    target = rig.folder / "pushed.qcow2"
    stalls: Stalls = {}
    for number in range(ROUNDS):
        actions: dict[tuple[str, str], tuple[str, Callable[[], None]]] = {
            ("whole", "bitmap"): ("bitmap", lambda: ours.ship(f"repo::web{number}")),  # noqa: B023 - called in this round
            ("changed", "bitmap"): ("bitmap", lambda: ours.ship(f"repo::web{number}")),  # noqa: B023
            ("whole", "blockdev-backup"): ("bitmap", lambda: push_backup(guest, target)),
            ("whole", "hand"): ("hand", lambda: hand.backup(target)),
            (IDLE, "bitmap"): ("bitmap", lambda: time.sleep(1)),
        }
        for (what, who), (name, action) in actions.items():
            stalls.setdefault((what, who), []).append(rig.gap(name, action))
    for each in ("blockdev-backup", "hand"):
        stalls["changed", each] = stalls["whole", each]
    shown = {
        "bitmap": "snapchain ship --bitmap",
        "blockdev-backup": "blockdev-backup, full",
        "hand": "virsh backup-begin",
    }
    assert not table(stalls, shown, theirs=["blockdev-backup", "hand"])


def test_stalls_of_quiesced_snapshots(rig: Rig) -> None:
    contenders: dict[str, Contender] = {
        "qmp": rig.by_qmp("qmp", quiesce="require"),
        "libvirt": rig.by_domain("libvirt", quiesce="require"),
        "hand": rig.by_hand("hand", "--quiesce"),
    }
    stalls: Stalls = {}
    for number in range(ROUNDS):
        for name, contender in turns(contenders, number):
            for what, action in ((IDLE, lambda: time.sleep(1)), ("quiesced snapshot", contender.snapshot)):
                stalls.setdefault((what, name), []).append(rig.gap(name, action))
    shown = {"qmp": "snapchain --qmp", "libvirt": "snapchain --domain", "hand": "virsh"}
    assert not table(stalls, shown, theirs=["hand"])


def turns(contenders: Mapping[str, Contender], number: int) -> list[tuple[str, Contender]]:
    """All of them, each round another one first."""
    found = list(contenders.items())
    first = number % len(found)
    return found[first:] + found[:first]


def table(stalls: Stalls, shown: Mapping[str, str], *, theirs: list[str]) -> list[str]:
    """Print each contender's stalls, and return what takes longer by snapchain."""
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"\n\nlongest stall in ms, {ROUNDS} rounds, load {load}, QEMU {version()}")
    print(f"{'':24} {'by':28} {'least':>7} {'median':>7} {'most':>7}   ratios of least, median, most")
    noise = max(statistics.median(each) for (what, _), each in stalls.items() if what == IDLE)
    failed = []
    for what in dict.fromkeys(what for what, _ in stalls):
        for name, label in shown.items():
            if (what, name) not in stalls:
                continue
            found = Stall.of(stalls[what, name])
            line = f"{what:24} {label:28} {found.least * 1e3:7.1f} {found.median * 1e3:7.1f} {found.most * 1e3:7.1f}"
            others = [Stall.of(stalls[what, each]) for each in theirs if (what, each) in stalls]
            if name in theirs or what == IDLE:
                print(line)
                continue
            best = min(others, key=lambda each: each.median)
            ratios = [getattr(found, each) / getattr(best, each) for each in ("least", "median", "most")]
            is_longer = min(ratios[:2]) > TOLERANCE and found.median > best.median + noise
            print(f"{line}   {ratios[0]:.2f} {ratios[1]:.2f} {ratios[2]:.2f}  {'FAIL' if is_longer else 'pass'}")
            failed += [f"{what} by {label}"] if is_longer else []
    return failed


@dataclass(frozen=True)
class Stall:
    """Seconds."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, found: list[float]) -> Stall:
        return cls(min(found), statistics.median(found), max(found))


def version() -> str:
    from tests.guest.machine import QEMU

    said = subprocess.run([*QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    return said.partition("version ")[2].split()[0]
