"""The pure decisions of a live migration: who has the guest, whether it may begin, and the command line over there."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Conflict, Unsupported
from snapchain.guest.machine_view import differences
from snapchain.guest.protocol import Definition, GuestDisk, Layer
from snapchain.ops.migrate.live_check import (
    MemoryWatch,
    MirrorWatch,
    check_destination,
    check_pause,
    first_pause,
    uses_host_cpu,
)
from snapchain.ops.migrate.live_qmp import named_path
from snapchain.ops.migrate.live_settle import Verdict, judge
from snapchain.ops.restore.changed_definition import Changes, NewDisk
from snapchain.ops.restore.qemu_argv import IncomingCommand, change_for_incoming
from snapchain.ops.ship.request import ShipRequest
from snapchain.ops.sync.request import SyncRequest
from snapchain.replica.stream.guest_messages import Moving

MIB = 1 << 20
THERE = Moving(directory="/run/snapchain/web1", alive=True, given=False, ran=False, clock=0.0)


VIEW = {
    "device vda": "virtio-blk-pci",
    "number of processors": "2",
    "CPUID 0x1.0x0 ECX": "0x6",
    "medium in ide2-cd0": "/iso/a.iso",
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"CPUID 0x1.0x0 ECX": "0xf", "CPUID 0x7.0x0 EBX": "0x1", "medium in floppy0": "/b.img"}, ""),
        ({"CPUID 0x1.0x0 ECX": "0x5"}, r"the processors there lack features .*\(CPUID 0x1.0x0 ECX: 0x2\)"),
        ({"device vda": "virtio-scsi-pci"}, "device vda: virtio-scsi-pci there, and virtio-blk-pci here"),
        ({"device nic": "e1000"}, r"device nic \(e1000\) is there, and was unplugged here"),
        ({"number of processors": "4"}, "number of processors: 4 there, and 2 here"),
        ({"medium in ide2-cd0": "/iso/b.iso"}, "medium in ide2-cd0: /iso/b.iso there, and /iso/a.iso here"),
    ],
)
def test_what_a_guest_would_find_changed(change: dict[str, str], words: str) -> None:
    found = differences(VIEW, VIEW | change)
    assert len(found) == bool(words)
    assert not words or re.fullmatch(words, found[0])
    assert differences(VIEW, {key: value for key, value in VIEW.items() if key != "device vda"}) == [
        "device vda (virtio-blk-pci) is not there"
    ]


def everything() -> list[tuple[str, Moving | None, bool]]:
    """Each stage, each answer, and whether QEMU lives here."""
    answers: list[Moving | None] = [None]
    for directory, alive, given, ran in itertools.product(("", "/run/x"), *[(False, True)] * 3):
        answers.append(THERE.model_copy(update={"directory": directory, "alive": alive, "given": given, "ran": ran}))
    return list(itertools.product(("moving", "switching", "switched"), answers, (False, True)))


@pytest.mark.parametrize(("stage", "there", "runs_here"), everything())
def test_who_has_the_guest(stage: str, there: Moving | None, runs_here: bool) -> None:
    """It stays only where it can never have run there, and goes only where the destination has it or can have it."""
    verdict = judge(stage, there, runs_here=runs_here)
    if stage == "moving":
        assert verdict is Verdict.STAY
    elif stage == "switched":
        assert verdict is Verdict.MOVED
    elif there is None:
        assert verdict is Verdict.UNKNOWN
    elif there.given:
        may_have_run = there.ran or there.alive or not there.directory
        assert verdict is (Verdict.MOVED if may_have_run or not runs_here else Verdict.STAY)
    elif runs_here:
        assert verdict is Verdict.STAY
    else:
        assert verdict is (Verdict.COMPLETE if there.alive else Verdict.STAY)


@pytest.mark.parametrize(("stage", "there", "runs_here"), everything())
def test_who_has_a_guest_that_was_taken_over(stage: str, there: Moving | None, runs_here: bool) -> None:
    """Where the destination was never asked, the guest has run here all the time."""
    verdict = judge(stage, there, runs_here=runs_here, is_taken=True)
    plain = judge(stage, there, runs_here=runs_here)
    assert verdict is (Verdict.TAKEN if stage == "switching" and there is not None else plain)


def pause(**numbers: float | bool | None) -> float:
    given: dict[str, object] = {
        "max_downtime": 1.0, "switch": 0.16, "round_trip": 0.01,
        "dirty_rate": None, "link_rate": None, "auto_converge": False,
    }  # fmt: skip
    return check_pause(**(given | numbers), subject="web1")  # type: ignore[arg-type]


def test_a_pause_that_can_be_kept() -> None:
    assert pause() == pytest.approx(1.0 - 0.16)
    assert pause(dirty_rate=5e6, link_rate=1e7) == pause()
    assert pause(dirty_rate=5e7, link_rate=1e7, auto_converge=True) == pause()
    assert pause(dirty_rate=5e7) == pause()
    with pytest.raises(Conflict, match=r"switch alone takes about 1\.120 s \(0\.250 s for a question") as caught:
        pause(switch=1.12, round_trip=0.25)
    assert caught.value.hint == "allow more: --max-downtime 2.2"
    with pytest.raises(Conflict, match=r"dirties 47\.7 MiB/s of memory, and the link carries 9\.5 MiB/s"):
        pause(dirty_rate=5e7, link_rate=1e7)


def mirrored(left: list[int], *, must_be_level: bool = False) -> tuple[int, str]:
    """How many rounds are watched, and what they end with. left: bytes at the end of each"""
    watch, done = MirrorWatch(subject="web1", must_be_level=must_be_level), 0
    for number, each in enumerate(left):
        try:
            if watch.look(done, done + each) and not must_be_level:
                return number, "enough"
            assert not watch.look(done + each // 2, done + each), "in the middle of a round nothing is judged"
        except Conflict:
            return number, "given up"
        done += max(1, each)
    return len(left), "waits"


def test_mirrors_that_never_come_to_an_end_are_given_up() -> None:
    mib = 1 << 20
    assert mirrored([512 * mib >> number for number in range(19)]) == (19, "waits")
    assert mirrored([64 * mib] * 30) == (6, "given up"), "no progress"
    assert mirrored([64 * mib, 8 * mib, 4 * mib, 8 * mib, 40 * mib]) == (4, "given up"), "growing"
    assert mirrored([64 * 1024] * 100) == (19, "enough"), "a few clusters behind, all the time"
    assert mirrored([64 * 1024] * 1000, must_be_level=True) == (200, "given up")
    assert mirrored([64 * mib, 32 * mib, *[mib] * 30]) == (19, "enough")
    assert mirrored([64 * mib, 32 * mib, *[mib + 1] * 30]) == (8, "given up")


def test_a_host_with_another_machine() -> None:
    argv = ("qemu-system-x86_64", "-accel", "kvm", "-cpu", "host,+x", "-m", "64")
    here = Definition("qmp", "web1", None, "pc-q35-7.2", (), argv=argv)
    known = {"machine": "pc-q35-7.2", "version": "7.2", "view": VIEW, "cpu": "a", "free": 1000}
    there = THERE.model_copy(update=known)

    def check(there: Moving, here: Definition = here) -> None:
        check_destination(there, here, version=(7, 2), view=VIEW, cpu="a", bytes_left=1000, subject="ssh://kvm2/r")

    check(there)
    check(there.model_copy(update={"version": "10.0"}))
    for change, words in (
        ({"machine": "pc-q35-10.0"}, r"the machine type there is pc-q35-10\.0"),
        ({"version": "7.1"}, r"older than here \(7\.2\)"),
        ({"cpu": "b"}, "the other host has another one"),
        ({"view": {}}, "the guest would find another machine: .*device vda .virtio-blk-pci. is not there"),
    ):
        with pytest.raises(Unsupported, match=words):
            check(there.model_copy(update=change))
    with pytest.raises(Conflict, match="999 bytes are free there"):
        check(there.model_copy(update={"free": 999}))
    check(there.model_copy(update={"cpu": "b"}), replace(here, argv=("qemu", "-accel", "tcg", "-cpu", "max")))
    assert not uses_host_cpu(("qemu", "-accel", "kvm", "-cpu", "x86-64-v2"))


def test_the_command_line_over_there(tmp_path: Path) -> None:
    """Other disks and sockets; it waits for the guest, and for nobody else."""
    argv = [
        "/usr/bin/qemu-system-x86_64", "-M", "pc-q35-7.2", "-daemonize", "-S", "-incoming", "defer",
        "-qmp", "unix:/run/a/ops,server=on,wait=off", "-qmp", "unix:/run/a/mine,server=on",
        "-chardev", "socket,id=con,path=/run/a/con,server=on,wait=on", "-serial", "chardev:con",
        "-blockdev", "driver=qcow2,node-name=top,file.driver=file,file.filename=/img/web1.qcow2",
        "-device", "virtio-blk-pci,drive=top,id=vda",
    ]  # fmt: skip
    changes = Changes(
        disks={"vda": NewDisk(Path("/srv/vda-2.qcow2"), "qcow2")},
        old_paths={"vda": "/img/web1.1.qcow2"},
        directory=Path("/run/b"),
    )
    made = change_for_incoming(argv, changes, monitor=Path("/run/a/mine"), subject="web1")
    assert made.qmp == Path("/run/b/mine")
    assert made.lacking == ()
    line = " ".join(made.argv)
    assert made.argv[0] == "/usr/bin/qemu-system-x86_64"
    assert made.argv[-3:] == ("-S", "-incoming", "defer")
    assert line.count("-S ") == line.count("-incoming") == 1
    assert "daemonize" not in line
    assert "wait=on" not in line
    assert "unix:/run/b/mine,server=on,wait=off" in made.argv
    assert "id=con,path=/run/b/con,server=on,wait=off" in line
    assert "filename=/srv/vda-2.qcow2" in line
    assert "/img/" not in line
    assert change_for_incoming(argv, changes, monitor=Path("/a/proxy"), subject="web1").qmp == Path("/run/b/ops")
    with pytest.raises(Unsupported, match="no QMP socket"):
        change_for_incoming([argv[0]], changes, monitor=Path("/run/a/mine"), subject="web1")


def incoming(*words: str, **changes: Any) -> IncomingCommand:
    """The command over there of a guest with a monitor and these words."""
    argv = ["qemu-system-x86_64", "-qmp", "unix:/run/a/qmp,server=on,wait=off", *words]
    given = Changes(**{"disks": {}, "directory": Path("/run/b"), **changes})
    return change_for_incoming(argv, given, monitor=Path("/run/a/qmp"), subject="web1")


@pytest.mark.parametrize(
    "words",
    [
        ("-add-fd", "fd=3,set=2"),
        ("-netdev", "tap,id=n,fd=3"),
        ("-netdev", "tap,id=n,vhost=on,vhostfds=4:5"),
        ("-chardev", "socket,id=c,fd=7"),
    ],
)
def test_a_descriptor_that_qemu_has_got_is_nothing_over_there(words: tuple[str, str]) -> None:
    assert f"an open descriptor, which QEMU got at its start: {' '.join(words)}" in incoming(*words).lacking


def test_sockets_of_one_name_stay_apart_over_there() -> None:
    """The later one would take the monitor's place, and nobody could reach the guest."""
    made = incoming("-chardev", "socket,id=c,path=/run/c/qmp,server=on", "-serial", "unix:/run/d/qmp,server")
    assert made.qmp == Path("/run/b/qmp")
    assert [word for word in made.argv if "/run/b/" in word] == [
        "unix:/run/b/qmp,server=on,wait=off",
        "backend=socket,id=c,path=/run/b/2-qmp,server=on,wait=off",
        "unix:/run/b/3-qmp,server,wait=off",
    ]


