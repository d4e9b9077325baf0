"""migrate of a running guest, by QMP, on one host: nothing lost, and one guest that runs, whoever dies when."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet

from snapchain.cli import main
from snapchain.errors import Conflict, InvalidInput, Unavailable
from snapchain.guest import journal
from snapchain.guest.qmp_migration import AUTO_CONVERGE, CAPABILITIES, Incoming, Outgoing
from snapchain.host import site_hooks
from snapchain.host.service_unit import Service
from snapchain.model import guest_state
from snapchain.model.guest_state import GuestChange, Transition
from snapchain.ops.migrate import live_qmp, live_settle
from snapchain.ops.migrate.live_request import (
    AbortPlan,
    AbortReport,
    InterruptedMove,
    LiveDisk,
    LiveDiskPlan,
    LivePlan,
    LiveReport,
    SettledMove,
)
from snapchain.replica import guest_server
from snapchain.replica.client import guest_at
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.guest_client import GuestMove
from snapchain.replica.guest_server import GuestArrival
from snapchain.replica.guest_store import read_standing, write_standing
from snapchain.replica.stream.guest_messages import MoveStep
from snapchain.source import ownership
from snapchain.source.notes import Notes
from tests.exhaustive import EXHAUSTIVE
from tests.guest.counting_guest import Counting, arrived, check_numbers, counts_on, run_directory
from tests.guest.machine import Monitor
from tests.guest.spy import DROP, KILL, Fault, Place, Spy, call, changing
from tests.pages import GUIDE, section
from tests.waiting import HANG, kill_process, wait_until

PATIENT = ("--max-downtime", "60")
"""A busy machine may need longer for each step than a guest would like."""
OURS = (*CAPABILITIES, AUTO_CONVERGE)


@pytest.fixture
def run() -> Iterator[Path]:
    with run_directory() as folder:
        yield folder


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Counting]:
    counting = Counting(tmp_path / "source")
    with counting.machine:
        yield counting


def snapchain(*words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    argv = [sys.executable, "-m", "snapchain", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=timeout, env=dict(os.environ))


def migrate(qmp: Path, replica: Path, *options: object) -> dict[str, Any]:
    """The report of a migration that succeeds."""
    done = snapchain("migrate", "--qmp", qmp, f"dir:{replica}", "--json", *PATIENT, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def images(report: dict[str, Any]) -> list[Path]:
    return [Path(disk["overlay"]) for disk in report["disks"]]


def quit_and_check(monitor: Monitor, tops: list[Path]) -> int:
    """End a guest as its operator does; the newest number on its disks."""
    monitor.quit()
    for top in tops:
        done = subprocess.run(["qemu-img", "check", "-q", str(top)], check=False)
        assert done.returncode == 0, top
    return check_numbers(tops)


@pytest.mark.sampled
def test_a_guest_moves_there_and_back(guest: Counting, run: Path, tmp_path: Path) -> None:
    """Counter without a gap on three disks; the QEMU that it left has ended, and its files are read-only."""
    tops = list(guest.disks.values())
    qmp = guest.machine.qmp
    for turn, place in enumerate(("b", "a", "b", "a") * 8 if EXHAUSTIVE else ("b", "a")):
        report = migrate(qmp, tmp_path / place)
        assert report["pause_within"], report
        assert [disk["epoch"] for disk in report["disks"]] == [turn + 2] * 3
        if turn == 0:
            assert guest.machine.process.wait(HANG) == 0
        assert len(arrived(run)) == 1
        assert not any(Path(path).stat().st_mode & 0o222 for disk in report["disks"] for path in disk["fenced"])
        tops, qmp = images(report), Path(report["qmp"])
        assert not journal.find()[0]
    monitor = Monitor(qmp)
    assert counts_on(monitor)
    assert monitor.ask("query-jobs") == []
    quit_and_check(monitor, tops)


# --- Whoever dies: one guest that runs, nothing lost, nothing left.

FIRST, SWITCH, LAST = 4, 17, 18
"""The changing commands of a run, after the rounds. SWITCH: the last one before the decision; LAST: of all."""
SENT = {
    5: "blockdev-add",
    6: "blockdev-mirror",
    13: "migrate",
    14: "block-job-cancel",
    SWITCH: "migrate-continue",
    LAST: "quit",
}
KILLED = {(SWITCH, Place.SENT), (LAST, Place.BEFORE)}
DEAD_SOURCE: set[tuple[int, Place]] = set()
DEAD_DESTINATION = {(SWITCH, Place.SENT)}
CUT = {(13, Place.SENT)}


def cases(sampled: set[tuple[int, Place]]) -> list[ParameterSet]:
    """Each command, before QEMU has it and after it is done; all but the sampled ones for `make soak`."""
    return [
        pytest.param(number, place, marks=() if (number, place) in sampled else pytest.mark.soak)
        for number in range(FIRST, LAST + 1)
        for place in (Place.BEFORE, Place.SENT)
    ]


def main_in_child(words: Sequence[object]) -> int:
    """A command in a child that can be killed; its status as `os.waitpid` has it. A fork saves it the loading."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os._exit(main([str(word) for word in words]))
        finally:
            os._exit(99)
    return os.waitpid(pid, 0)[1]


