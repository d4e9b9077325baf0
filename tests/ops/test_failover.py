"""Failover from each kind of destination: the right point, proof before anything, one master, and it goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from snapchain.cli import main
from snapchain.destination.protocol import Destination
from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, ToolFailed
from snapchain.model.guest_state import GuestState, Vouched
from snapchain.ops.failover.request import FailoverReport, FailoverRequest
from snapchain.ops.failover.run import Failover
from snapchain.ops.failover.several import run_all
from snapchain.testing.history import identical
from tests.ops.guest_points import GUEST, Guest, Open, instant, opened
from tests.ops.stacks import write
from tests.waiting import kill_process

WORD = Vouched(how="person", who="root@kvm2", words="it burnt down")


@pytest.fixture(params=["directory", "replica"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    return opened(request.param, request, tmp_path)


@pytest.fixture
def replica(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    return opened("replica", request, tmp_path)


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path / "kvm1")


def failover(place: Open | Destination, directory: Path, **asked: Any) -> Failover:
    destination = place() if callable(place) else place
    values: dict[str, Any] = {"directory": directory, "host": "kvm2", "vouched": WORD, **asked}
    return Failover(destination, GUEST, FailoverRequest(**values))


def files(report: FailoverReport) -> dict[str, Path]:
    return {each.name: Path(each.path or "") for each in report.disks}


def test_it_takes_the_newest_whole_point(place: Open, guest: Guest, tmp_path: Path) -> None:
    """Not the newest point of each disk: a guest point that lacks a disk, or its record, is none."""
    guest.point(place(), 1)
    guest.point(place(), 2)
    guest.point(place(), 3, names=["vda"], with_record=False)
    work = failover(place, tmp_path / "out")
    plan = work.plan()
    assert (plan.guest_point, plan.instant, plan.master, plan.epoch) == (2, instant(2), "kvm1", 2)
    assert plan.loss.known_bytes == 64 << 10 or plan.loss.known_bytes > 0
    assert plan.loss.likely_bytes is not None
    assert plan.loss.seconds > 0
    assert place().guest_state(GUEST).number == 0, "a plan changes nothing"
    report = work.run()
    assert (report.state, report.epoch, report.master, report.former) == (GuestState.ACTIVE, 2, "kvm2", "kvm1")
    for name, path in files(report).items():
        assert identical(path, guest.shown[instant(2), name])
        write(path, "write -P 9 0 64k")  # a guest can
    standing = place().guest_state(GUEST)
    assert (standing.state, standing.point, standing.vouched) == (GuestState.ACTIVE, 2, WORD)
    assert str(files(report)["vda"]) in Path(report.definition or "").read_text()


def test_a_guest_whose_disks_came_one_by_one_has_no_point(replica: Open, guest: Guest, tmp_path: Path) -> None:
    image = next(iter(guest.images.values()))
    assert main(["ship", str(image), f"{replica().url}::{GUEST}/vda"]) == 0
    with pytest.raises(NotFound, match="it has no guest point: its disks came one by one"):
        failover(replica, tmp_path / "out")


def test_the_old_host_is_refused_by_name(place: Open, guest: Guest, tmp_path: Path) -> None:
    guest.point(place(), 1)
    failover(place, tmp_path / "out").run()
    guest.grow(2)
    for name in guest.names:
        with pytest.raises(Conflict, match=r"kvm2 has taken the guest web1 over by a failover, for which root@kvm2"):
            guest.ship(place(), 2, names=[name], with_record=False)


def test_without_proof_nothing_is_done(place: Open, guest: Guest, tmp_path: Path) -> None:
    guest.point(place(), 1)
    with pytest.raises(Conflict, match="there is no proof that its old host is down"):
        failover(place, tmp_path / "out", vouched=None).run()
    with pytest.raises(ToolFailed, match="not installed"):
        failover(place, tmp_path / "out", vouched=None, fence=["no-such-program"]).run()
    with pytest.raises(Conflict, match="did not prove that the old host is down"):
        failover(place, tmp_path / "out", vouched=None, fence=["false"]).run()
    assert place().guest_state(GUEST).state is GuestState.PROTECTED
    assert not (tmp_path / "out").exists()
    guest.point(place(), 2)


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return path


def test_a_host_that_comes_back_meanwhile_stops_the_start(place: Open, guest: Guest, tmp_path: Path) -> None:
    """The fence program is run again right before the start; what was begun then goes on."""
    guest.point(place(), 1)
    log = tmp_path / "log"
    facts = "$SNAPCHAIN_GUEST $SNAPCHAIN_HOST $SNAPCHAIN_ROUND"
    fence = program(tmp_path / "fence", f'echo "{facts}" >> {log}; test $SNAPCHAIN_ROUND = 1')
    with pytest.raises(Conflict, match="did not prove"):
        failover(place, tmp_path / "out", vouched=None, fence=[str(fence)]).run()
    assert log.read_text().splitlines() == ["web1 kvm1 1", "web1 kvm1 2"]
    assert place().guest_state(GUEST).state is GuestState.PROMOTING
    program(fence, "exit 0")
    report = failover(place, tmp_path / "out", vouched=None, fence=[str(fence)]).run()
    assert (report.state, report.epoch, report.vouched.how) == (GuestState.ACTIVE, 2, "fence")


def test_another_host_does_not_take_it_twice(place: Open, guest: Guest, tmp_path: Path) -> None:
    """Of two hosts that decided on the same record, one is refused."""
    guest.point(place(), 1)
    slow = failover(place, tmp_path / "kvm3", host="kvm3")
    failover(place, tmp_path / "kvm2").run()
    with pytest.raises(Conflict, match=r"the state of the guest was changed meanwhile|the master of the disk already"):
        slow.run()
    standing = place().guest_state(GUEST)
    assert (standing.master, standing.epoch) == ("kvm2", 2)


def test_a_damaged_point_is_passed_over(replica: Open, guest: Guest, tmp_path: Path) -> None:
    guest.point(replica(), 1)
    guest.point(replica(), 2)
    top = max((tmp_path / "replica" / "web1%2Fvdb").glob("*.qcow2"))
    top.chmod(0o600)
    with top.open("r+b") as file:
        whole = file.read()
        file.seek(whole.rindex(b"\x02" * 4096))
        file.write(b"\x07")
    plan = failover(replica, tmp_path / "out", proves=True).plan()
    assert (plan.guest_point, [each.guest_point for each in plan.skipped]) == (1, [2])
    with pytest.raises(Corrupt, match="guest point 2 cannot be taken"):
        failover(replica, tmp_path / "out", point="2", proves=True)


def test_no_point_at_all(place: Open, guest: Guest, tmp_path: Path) -> None:
    guest.point(place(), 1, with_record=False)
    with pytest.raises(NotFound, match="no guest point that is whole"):
        failover(place, tmp_path / "out")


def test_what_was_begun_can_be_withdrawn(place: Open, guest: Guest, tmp_path: Path) -> None:
    guest.point(place(), 1)
    fence = program(tmp_path / "fence", "test $SNAPCHAIN_ROUND = 1")
    with pytest.raises(Conflict, match="did not prove"):
        failover(place, tmp_path / "out", vouched=None, fence=[str(fence)]).run()
    assert failover(place, tmp_path / "out").plan_withdraw().state is GuestState.PROMOTING
    standing = failover(place, tmp_path / "out").withdraw()
    assert (standing.state, standing.epoch) == (GuestState.PROTECTED, 3)
    with pytest.raises(Conflict, match=r"taken it over since"):
        guest.point(place(), 2)  # until a human has named the epoch
    shutil.rmtree(tmp_path / "out")
    assert failover(place, tmp_path / "out").run().epoch == 4
    with pytest.raises(NotFound, match="no failover of it is under way: it is active on kvm2"):
        failover(place, tmp_path / "out").withdraw()


def test_a_continued_failover_starts_no_domain_that_it_did_not_define(
    replica: Open, guest: Guest, tmp_path: Path
) -> None:
    """libvirt may have one of that name, on older files of the guest."""
    guest.point(replica(), 1)
    fence = program(tmp_path / "fence", "test $SNAPCHAIN_ROUND = 1")
    with pytest.raises(Conflict, match="did not prove"):
        failover(replica, tmp_path / "out", vouched=None, fence=[str(fence)]).run()
    with pytest.raises(InvalidInput, match="libvirt starts only what it has defined"):
        failover(replica, tmp_path / "out", starts=True).run()
    assert replica().guest_state(GUEST).state is GuestState.PROMOTING


def test_a_guest_that_has_written_is_not_withdrawn(replica: Open, guest: Guest, tmp_path: Path) -> None:
    guest.point(replica(), 1)
    fence = program(tmp_path / "fence", "test $SNAPCHAIN_ROUND = 1")
    with pytest.raises(Conflict, match="did not prove"):
        failover(replica, tmp_path / "out", vouched=None, fence=[str(fence)]).run()
    (overlay,) = (tmp_path / "replica" / "web1%2Fvda" / "active").glob("*.qcow2")
    words = ["failover", f"{replica().url}::{GUEST}", "--into", str(tmp_path / "out"), "--withdraw", "--dry-run"]
    assert main(words) == 0
    assert replica().guest_state(GUEST).state is GuestState.PROMOTING, "it was a dry run"
    write(overlay, "write -P 9 0 64k")
    with pytest.raises(Conflict, match="a guest has written to it"):
        failover(replica, tmp_path / "out").withdraw()
    assert overlay.exists()
    assert replica().guest_state(GUEST).epoch == 2


STEPS = 12


@pytest.mark.parametrize("step", range(STEPS))
def test_it_goes_on_wherever_it_is_cut_off(
    place: Open, guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Cut off before or after each change at the destination and each note here; the next run ends it, in one epoch."""
    guest.point(place(), 1)
    count = 0

    class Cut(Exception):
        pass

    def cutting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == step + 1:
                raise Cut
            found = real(*args, **more)
            count += 1
            if count == step + 1:
                raise Cut
            return found

        return call

    destination = place()
    work = failover(destination, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Failover, "_write_note", cutting(Failover._write_note))
        patch.setattr(type(destination), "change_guest", cutting(type(destination).change_guest))
        try:
            work.run()
            is_cut = False
        except Cut:
            is_cut = True
    report = failover(place, tmp_path / "out").run()
    assert (report.state, report.epoch) == (GuestState.ACTIVE, 2)
    for name, path in files(report).items():
        assert identical(path, guest.shown[instant(1), name])
    assert is_cut == (step < count)
    if step == STEPS - 1:
        assert not is_cut, "all steps are enumerated"


