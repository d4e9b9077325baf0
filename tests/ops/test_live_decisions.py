"""The pure decisions of a live migration: who has the guest, whether it may begin, and the command line over there."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from snapchain.errors import Conflict, Unsupported
from snapchain.guest.protocol import Definition
from snapchain.ops.migrate.live_check import MirrorWatch, check_destination, check_pause, uses_host_cpu
from snapchain.ops.migrate.live_settle import Verdict, judge
from snapchain.ops.restore.changed_definition import Changes, NewDisk
from snapchain.ops.restore.qemu_argv import change_for_incoming
from snapchain.ops.ship.request import ShipRequest
from snapchain.ops.sync.request import SyncRequest
from snapchain.replica.stream.guest_messages import Moving

THERE = Moving(directory="/run/snapchain/web1", alive=True, given=False, ran=False, clock=0.0)


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


def mirrored(left: list[int]) -> int:
    """How many rounds are watched. left: bytes at the end of each"""
    watch, done = MirrorWatch(subject="web1"), 0
    for number, each in enumerate(left):
        try:
            watch.look(done, done + each)
            watch.look(done + each // 2, done + each)  # in the middle of a round nothing is judged
        except Conflict:
            return number
        done += max(1, each)
    return len(left)


def test_mirrors_that_never_come_to_an_end_are_given_up() -> None:
    mib = 1 << 20
    assert mirrored([512 * mib >> number for number in range(30)]) == 30
    assert mirrored([64 * mib] * 30) == 6, "no progress"
    assert mirrored([64 * mib, 8 * mib, 4 * mib, 8 * mib, 40 * mib]) == 4, "growing"
    assert mirrored([64 * 1024] * 100) == 100, "a few clusters behind, all the time"
    assert mirrored([64 * 1024] * 1000) == 200, "but not for ever"


def test_a_host_with_another_machine() -> None:
    argv = ("qemu-system-x86_64", "-accel", "kvm", "-cpu", "host,+x", "-m", "64")
    here = Definition("qmp", "web1", None, "pc-q35-7.2", (), argv=argv)
    there = THERE.model_copy(update={"machine": "pc-q35-7.2", "version": "7.2", "cpu": "a", "free": 1000})

    def check(there: Moving, here: Definition = here) -> None:
        check_destination(there, here, version=(7, 2), cpu="a", bytes_left=1000, subject="ssh://kvm2/r")

    check(there)
    check(there.model_copy(update={"version": "10.0"}))
    for change, words in (
        ({"machine": "pc-q35-10.0"}, r"the machine type there is pc-q35-10\.0"),
        ({"version": "7.1"}, r"older than here \(7\.2\)"),
        ({"cpu": "b"}, "the other host has another one"),
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


@pytest.mark.parametrize(
    ("left", "predicted", "met"),
    [(100, None, True), (100, 99.0, True), (101, 99.0, False), (101, 9.0, True), (101, None, False)],
)
def test_a_small_rest_is_enough_whatever_the_rate(left: int, predicted: float | None, met: bool) -> None:
    """A rate over few bytes is mostly latency: it keeps no guest from moving."""
    send = ShipRequest(image=Path("web1.qcow2"), disk="web1/vda")
    assert SyncRequest(send=send, target_downtime=10, rest=100).is_met(left, predicted) is met
    assert SyncRequest(send=send, rest=100).is_met(left, predicted) is None
