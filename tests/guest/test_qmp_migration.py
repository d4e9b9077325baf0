"""The two ends of a live migration at QEMU's monitors: what must never be done to a guest that writes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Busy, Conflict, Unavailable
from snapchain.guest.qmp import Monitor, Refused
from snapchain.guest.qmp_migration import Incoming, Outgoing, look_at_memory, measured_dirty_rate
from tests.guest.counting_guest import Counting, check_numbers, counts_on
from tests.guest.machine import Machine
from tests.guest.spy import Spy, changing
from tests.waiting import HANG, wait_until

TOKEN = "5f3a9c01" * 4


class Pair:
    """A guest that writes as fast as it can, and a QEMU that awaits it, on empty disks of its own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.guest = Counting(folder / "source", burst=64)
        stack.enter_context(self.guest.machine)
        disks = {name: folder / f"{name}.there.qcow2" for name in self.guest.disks}
        for path in disks.values():
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "4M"], check=True)
        self.there = stack.enter_context(Machine(folder / "d", disks=disks, argv=["-S", "-incoming", "defer"]))
        self.disks = list(disks)
        self.tops = list(disks.values())
        self.nbd, self.ram = folder / "nbd", folder / "ram"
        self.incoming = Incoming(stack.enter_context(Monitor(self.there.qmp)))
        self.incoming.listen(self.ram, self.nbd, self.disks)

    def to_the_switch(self, outgoing: Outgoing, *, held_back: bool = False) -> None:
        """Until the guest is paused. held_back: its mirrors are not level by then"""
        outgoing.mirror(self.nbd, speed=1 if held_back else 0)
        outgoing.wait_until_mirrored(lambda _done, _total: held_back)
        outgoing.send_memory(self.ram, pause_limit=30, bandwidth=None, auto_converge=False)
        outgoing.wait_for_switchover(lambda _look: None)

    def move(self, outgoing: Outgoing) -> None:
        """Up to the switch, and over it."""
        self.to_the_switch(outgoing)
        outgoing.end_mirrors(seconds=60)
        outgoing.switch_over(seconds=60)

    def check_moved(self) -> None:
        """It runs on there, with all that it wrote here; its QEMU here was told to quit."""
        self.guest.machine.process.wait(HANG)
        self.incoming.run()
        assert counts_on(self.there.monitor)
        self.there.quit()
        check_numbers(self.tops)

    def check_stayed(self) -> None:
        """It runs on here, and has lost nothing."""
        assert counts_on(self.guest.machine.monitor)
        self.guest.machine.quit()
        check_numbers(self.guest.tops)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(tmp_path, stack)


def test_giving_up_again_and_again_harms_no_guest_that_writes(pair: Pair) -> None:
    """QEMU 7.2 dies of it with mirrors in mode write-blocking, in the second round or soon after."""
    with Monitor(pair.guest.machine.qmp) as monitor:
        outgoing = Outgoing(monitor, TOKEN, pair.disks)
        before = outgoing.capabilities()
        for _ in range(12):
            outgoing.mirror(pair.nbd, speed=0)
            outgoing.wait_until_mirrored(lambda _done, _total: False)
            outgoing.undo(before, {})
            assert counts_on(pair.guest.machine.monitor)
        assert outgoing.capabilities() == before
    assert pair.guest.machine.ask("query-jobs") == []
    pair.guest.machine.quit()
    check_numbers(pair.guest.tops)


def test_it_moves_and_nothing_is_lost(pair: Pair) -> None:
    """Each command that makes this safe is there: the capability, the mode, and the soft end before the switch."""
    with Spy(pair.folder / "spy", pair.guest.machine.qmp, counts=changing) as spy, Monitor(spy.path) as monitor:
        outgoing = Outgoing(monitor, TOKEN, pair.disks)
        pair.move(outgoing)
        pair.incoming.check_complete(seconds=60)
        sent = {each.name: each.arguments for each in spy.commands}
        names = spy.names()
        outgoing.quit()
    assert {"capability": "pause-before-switchover", "state": True} in sent["migrate-set-capabilities"]["capabilities"]
    assert (sent["blockdev-mirror"]["copy-mode"], sent["blockdev-mirror"]["sync"]) == ("background", "top")
    assert sent["block-job-cancel"]["force"] is False
    assert names.index("block-job-cancel") < names.index("migrate-continue")
    assert "job-cancel" not in names
    pair.check_moved()


def test_a_mirror_that_was_never_level_ends_with_all_writes(pair: Pair) -> None:
    """As over a link that takes longer for an answer than the guest for its next write: here it is held back."""
    with Monitor(pair.guest.machine.qmp) as monitor, ThreadPoolExecutor(1) as beside:
        outgoing = Outgoing(monitor, TOKEN, pair.disks)
        pair.to_the_switch(outgoing, held_back=True)
        assert "ready" not in [status for status, *_ in outgoing.check_mirrors()]
        ended = beside.submit(outgoing.end_mirrors, seconds=60)
        for row in monitor.rows("query-jobs"):
            monitor.execute("block-job-set-speed", {"device": row["id"], "speed": 0})
        ended.result()
        outgoing.switch_over(seconds=60)
        pair.incoming.check_complete(seconds=60)
        outgoing.quit()
    pair.check_moved()