@pytest.mark.parametrize("kind", ["tcp", "telnet"])
def test_no_socket_over_there_waits_for_a_client(kind: str) -> None:
    assert incoming("-serial", f"{kind}:localhost:4321,server").argv[4] == f"{kind}:localhost:4321,server,wait=off"


@pytest.mark.parametrize(
    "words",
    [
        ("-pflash", "/fw/vars.fd"),
        ("-drive", "if=pflash,format=raw,file=/fw/vars.fd"),
        ("-blockdev", "driver=file,node-name=pflash0,filename=/fw/vars.fd"),
    ],
)
def test_firmware_variables_over_there(words: tuple[str, str]) -> None:
    """Else the guest would write those of another guest, which has them under that path."""
    new = {"vars.fd": Path("/srv/web1.0.nvram")}
    made = incoming(*words, nvram=new)
    assert made.lacking == ()
    assert "/fw/" not in " ".join(made.argv)
    assert "/srv/web1.0.nvram" in made.argv[4]
    assert incoming(nvram=new).lacking == ("vars.fd is not in the command line; its file is /srv/web1.0.nvram",)


def test_a_disk_without_a_name_is_found_below_its_snapshots(tmp_path: Path) -> None:
    """QEMU was started on a layer that has become a lower one since."""
    argv = ("qemu", "-blockdev", "driver=qcow2,node-name=top,file.driver=file,file.filename=/img/web1.qcow2")
    chain = tuple(
        Layer(node, Path(f"/img/{name}"), None, "qcow2", 1 << 20)
        for node, name in (("base", "base.qcow2"), ("top", "web1.qcow2"), ("sc-1", "web1.1.qcow2"))
    )
    disk = GuestDisk("disk0", "sc-1", (), chain, read_only=False)
    assert named_path(argv, disk) == "/img/web1.qcow2"
    made = incoming(
        *argv[1:], disks={"disk0": NewDisk(Path("/b/2.qcow2"), "qcow2")}, old_paths={"disk0": "/img/web1.qcow2"}
    )
    assert made.lacking == ()
    assert "filename=/b/2.qcow2" in " ".join(made.argv)