@pytest.fixture
def ended() -> Iterator[list[Path]]:
    """Scripts whose guests are killed at the end."""
    scripts: list[Path] = []
    yield scripts
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if any(os.fsencode(script.parent) in words for script in scripts) and b"qemu-system" in words:
                kill_process(int(process.name))


def argv(folder: Path) -> tuple[str, ...]:
    """Of a guest without an operating system, as it ran on the old host."""
    return (
        *("/usr/bin/qemu-system-x86_64", "-accel", "tcg", "-M", "q35", "-m", "32", "-nodefaults", "-display", "none"),
        *("-name", "guest=web1", "-qmp", f"unix:{folder}/qmp,server=on,wait=off"),
        *("-blockdev", "driver=qcow2,node-name=vda-top,file.driver=file,file.filename=/old/vda.qcow2"),
        *("-device", "virtio-blk-pci,drive=vda-top,id=vda"),
        *("-blockdev", "driver=qcow2,node-name=vdb-top,file.driver=file,file.filename=/old/vdb.qcow2"),
        *("-device", "virtio-blk-pci,drive=vdb-top,id=vdb"),
    )


def test_the_guest_starts_from_its_command_line(place: Open, guest: Guest, tmp_path: Path, ended: list[Path]) -> None:
    guest.point(place(), 1, kind="qmp", inactive=None, live=None, argv=argv(tmp_path))
    ended.append(tmp_path / "out" / "web1.sh")
    report = failover(place, tmp_path / "out", starts=True).run()
    assert report.started
    assert (tmp_path / "out" / "qmp").exists(), "QEMU listens where the definition was moved to"
    again = failover(place, tmp_path / "out", starts=True).run()
    assert again.started, "one that runs is not started twice"
    assert again.epoch == 2


