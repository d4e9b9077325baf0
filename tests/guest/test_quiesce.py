"""A guest is thawed whatever happens to snapchain, and a point is called consistent only when it is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Busy, ToolFailed, Unavailable
from snapchain.guest import journal, quiesce
from snapchain.guest.quiesce import Quiesced, frozen, settle_thaw, with_hooks
from snapchain.host.process_identity import identity
from snapchain.model.consistency import Consistency
from snapchain.model.events import Event
from tests.guest.fake_agent import FakeAgent
from tests.guest.freezing import AgentsGuest
from tests.servers import DIE_WITH_PARENT
from tests.waiting import HANG, gone, wait_until

BOUND = 1000.0
"""Seconds; nothing waits for it where it is not the subject of the test."""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def fake() -> Iterator[FakeAgent]:
    folder = Path(tempfile.mkdtemp())  # a socket's path must be short
    with FakeAgent(folder / "agent") as agent:
        yield agent
    shutil.rmtree(folder)


def records() -> list[journal.Found]:
    found, faults = journal.find()
    assert not faults
    return found


def freezes(guest: Any, events: list[Event] | None = None, **changes: Any) -> Any:
    values = {"required": True, "freeze_seconds": HANG, "bound_seconds": BOUND, **changes}
    return frozen(guest, on_event=(events if events is not None else []).append, **values)


def watchdog() -> int:
    """The process that owes the thaw."""
    [found] = records()
    assert found.record.operation == quiesce.THAW
    return found.record.writer[0]


def test_a_freeze_is_owed_before_it_happens_and_settled_after_it(fake: FakeAgent) -> None:
    with freezes(AgentsGuest(fake.path)) as reached:
        assert fake.froze == 1
        assert not gone(watchdog())
        assert os.getsid(watchdog()) == watchdog() != os.getsid(0)
    assert reached == Quiesced(Consistency.FILESYSTEM, None, reached.frozen_seconds)
    assert 0 < reached.frozen_seconds < HANG
    assert not fake.frozen
    assert not records()
    frozen_at = fake.log.index("guest-fsfreeze-freeze")
    assert fake.log[frozen_at:] == ["guest-fsfreeze-freeze", "guest-sync-delimited", "guest-fsfreeze-thaw"]


def test_the_record_is_on_the_disk_before_the_freeze(fake: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Unavailable("the disk is full")

    monkeypatch.setattr(journal, "write", refuse)
    with pytest.raises(Unavailable, match="the disk is full"), freezes(AgentsGuest(fake.path)):
        raise AssertionError
    with freezes(AgentsGuest(fake.path), required=False) as reached:
        assert fake.froze == 0
    assert reached.why_not == "the disk is full"


def test_an_exception_in_the_block_thaws(fake: FakeAgent) -> None:
    with pytest.raises(KeyboardInterrupt), freezes(AgentsGuest(fake.path)):
        raise KeyboardInterrupt
    assert not fake.frozen
    assert not records()


@contextmanager
def run_frozen(fake: FakeAgent, bound: float = BOUND) -> Iterator[subprocess.Popen[str]]:
    """A process that has frozen the guest, and does nothing more; it is dead after the block."""
    argv = [sys.executable, "-m", "tests.guest.freezing", str(fake.path), str(bound)]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "frozen\n"
            assert fake.frozen
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_death_by_any_signal_thaws(fake: FakeAgent, number: signal.Signals) -> None:
    """Also of the whole session, as when a terminal closes: the watchdog has its own."""
    with run_frozen(fake) as child:
        os.killpg(child.pid, number)
        child.wait()
    wait_until(lambda: not fake.frozen)
    wait_until(lambda: not records())


def test_the_watchdog_survives_polite_signals(fake: FakeAgent) -> None:
    with run_frozen(fake):
        pid = watchdog()
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            os.kill(pid, number)
    wait_until(lambda: not fake.frozen)
    wait_until(lambda: gone(pid))


def test_a_process_that_hangs_is_thawed_within_the_bound(fake: FakeAgent) -> None:
    """And when it wakes up, it learns that the snapshot is not what it should be."""
    bound = 2.0
    with run_frozen(fake, bound) as child:
        began = time.monotonic()
        os.kill(child.pid, signal.SIGSTOP)
        wait_until(lambda: not fake.frozen)
        assert time.monotonic() - began > bound / 4
        wait_until(lambda: not records())
        os.kill(child.pid, signal.SIGCONT)


def test_a_thaw_at_the_deadline_is_told(fake: FakeAgent) -> None:
    with freezes(AgentsGuest(fake.path), bound_seconds=1.5) as reached:
        wait_until(lambda: not records())
        assert not fake.frozen
    assert reached.consistency is Consistency.CRASH
    assert "not frozen for certain" in str(reached.why_not)


def test_after_the_deadline_nothing_freezes_again(fake: FakeAgent) -> None:
    """A process that hung between two steps wakes up and goes on: its order to freeze must have no effect."""
    guard = quiesce._Guard(AgentsGuest(fake.path), 1.5)  # type: ignore[arg-type]
    guard.freeze(HANG)
    wait_until(lambda: not records())
    with pytest.raises(Unavailable, match="process that freezes and thaws the guest does not answer"):
        guard.freeze(HANG)
    guard._watchdog.ended()
    assert fake.froze == 1
    assert not fake.frozen


@pytest.mark.parametrize("required", [True, False])
def test_a_freeze_that_happens_later_is_thawed(fake: FakeAgent, required: bool) -> None:
    """The client gave up; the agent, busy in a hook, freezes after that."""
    fake.hold.add("guest-fsfreeze-freeze")
    if required:
        with (
            pytest.raises(Unavailable, match="did not answer in time"),
            freezes(AgentsGuest(fake.path), freeze_seconds=1.0),
        ):
            raise AssertionError
    else:
        with freezes(AgentsGuest(fake.path), freeze_seconds=1.0, required=False) as reached:
            pass
        assert reached.consistency is Consistency.CRASH
        assert "did not answer in time" in str(reached.why_not)
    wait_until(lambda: fake.waits)
    assert fake.froze == 0
    pid = watchdog()
    fake.release()
    wait_until(lambda: fake.froze == 1 and not fake.frozen)
    wait_until(lambda: not records())
    wait_until(lambda: gone(pid))


def test_no_later_freeze_is_waited_for_where_none_was_sent(fake: FakeAgent) -> None:
    fake.hold.add("guest-sync-delimited")
    with pytest.raises(Unavailable, match="did not answer in time"), freezes(AgentsGuest(fake.path)):
        raise AssertionError
    assert not records()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_watchdog_that_dies_or_hangs_is_replaced(
    fake: FakeAgent, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snapchain.guest.watchdog.THAW_SECONDS", 0.5)
    monkeypatch.setattr("snapchain.guest.watchdog._LIBVIRT_SECONDS", 0.5)
    monkeypatch.setattr(quiesce, "THAW_SECONDS", 0.5)
    events: list[Event] = []
    with freezes(AgentsGuest(fake.path), events) as reached:
        pid = watchdog()
        os.kill(pid, number)
    assert not fake.frozen
    assert reached.consistency is Consistency.CRASH
    assert not records()
    assert not events
    assert gone(pid)


def test_a_record_of_two_that_were_killed_is_settled(fake: FakeAgent) -> None:
    """As when a service manager kills all processes of a service."""
    with run_frozen(fake):
        os.kill(watchdog(), signal.SIGKILL)
    [found] = records()
    wait_until(lambda: found.record.is_abandoned)
    assert fake.froze == 1
    assert settle_thaw(found)
    assert not fake.frozen
    assert not records()


def test_an_agent_that_cannot_thaw_keeps_its_record(fake: FakeAgent) -> None:
    with run_frozen(fake):
        os.kill(watchdog(), signal.SIGKILL)
    [found] = records()
    fake.lose.add("guest-fsfreeze-thaw")
    with pytest.raises(Unavailable, match="did not answer in time"):
        settle_thaw(found, timeout=0.2)
    assert records() == [found]


def test_nothing_is_owed_to_a_guest_that_is_gone(fake: FakeAgent) -> None:
    qemu = subprocess.Popen([*DIE_WITH_PARENT, "sleep", "600"])
    fake.hold.add("guest-fsfreeze-freeze")
    with freezes(AgentsGuest(fake.path, identity(qemu.pid)), freeze_seconds=1.0, required=False):
        pid = watchdog()
    assert not gone(pid)
    qemu.kill()
    qemu.wait()
    wait_until(lambda: gone(pid))
    assert not records()


def test_filesystems_that_thawed_early_are_no_consistent_point(fake: FakeAgent) -> None:
    """Windows ends a freeze after ten seconds, and another program may end it at any time."""
    with freezes(AgentsGuest(fake.path)) as reached:
        fake.frozen = False
    assert reached.consistency is Consistency.CRASH
    assert "had been thawed before" in str(reached.why_not)


def test_one_filesystem_that_thawed_early_is_one_too_many(fake: FakeAgent) -> None:
    with freezes(AgentsGuest(fake.path)) as reached:
        fake.filesystems -= 1
    assert reached.consistency is Consistency.CRASH


def test_a_refused_thaw_is_no_consistent_point(fake: FakeAgent) -> None:
    """As Windows' agent reports that it could not keep the filesystems frozen."""
    words = b'{"error": {"class": "GenericError", "desc": "fsfreeze is limited up to 10 seconds"}}\n'
    with freezes(AgentsGuest(fake.path)) as reached:
        fake.replies["guest-fsfreeze-thaw"] = words
    assert reached.consistency is Consistency.CRASH
    assert "limited up to 10 seconds" in str(reached.why_not)
    assert not fake.frozen