def migrating(qmp: Path, replica: Path, *options: object) -> int:
    """See `main_in_child`."""
    return main_in_child(["migrate", "--qmp", qmp, f"dir:{replica}", "--json", *PATIENT, *options])


def refused(qmp: Path, replica: Path, *options: object) -> dict[str, Any]:
    """The error of a migration that is refused."""
    done = snapchain("migrate", "--qmp", qmp, f"dir:{replica}", "--json", *options)
    assert done.returncode != 0, done.stdout
    error: dict[str, Any] = json.loads(done.stdout)["error"]
    return error


def unfinished() -> list[str]:
    return [each.record.operation for each in journal.find()[0] if each.record.operation in ("migration", "incoming")]


def runs_where(guest: Counting, run: Path) -> str:
    """Where the guest runs, after all is settled; asserts that it is in one place, and counts on there."""
    there = [Monitor(path) for path in run.glob("snapchain/web1-*/qmp") if arrived(run)]
    here = [guest.machine.monitor] if guest.machine.process.poll() is None else []
    running = [each for each in (*here, *there) if each.ask("query-status")["status"] == "running"]
    assert len(running) == 1, f"{len(running)} guests run"
    assert counts_on(running[0])
    for each in there:
        each.close()
    return "here" if running[0] in here else "there"


def check_here(guest: Counting, run: Path, replica: Path) -> None:
    """The guest runs here, as if nothing had been."""
    machine = guest.machine
    assert machine.ask("query-jobs") == []
    nodes = [node["node-name"] for node in machine.ask("query-named-block-nodes", flat=True)]
    assert not [name for name in nodes if name.startswith("sc-move-")]
    assert not [row for row in machine.ask("query-migrate-capabilities") if row["state"] and row["capability"] in OURS]
    limits = machine.ask("query-migrate-parameters")
    assert (limits["max-bandwidth"], limits["downtime-limit"]) == (128 << 20, 300), "QEMU's own"
    assert arrived(run) == []
    assert list(run.glob("snapchain/*")) == []
    assert list(replica.glob("*/active/*.qcow2")) == []
    assert all(top.stat().st_mode & 0o200 for top in guest.tops)
    machine.quit()
    check_numbers(guest.tops)


def check_there(guest: Counting, run: Path, replica: Path) -> None:
    """The guest runs there, and nothing here can write its disks."""
    assert guest.machine.process.wait(HANG) is not None
    assert not any(path.stat().st_mode & 0o222 for path in guest.folder.glob("images/*.qcow2"))
    (qmp,) = run.glob("snapchain/web1-*/qmp")
    monitor = Monitor(qmp)
    assert monitor.ask("query-block-exports") == []
    quit_and_check(monitor, sorted(replica.glob("*/active/*.qcow2")))


def check_settled(guest: Counting, run: Path, replica: Path) -> str:
    """All is settled by whoever lives; where the guest runs."""
    wait_until(lambda: not unfinished())
    where = runs_where(guest, run)
    (check_here if where == "here" else check_there)(guest, run, replica)
    return where


def test_a_whole_run_has_these_commands(guest: Counting, run: Path, tmp_path: Path) -> None:
    """So that the enumerations below are whole. The bytes of the guest's disks are mirrored before it is paused."""
    with Spy(tmp_path / "spy", guest.machine.qmp, counts=changing) as spy:
        assert migrating(spy.path, tmp_path / "b") == 0
        sent = [each.name for each in spy.commands if each.number is not None]
        spy.check()
    assert len(sent) == LAST + 1, sent
    assert {number: sent[number] for number in SENT} == SENT
    assert check_settled(guest, run, tmp_path / "b") == "there"


@pytest.mark.parametrize(("number", "place"), cases(KILLED))
def test_snapchain_is_killed(guest: Counting, run: Path, tmp_path: Path, number: int, place: Place) -> None:
    """And with it, here, the process of the destination. The watchdog settles it by itself."""
    with Spy(tmp_path / "spy", guest.machine.qmp, Fault(number, place, KILL), counts=changing) as spy:
        assert os.WTERMSIG(migrating(spy.path, tmp_path / "b")) == signal.SIGKILL
        assert spy.happened
        where = check_settled(guest, run, tmp_path / "b")
    assert where == ("there" if number >= LAST else "here")