def test_a_guest_that_does_not_start_is_told(place: Open, guest: Guest, tmp_path: Path) -> None:
    bad = tuple("no-such-machine" if word == "q35" else word for word in argv(tmp_path))
    guest.point(place(), 1, kind="qmp", inactive=None, live=None, argv=bad)
    with pytest.raises(ToolFailed, match="QEMU did not start: qemu-system-x86_64: unsupported machine type") as failed:
        failover(place, tmp_path / "out", starts=True).run()
    assert "the guest is this host's" in str(failed.value.hint)
    assert place().guest_state(GUEST).state is GuestState.ACTIVE


def test_several_guests_at_once(replica: Open, tmp_path: Path) -> None:
    work = {}
    for number in range(4):
        name = f"web{number}"
        Guest(tmp_path / name, names=("vda",), guest=name).point(replica(), 1)
        vouched = None if number == 2 else WORD
        request = FailoverRequest(directory=tmp_path / f"out-{name}", host="kvm2", vouched=vouched)
        work[name] = lambda on_event, name=name, request=request: Failover(replica(), name, request, on_event=on_event)
    report = run_all([work], concurrency=2)
    assert [(each.guest, each.order) for each in report.guests] == [("web0", 1), ("web1", 2), ("web3", 4)]
    assert [(each.guest, each.order, each.kind) for each in report.failed] == [("web2", 3, "conflict")]
    json.loads(report.model_dump_json())