@pytest.mark.parametrize(
    ("left", "predicted", "met"),
    [(100, None, True), (100, 99.0, True), (101, 99.0, False), (101, 9.0, True), (101, None, False)],
)
def test_a_small_rest_is_enough_whatever_the_rate(left: int, predicted: float | None, met: bool) -> None:
    """A rate over few bytes is mostly latency: it keeps no guest from moving."""
    send = ShipRequest(image=Path("web1.qcow2"), disk="web1/vda")
    assert SyncRequest(send=send, target_downtime=10, rest=100).is_met(left, predicted) is met
    assert SyncRequest(send=send, rest=100).is_met(left, predicted) is None


def test_the_pause_is_as_short_as_the_guest_allows() -> None:
    """The last part of the memory may take more only when a round has left hardly less than the one before."""
    allowed: list[float] = []
    watch = MemoryWatch(limit=2.0, max_downtime=2.5, auto_converge=False, subject="web1", allow=allowed.append)
    assert watch.allowed == first_pause(2.0) == 0.1
    assert first_pause(0.03) == 0.03
    for number, left in enumerate((800 * MIB, 400 * MIB, 200 * MIB, 100 * MIB), 1):
        watch.look(round=number, left=left, dirty_rate=0, rate=100 * MIB)
    assert allowed == [], "each round leaves half"
    watch.look(round=5, left=90 * MIB, dirty_rate=0, rate=100 * MIB)
    assert allowed == [pytest.approx(1.2 * 0.9)]
    watch.look(round=5, left=90 * MIB, dirty_rate=0, rate=100 * MIB)
    watch.look(round=6, left=89 * MIB, dirty_rate=0, rate=100 * MIB)
    watch.look(round=7, left=89 * MIB, dirty_rate=0, rate=100 * MIB)
    assert allowed[1:] == [2.0], "never over the limit, and told once"


def test_a_pause_is_allowed_soon_where_no_rate_is_known() -> None:
    allowed: list[float] = []
    watch = MemoryWatch(limit=0.5, max_downtime=1, auto_converge=True, subject="web1", allow=allowed.append)
    for number in range(2, 9):
        watch.look(round=number, left=50 * MIB, dirty_rate=0, rate=0)
    assert allowed == [0.2, 0.4, 0.5]