@pytest.mark.parametrize(("number", "place"), cases(CUT))
def test_the_monitor_is_cut(guest: Counting, run: Path, tmp_path: Path, number: int, place: Place) -> None:
    """It may end well or not; then the guest goes on here."""
    with Spy(tmp_path / "spy", guest.machine.qmp, Fault(number, place, DROP), counts=changing) as spy:
        status = migrating(spy.path, tmp_path / "b")
        assert spy.happened
        where = check_settled(guest, run, tmp_path / "b")
    assert (os.waitstatus_to_exitcode(status) == 0) == (where == "there")


@pytest.mark.parametrize(("number", "place"), cases(DEAD_DESTINATION))
def test_qemu_dies_at_the_destination(guest: Counting, run: Path, tmp_path: Path, number: int, place: Place) -> None:
    """Up to the switch the guest goes on here."""

    def kill() -> None:
        for pid in arrived(run):
            kill_process(pid)

    with Spy(tmp_path / "spy", guest.machine.qmp, Fault(number, place, call(kill)), counts=changing) as spy:
        status = os.waitstatus_to_exitcode(migrating(spy.path, tmp_path / "b"))
        assert spy.happened
        assert (status == 0) == (number >= LAST)
        wait_until(lambda: number >= LAST or not unfinished())
        if number >= LAST:  # it ran at the destination, and crashed there: its disks are whole
            assert guest.machine.process.wait(HANG) is not None
            check_numbers(sorted((tmp_path / "b").glob("*/active/*.qcow2")))
            return
        assert check_settled(guest, run, tmp_path / "b") == "here"


@pytest.mark.parametrize(("number", "place"), cases(DEAD_SOURCE))
def test_qemu_dies_here(guest: Counting, run: Path, tmp_path: Path, number: int, place: Place) -> None:
    """Its disks are whole, here before the switch, and there after it; there is one host that may write them."""

    def kill() -> None:
        guest.machine.process.kill()
        guest.machine.process.wait()

    with Spy(tmp_path / "spy", guest.machine.qmp, Fault(number, place, call(kill)), counts=changing) as spy:
        status = os.waitstatus_to_exitcode(migrating(spy.path, tmp_path / "b"))
        assert spy.happened
        wait_until(lambda: not unfinished())
    if number >= LAST:
        assert status == 0
        check_there(guest, run, tmp_path / "b")
        return
    assert status != 0
    assert arrived(run) == []
    assert all(top.stat().st_mode & 0o200 for top in guest.tops)
    check_numbers(guest.tops)


POINTS: dict[str, tuple[Any, str, Any]] = {
    "spawned": (guest_server, "start_program", 1),
    "marked": (ownership, "fence", 2),
    "given": (GuestMove, "step", MoveStep.GIVE_AND_RUN),
    "switching": (live_settle, "restaged", "switching"),
    "followed": (GuestArrival, "_follow", 1),
    "runs": (Incoming, "run", 1),
    "switched": (live_settle, "restaged", "switched"),
    "ended here": (live_settle, "end_source", 1),
    "fenced": (live_settle, "fence_all", 1),
}
"""What happens around the decision, beside the monitor: a function, and its which call, or an argument of it."""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "point", [pytest.param(each, marks=() if each == "given" else pytest.mark.soak) for each in POINTS]
)
def test_snapchain_is_killed_around_the_decision(
    guest: Counting, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, after: bool
) -> None:
    """Before the destination has it, it stays here; after that it goes there; in both cases it runs on by itself."""
    place, name, which = POINTS[point]
    real, seen = getattr(place, name), [0]

    def dying(*arguments: Any, **named: Any) -> Any:
        seen[0] += 1
        is_it = seen[0] == which or which in arguments
        if is_it and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = real(*arguments, **named)
        if is_it and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(place, name, dying)
        assert os.WTERMSIG(migrating(guest.machine.qmp, tmp_path / "b")) == signal.SIGKILL
    stays = point in ("spawned", "switching", "marked") or (point == "given" and not after)
    assert check_settled(guest, run, tmp_path / "b") == ("here" if stays else "there")


# --- What is refused, and what an operator meets.


def test_a_pause_that_cannot_be_kept_is_refused_with_the_figures(guest: Counting, run: Path, tmp_path: Path) -> None:
    error = refused(guest.machine.qmp, tmp_path / "b", "--max-downtime", "0.005")
    assert error["kind"] == "conflict"
    assert "the switch alone takes about 0." in error["message"]
    assert check_settled(guest, run, tmp_path / "b") == "here"