def test_a_lost_answer_of_the_switch_is_no_consistent_point(fake: FakeAgent) -> None:
    with freezes(AgentsGuest(fake.path)) as reached:
        reached.may_be_late = True
    assert reached.consistency is Consistency.CRASH
    assert "may be from after the thaw" in str(reached.why_not)


def test_a_freeze_of_another_program_is_left_alone(fake: FakeAgent) -> None:
    fake.frozen = True
    with pytest.raises(Busy, match="frozen already, by another program"), freezes(AgentsGuest(fake.path)):
        raise AssertionError
    with freezes(AgentsGuest(fake.path), required=False) as reached:
        pass
    assert reached.consistency is Consistency.CRASH
    wait_until(lambda: not records())
    assert fake.frozen


def test_no_agent_no_answer_no_filesystem(fake: FakeAgent, tmp_path: Path) -> None:
    fake.filesystems = 0
    cases: list[tuple[AgentsGuest, str]] = [
        (AgentsGuest(None), "no channel for a guest agent"),
        (AgentsGuest(tmp_path / "none"), "No such file"),
        (AgentsGuest(fake.path), "froze no filesystem"),
    ]
    for guest, words in cases:
        with pytest.raises(Unavailable, match=words), freezes(guest):
            raise AssertionError
        with freezes(guest, required=False) as reached:
            pass
        assert words in str(reached.why_not)
        assert reached.consistency is Consistency.CRASH
    assert not records()