def test_a_mirror_that_is_not_level_in_time_is_told(pair: Pair) -> None:
    with Monitor(pair.guest.machine.qmp) as monitor:
        outgoing = Outgoing(monitor, TOKEN, pair.disks)
        pair.to_the_switch(outgoing, held_back=True)
        with pytest.raises(Unavailable, match="the last writes of the guest"):
            outgoing.end_mirrors(seconds=0)
        outgoing.undo({}, {})
    pair.check_stayed()


def test_a_dead_destination_is_told_and_the_guest_goes_on(pair: Pair) -> None:
    with Monitor(pair.guest.machine.qmp) as monitor:
        outgoing = Outgoing(monitor, TOKEN, pair.disks)
        pair.to_the_switch(outgoing)
        assert pair.guest.machine.status() == "finish-migrate"
        with pytest.raises(Conflict, match="has not got the whole guest"):
            pair.incoming.check_complete(seconds=0)
        pair.there.process.kill()
        pair.there.process.wait()
        with pytest.raises(Unavailable, match=r"mirror of its writes|last writes of the guest"):
            outgoing.end_mirrors(seconds=60)
        outgoing.undo({}, {})
        assert look_at_memory(monitor).status == "cancelled"
    pair.check_stayed()


def test_what_it_measures_and_refuses(pair: Pair) -> None:
    with Monitor(pair.guest.machine.qmp) as monitor:
        rate = measured_dirty_rate(monitor)
        assert rate is not None
        assert rate >= 0
        outgoing = Outgoing(monitor, TOKEN, pair.disks)
        outgoing.check()
        before = outgoing.limits()
        outgoing.mirror(pair.nbd, speed=0)
        outgoing.wait_until_mirrored(lambda _done, _total: False)
        outgoing.send_memory(pair.ram, pause_limit=30, bandwidth=1, auto_converge=False)
        assert outgoing.limits() != before
        with pytest.raises(Busy, match="another migration"):
            outgoing.check()
        outgoing.undo({}, before)
        outgoing.check()
        assert outgoing.limits() == before


def test_a_second_move_that_is_refused_leaves_the_first_one_alone(pair: Pair) -> None:
    """While it is paused for the switch, and once it is over: whoever lets the guest go on then makes two of it."""
    with Monitor(pair.guest.machine.qmp) as monitor:
        first, second = Outgoing(monitor, TOKEN, pair.disks), Outgoing(monitor, "7" * 32, pair.disks)
        first.mirror(pair.nbd, speed=0)
        first.wait_until_mirrored(lambda _done, _total: False)
        first.send_memory(pair.ram, pause_limit=30, bandwidth=None, auto_converge=False)
        first.wait_for_switchover(lambda _look: None)
        with pytest.raises(Refused, match="QEMU refused blockdev-mirror"):
            second.mirror(pair.nbd, speed=0)
        second.undo({}, {})
        first.end_mirrors(seconds=60)
        first.switch_over(seconds=60)
        second.undo({}, {})
        wait_until(lambda: pair.guest.machine.status() == "postmigrate")  # QEMU is said to be done a moment before
        assert not [node for node in monitor.rows("query-named-block-nodes") if "7777" in str(node.get("node-name"))]
        first.undo({}, {})
    assert counts_on(pair.guest.machine.monitor)


def test_a_guest_that_is_paused_meanwhile_is_not_let_run(pair: Pair) -> None:
    with Monitor(pair.guest.machine.qmp) as monitor:
        outgoing = Outgoing(monitor, TOKEN, pair.disks)
        outgoing.mirror(pair.nbd, speed=0)
        outgoing.wait_until_mirrored(lambda _done, _total: False)
        outgoing.send_memory(pair.ram, pause_limit=0.001, bandwidth=1000, auto_converge=False)
        pair.guest.machine.ask("stop")
        with pytest.raises(Conflict, match="does not run any more: it is paused"):
            outgoing.wait_for_switchover(lambda _look: None)
        outgoing.undo({}, {})
        assert pair.guest.machine.status() == "paused"


class Cancelling:
    """QEMU 7.2 that was cancelled just as it would pause at pre-switchover: it waits for one more word."""

    path = Path("/run/web1.qmp")

    def __init__(self) -> None:
        self.status = "active"

    def fields(self, _command: str) -> dict[str, object]:
        return {"status": self.status}

    def execute(self, command: str, arguments: object = None, **_more: object) -> None:
        if command == "migrate_cancel":
            self.status = "cancelling"
        elif (command, arguments) == ("migrate-continue", {"state": "cancelling"}):
            self.status = "cancelled"

    def mark(self) -> int:
        return 0

    def wait(self, *_what: object, **_more: object) -> None:
        return None


def test_a_migration_that_is_cancelled_as_it_pauses_is_freed() -> None:
    monitor: Any = Cancelling()
    Outgoing(monitor, TOKEN, ["vda"])._cancel_memory(5.0)
    assert monitor.status == "cancelled"