def test_what_keeps_a_guest_from_moving(guest: Counting, run: Path, tmp_path: Path) -> None:
    """A paused one, and one in which another program works; nothing is started or sent."""
    machine = guest.machine
    machine.ask("stop")
    assert "not running" in refused(machine.qmp, tmp_path / "b")["message"]
    machine.ask("cont")
    machine.ask("blockdev-add", driver="null-co", **{"node-name": "sink", "size": 4 << 20})
    machine.ask("blockdev-backup", **{"job-id": "theirs", "device": "vda-top", "target": "sink", "sync": "none"})
    error = refused(machine.qmp, tmp_path / "b")
    assert (error["kind"], "theirs" in error["message"]) == ("busy", True)
    assert not (tmp_path / "b").exists()


def test_a_qemu_that_systemd_would_start_again_is_refused(
    guest: Counting, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def service(pid: int) -> Service:
        asked.append(pid)
        return Service("web1.service", "always")

    monkeypatch.setattr(live_qmp, "service_of", service)
    status = main(["migrate", "--qmp", str(guest.machine.qmp), f"dir:{tmp_path / 'b'}", "--dry-run", "--json"])
    error = json.loads(capfd.readouterr().out)["error"]
    assert status != 0
    assert "web1.service, which systemd may start again when it ends (Restart=always)" in error["message"]
    assert asked == [guest.machine.process.pid]


def test_a_destination_that_cannot_start_it(guest: Counting, run: Path, tmp_path: Path) -> None:
    """The words of its QEMU are told, and the guest was never paused."""
    error = refused(
        guest.machine.qmp, tmp_path / "b", *PATIENT, "--start-command", "qemu-system-x86_64 -machine nonsense"
    )
    assert "unsupported machine type" in error["message"]
    assert check_settled(guest, run, tmp_path / "b") == "here"


@pytest.mark.soak
def test_a_machine_that_was_changed_since_its_start(run: Path, tmp_path: Path) -> None:
    """A device was plugged in, one unplugged, and the processors there lack a feature: found before any memory goes."""
    guest = Counting(tmp_path / "source", argv=["-device", "pcie-root-port,id=rp", "-device", "virtio-rng-pci"])
    with guest.machine:
        guest.machine.ask("device_add", driver="virtio-rng-pci", id="rng0", bus="rp")
        words = [word for word in guest.machine.argv[3:] if "qmp" not in word and word != "-qmp"]
        line = " ".join(f"'{word}'" for word in [*words, "-device", "virtio-serial-pci,id=ser", "-cpu", "qemu64,-cx16"])
        for disk, number in (("vda", 1), ("vdb", 2), ("vdc", 3)):
            line = line.replace(str(guest.disks[disk]), f"'\"$SNAPCHAIN_OVERLAY_{number}\"'")
        script = tmp_path / "start"
        script.write_text(f'#!/bin/sh\nexec {line} -qmp "unix:$SNAPCHAIN_QMP,server=on,wait=off" -S -incoming defer\n')
        script.chmod(0o755)
        error = refused(guest.machine.qmp, tmp_path / "b", *PATIENT, "--start-command", script)
        assert error["kind"] == "unsupported"
        for found in (
            r"the processors there lack features that the guest has here \(CPUID 0x1.0x0 ECX: 0x2000\)",
            r"device rng0 \(virtio-rng-pci\) is not there",
            r"device ser \(virtio-serial-pci\) is there, and was unplugged here",
        ):
            assert re.search(found, error["message"]), error["message"]
        assert check_settled(guest, run, tmp_path / "b") == "here"


def test_hooks_and_a_command_of_ones_own(guest: Counting, run: Path, tmp_path: Path) -> None:
    """The command gets the overlays and the monitor in its environment."""
    words = [word for word in guest.machine.argv[3:] if "qmp" not in word and word != "-qmp"]
    line = " ".join(f"'{word}'" for word in words)
    for disk, number in (("vda", 1), ("vdb", 2), ("vdc", 3)):
        line = line.replace(str(guest.disks[disk]), f"'\"$SNAPCHAIN_OVERLAY_{number}\"'")
    script = tmp_path / "start"
    script.write_text(f'#!/bin/sh\nexec {line} -qmp "unix:$SNAPCHAIN_QMP,server=on,wait=off" -S -incoming defer\n')
    script.chmod(0o755)
    hooks = [tmp_path / "before", tmp_path / "after"]
    for hook in hooks:
        hook.write_text(f'#!/bin/sh\necho "$SNAPCHAIN_HOOK $SNAPCHAIN_GUEST $SNAPCHAIN_PAUSE" > {hook}.said\n')
        hook.chmod(0o755)
    report = migrate(
        guest.machine.qmp, tmp_path / "b", "--start-command", script, "--before", hooks[0], "--after", hooks[1]
    )
    assert report["qmp"].endswith("/qmp")
    assert (tmp_path / "before.said").read_text() == "before web1 \n"
    assert (tmp_path / "after.said").read_text() == f"after web1 {report['pause']}\n"
    assert check_settled(guest, run, tmp_path / "b") == "there"


def test_ctrl_c_lets_it_go_on_here(guest: Counting, run: Path, tmp_path: Path) -> None:
    """At the command that begins to send the memory."""
    with Spy(tmp_path / "spy", guest.machine.qmp, Fault(13, Place.SENT, _interrupt), counts=changing) as spy:
        status = os.waitstatus_to_exitcode(migrating(spy.path, tmp_path / "b"))
        assert spy.happened
        assert status == 130
        assert check_settled(guest, run, tmp_path / "b") == "here"


def _interrupt(link: Any) -> bool:
    os.kill(link.client_pid, signal.SIGINT)
    return True


def test_a_qemu_that_has_got_the_guest_and_died_is_not_given_it(
    guest: Counting, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between `completed` and the record: the guest here has its memory still, and goes on."""
    real = GuestMove.step

    def killing(move: GuestMove, step: MoveStep, **named: Any) -> Any:
        if step is MoveStep.GIVE_AND_RUN:
            wait_until(lambda: guest.machine.status() == "postmigrate")
            for pid in arrived(run):
                kill_process(pid)  # until it has ended it has the disk open
        return real(move, step, **named)

    with monkeypatch.context() as patch:
        patch.setattr(GuestMove, "step", killing)
        assert os.waitstatus_to_exitcode(migrating(guest.machine.qmp, tmp_path / "b")) == Conflict.exit_code
    assert check_settled(guest, run, tmp_path / "b") == "here"


@pytest.mark.parametrize("when", ["decided", pytest.param("running", marks=pytest.mark.soak)])
def test_a_qemu_that_dies_before_it_runs_the_guest_that_it_was_given(
    guest: Counting, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Between the record and `cont`: the guest here has its memory still, and goes on, in a later epoch."""
    place, name = {"decided": (GuestArrival, "_follow"), "running": (Incoming, "run")}[when]
    real = getattr(place, name)

    def killing(*arguments: Any, **named: Any) -> Any:
        for pid in arrived(run):
            kill_process(pid)
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, killing)
        assert os.waitstatus_to_exitcode(migrating(guest.machine.qmp, tmp_path / "b")) != 0
    if when == "running":  # it may have run there
        assert guest.machine.process.wait(HANG) is not None
        assert not any(path.stat().st_mode & 0o222 for path in guest.folder.glob("images/*.qcow2"))
        check_numbers(sorted((tmp_path / "b").glob("*/active/*.qcow2")))
        return
    assert check_settled(guest, run, tmp_path / "b") == "here"
    assert [read_standing(tmp_path / "b", "web1").epoch] == [3]  # type: ignore[union-attr]


def test_a_switch_that_fails_before_the_question_needs_no_answer(
    guest: Counting, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record says "switching" by then, and the tops are marked: both are taken back, and nobody is asked."""

    def failing(_outgoing: Outgoing, *, seconds: float) -> None:
        wait_until(lambda: not any(top.stat().st_mode & 0o200 for top in guest.tops))
        raise Unavailable(f"not within {seconds:g} seconds")

    with monkeypatch.context() as patch:
        patch.setattr(Outgoing, "switch_over", failing)
        patch.setattr(live_settle._End, "ask", lambda *_: os._exit(98))
        assert os.waitstatus_to_exitcode(migrating(guest.machine.qmp, tmp_path / "b")) == Unavailable.exit_code
    assert check_settled(guest, run, tmp_path / "b") == "here"


@pytest.mark.soak
def test_memory_that_is_lost_on_both_hosts_leaves_the_disks_here(
    guest: Counting, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes here are killed while the mirrors drain, and the QEMU there has not got the whole guest."""

    def dying(_outgoing: Outgoing, *, seconds: float) -> None:
        wait_until(lambda: not any(top.stat().st_mode & 0o200 for top in guest.tops))
        kill_watchdog()
        os.kill(guest.machine.process.pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(Outgoing, "end_mirrors", dying)
        assert os.WTERMSIG(migrating(guest.machine.qmp, tmp_path / "b")) == signal.SIGKILL
    guest.machine.process.wait(HANG)
    done = snapchain("migrate", "--qmp", guest.machine.qmp, "--abort", "--json")
    assert [each["moved"] for each in json.loads(done.stdout)["settled"]] == [False], done.stdout
    assert arrived(run) == []
    assert not unfinished()
    assert all(top.stat().st_mode & 0o200 for top in guest.tops)
    check_numbers(guest.tops)


def kill_watchdog() -> None:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes()
            if b"live_watchdog" in words and os.fsencode(journal.directory()) in words:
                os.kill(int(process.name), signal.SIGKILL)


@pytest.mark.parametrize("how", ["abort", pytest.param("doctor", marks=pytest.mark.soak)])
def test_the_record_is_enough(guest: Counting, run: Path, tmp_path: Path, how: str) -> None:
    """snapchain and its watchdog are killed: --abort here, or doctor, ends it."""

    def kill_both(link: Any) -> bool:
        kill_watchdog()
        return KILL(link)

    with Spy(tmp_path / "spy", guest.machine.qmp, Fault(SWITCH, Place.SENT, kill_both), counts=changing) as spy:
        assert os.WTERMSIG(migrating(spy.path, tmp_path / "b")) == signal.SIGKILL
        assert sorted(unfinished()) == ["incoming", "migration"]
        wait_until(lambda: guest.machine.status() == "postmigrate")
        alias = tmp_path / "alias"
        alias.symlink_to(spy.path.parent)
        words = ["migrate", "--qmp", alias / spy.path.name, "--abort"]
        if how == "abort":
            assert os.waitstatus_to_exitcode(main_in_child([*words, "--dry-run"])) == 0
            assert sorted(unfinished()) == ["incoming", "migration"]
            wait_until(lambda: guest.machine.status() == "postmigrate")
        words = words if how == "abort" else ["doctor", "--qmp", spy.path]
        done = snapchain(*words, "--json")
        assert done.returncode == 0, done.stdout
        if how == "abort":
            assert [each["moved"] for each in json.loads(done.stdout)["settled"]] == [False]
        assert check_settled(guest, run, tmp_path / "b") == "here"


@pytest.mark.parametrize("given", [pytest.param(False, marks=pytest.mark.soak), True])
def test_a_destination_that_is_away_is_no_answer(
    guest: Counting, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    """Such as one whose filesystem is not mounted. The guest waits; a person may vouch for a host that is gone."""
    real = GuestMove.step

    def dying(move: GuestMove, step: MoveStep, **named: Any) -> Any:
        answer = None if step is MoveStep.GIVE_AND_RUN and not given else real(move, step, **named)
        if step is MoveStep.GIVE_AND_RUN:
            kill_watchdog()
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(GuestMove, "step", dying)
        assert os.WTERMSIG(migrating(guest.machine.qmp, tmp_path / "b")) == signal.SIGKILL
    (tmp_path / "b").rename(tmp_path / "away")
    abort = ["migrate", "--qmp", guest.machine.qmp, "--abort", "--json"]
    done = snapchain(*abort)
    assert done.returncode == 7, done.stdout
    assert "only it knows whether it has the guest" in json.loads(done.stdout)["error"]["message"]
    wait_until(lambda: guest.machine.status() == "postmigrate")
    if given:
        (tmp_path / "away").rename(tmp_path / "b")
        change_guest(tmp_path / "b", Transition.RETURN)  # as `fence` records here: its destination has it all the same
        assert [each["moved"] for each in json.loads(snapchain(*abort).stdout)["settled"]] == [True]
        assert check_settled(guest, run, tmp_path / "b") == "there"
        return
    done = snapchain(*abort, "--destination-is-gone")
    assert [each["moved"] for each in json.loads(done.stdout)["settled"]] == [False]
    assert counts_on(guest.machine.monitor)
    assert all(top.stat().st_mode & 0o200 for top in guest.tops)
    guest.machine.quit()
    check_numbers(guest.tops)


def change_guest(replica: Path, transition: Transition, **fields: Any) -> None:
    """As another command that is run meanwhile."""
    endpoint = DirectoryEndpoint(replica)
    now, _ = guest_at(endpoint, "web1")
    step = {"transition": transition, "seen": now.number, "seen_epoch": now.epoch, "by": "kvm3", "host": "kvm3"}
    guest_at(endpoint, "web1", GuestChange.model_validate({"guest": "web1", "token": now.token, **step, **fields}))


@pytest.mark.soak
def test_a_guest_that_was_taken_over_meanwhile_goes_on_nowhere_here(
    guest: Counting, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is paused here, undecided, when a failover elsewhere takes it over: only its end is left to it here."""

    def dying(_move: GuestMove, step: MoveStep, **named: Any) -> Any:
        if step is MoveStep.GIVE_AND_RUN:
            kill_watchdog()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(_move, step, **named)

    real = GuestMove.step
    with monkeypatch.context() as patch:
        patch.setattr(GuestMove, "step", dying)
        assert os.WTERMSIG(migrating(guest.machine.qmp, tmp_path / "b")) == signal.SIGKILL
    there = guest_state.Place(id="of-kvm3", url="ssh://kvm3/srv/replica")
    change_guest(tmp_path / "b", Transition.FOLLOW, token="3" * 32, epoch=2, former="kvm1", at=there)
    abort = ["migrate", "--qmp", guest.machine.qmp, "--abort", "--json"]
    done = snapchain(*abort)
    assert done.returncode == Conflict.exit_code, done.stdout
    error = json.loads(done.stdout)["error"]
    assert re.search("kvm3 has taken the guest web1 over .*; here it is still paused", error["message"])
    wait_until(lambda: guest.machine.status() == "postmigrate")
    guest.machine.quit()
    (settled,) = json.loads(snapchain(*abort).stdout)["settled"]
    assert settled["moved"]
    assert "kvm3 has taken the guest web1 over" in settled["says"]
    for top in guest.tops:
        given = Notes().of(top).given
        assert given is not None
        assert given.taken_over
        assert not top.stat().st_mode & 0o222
    assert arrived(run) == []
    assert not unfinished()


@pytest.mark.soak
def test_a_destination_that_has_just_heard_of_a_failover_takes_no_guest(
    guest: Counting, run: Path, tmp_path: Path
) -> None:
    """It was killed between its record and its disks, which still are in the epoch before."""
    refused(guest.machine.qmp, tmp_path / "b", "--max-downtime", "0.005")
    now, _ = guest_at(DirectoryEndpoint(tmp_path / "b"), "web1")
    there = guest_state.Place(id="of-kvm3", url="ssh://kvm3/srv/replica")
    taken = {"number": now.number + 1, "epoch": 2, "master": "kvm3", "token": "3" * 32, "at": there}
    write_standing(tmp_path / "b", now.model_copy(update=taken))
    error = refused(guest.machine.qmp, tmp_path / "b", *PATIENT, "--without", there.url)
    assert "kvm3 has taken the guest web1 over" in error["message"]
    assert counts_on(guest.machine.monitor)


# --- What goes along.


def bios(folder: Path) -> Path:
    """Its firmware as flash memory."""
    path = folder / "code.fd"
    path.write_bytes(Path("/usr/share/seabios/bios-256k.bin").read_bytes())
    return path


@pytest.mark.parametrize("ends", ["there", pytest.param("here", marks=pytest.mark.soak)])
def test_firmware_variables_go_along(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    """To a file at the destination, which is gone where the move is given up."""
    variables = tmp_path / "vars.fd"
    content = b"SecureBoot=1".ljust(128 << 10, b"\xff")
    variables.write_bytes(content)
    flash = [
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={bios(tmp_path)}"),
        *("-drive", f"if=pflash,unit=1,format=raw,file={variables}"),
    ]
    guest = Counting(tmp_path / "source", argv=flash)
    with guest.machine:
        if ends == "here":
            with monkeypatch.context() as patch:
                patch.setattr(Outgoing, "end_mirrors", lambda *_, **__: _fail())
                assert os.waitstatus_to_exitcode(migrating(guest.machine.qmp, tmp_path / "b")) != 0
            assert check_settled(guest, run, tmp_path / "b") == "here"
            assert not list((tmp_path / "b").glob(".guests/*.nvram"))
            return
        report = migrate(guest.machine.qmp, tmp_path / "b")
    (there,) = (tmp_path / "b").glob(".guests/*.nvram")
    monitor = Monitor(Path(report["qmp"]))
    (flash_there,) = [row["inserted"]["file"] for row in monitor.ask("query-block") if row["device"] == "pflash1"]
    assert flash_there == str(there)
    quit_and_check(monitor, images(report))
    assert there.read_bytes() == content


def _fail() -> None:
    raise Unavailable("not now")


def test_variables_in_a_qcow2_file_are_refused(run: Path, tmp_path: Path) -> None:
    variables = tmp_path / "vars.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", variables, "128k"], check=True)
    flash = [
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={bios(tmp_path)}"),
        *("-drive", f"if=pflash,unit=1,format=qcow2,file={variables}"),
    ]
    guest = Counting(tmp_path / "source", argv=flash)
    with guest.machine:
        assert "only a raw one is taken along" in refused(guest.machine.qmp, tmp_path / "b")["message"]


@pytest.mark.parametrize("fails", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_the_hooks_of_the_destination(
    guest: Counting, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """By the configuration of that host, before QEMU is started there and after the guest runs; in their order."""
    folder, said = tmp_path / "arrival.d", tmp_path / "said"
    folder.mkdir()
    for name, end in (("10-firewall", "true"), ("20-dns", "false" if fails else "true")):
        hook = folder / name
        hook.write_text(f'#!/bin/sh\necho {name} "$1" "$SNAPCHAIN_GUEST" "$SNAPCHAIN_DISKS" >>{said}\n{end}\n')
        hook.chmod(0o755)
    (folder / "README").write_text("no program")
    with monkeypatch.context() as patch:
        patch.setattr(site_hooks, "ARRIVAL", folder)
        status = os.waitstatus_to_exitcode(migrating(guest.machine.qmp, tmp_path / "b"))
    lines = [f"{name} {{}} web1 3" for name in ("10-firewall", "20-dns")]
    seen = said.read_text().splitlines()
    if fails:
        assert status != 0
        assert seen == [*(line.format("before") for line in lines), lines[0].format("aborted"), *seen[3:]]
        assert check_settled(guest, run, tmp_path / "b") == "here"
        return
    assert status == 0
    assert seen == [line.format(when) for when in ("before", "after") for line in lines]
    assert check_settled(guest, run, tmp_path / "b") == "there"


@pytest.mark.soak
def test_a_hook_that_others_may_write_is_not_run(
    guest: Counting, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "arrival.d"
    folder.mkdir()
    hook = folder / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    hook.chmod(0o777)
    with monkeypatch.context() as patch:
        patch.setattr(site_hooks, "ARRIVAL", folder)
        assert os.waitstatus_to_exitcode(migrating(guest.machine.qmp, tmp_path / "b")) == InvalidInput.exit_code
    assert not (tmp_path / "ran").exists()
    assert check_settled(guest, run, tmp_path / "b") == "here"


def test_bitmaps_that_stay_are_told_beforehand(guest: Counting, run: Path, tmp_path: Path) -> None:
    guest.machine.ask("block-dirty-bitmap-add", node="vda-top", name="theirs", persistent=True)
    done = snapchain("migrate", "--qmp", guest.machine.qmp, f"dir:{tmp_path / 'b'}", "--dry-run")
    assert "its dirty bitmaps (theirs) stay with the layers" in " ".join(done.stderr.split()), done.stderr


@pytest.mark.soak
def test_clocks_that_differ_are_told(
    guest: Counting, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the pause is measured right all the same."""
    real = GuestArrival._standing

    def ahead(arrival: GuestArrival, begun: float) -> Any:
        answer = real(arrival, begun)
        resumed = None if answer.resumed is None else answer.resumed + 3600
        return answer.model_copy(update={"clock": answer.clock + 3600, "resumed": resumed})

    with monkeypatch.context() as patch:
        patch.setattr(GuestArrival, "_standing", ahead)
        assert os.waitstatus_to_exitcode(migrating(guest.machine.qmp, tmp_path / "b")) == 0
    out, error = capfd.readouterr()
    report = json.loads(out)
    assert re.search(r"its clock is 3600\.\d s ahead of the clock here", error)
    assert report["clock_ahead"] == pytest.approx(3600, abs=5)
    assert report["pause_within"]
    assert check_settled(guest, run, tmp_path / "b") == "there"


def test_the_json_fields_are_those_that_are_documented() -> None:
    page = section((GUIDE / "scripting.md").read_text(), "`migrate` of a running guest")
    table, _, rest = page.partition("Plan:")
    told = {name.removesuffix("[]") for name in re.findall(r"`([a-z_.\[\]]+)`", "".join(_first_columns(table)))}
    fields = {f"disks[].{name}" for name in LiveDisk.model_fields} | (LiveReport.model_fields.keys() - {"disks"})
    assert told == fields
    plan, _, aborted = rest.partition("Of `--abort`")
    assert set(re.findall(r"`([a-z_]+)`", plan)) == {*LivePlan.model_fields, *LiveDiskPlan.model_fields}
    reported = {*AbortReport.model_fields, *SettledMove.model_fields}
    planned = {*AbortPlan.model_fields, *InterruptedMove.model_fields}
    assert set(re.findall(r"`([a-z_]+)`", aborted)) == reported | planned


def _first_columns(table: str) -> Iterator[str]:
    return (row.split("|")[1] for row in table.splitlines() if row.startswith("| `"))