def test_hooks_of_this_host(tmp_path: Path) -> None:
    """The second runs whenever the first was begun."""
    log = tmp_path / "log"
    program = tmp_path / "hook"
    program.write_text(
        f'#!/bin/sh\necho "$SNAPCHAIN_HOOK $SNAPCHAIN_GUEST $SNAPCHAIN_OUTCOME $SNAPCHAIN_CONSISTENCY $1" >> {log}\n'
        'test "$1" != fail\n'
    )
    program.chmod(0o755)
    events: list[Event] = []

    def run(pre: str, post: str) -> Any:
        return with_hooks(
            pre_freeze=(str(program), pre),
            post_thaw=(str(program), post),
            facts={"guest": "web1"},
            on_event=events.append,
        )

    with run("a", "b") as tell:
        tell(consistency=Consistency.FILESYSTEM)
    with pytest.raises(ToolFailed, match="the pre_freeze hook: ended with exit status 1"), run("fail", "b"):
        raise AssertionError
    with pytest.raises(KeyboardInterrupt), run("a", "b"):
        raise KeyboardInterrupt
    assert log.read_text().splitlines() == [
        "pre_freeze web1   a",
        "post_thaw web1 ok filesystem b",
        "pre_freeze web1   fail",
        "post_thaw web1 failed  b",
        "pre_freeze web1   a",
        "post_thaw web1 failed  b",
    ]
    assert not events
    with run("a", "fail"):
        pass
    assert "the post_thaw hook" in events[0].message  # type: ignore[union-attr]
