"""Two guards by whose end the kernel stops a process: whichever ends, and however."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest

from snapchain.errors import NotFound
from snapchain.host import deadman
from snapchain.host.deadman import Deadman, clock, is_stopped, let_continue
from snapchain.host.process_identity import Identity, identity
from tests.servers import DIE_WITH_PARENT
from tests.waiting import gone, wait_until

LATER = 3600.0


@pytest.fixture
def target() -> Iterator[Identity]:
    with subprocess.Popen([*DIE_WITH_PARENT, "sleep", "infinity"]) as process:
        found = identity(process.pid)
        assert found is not None
        yield found
        process.kill()


@pytest.fixture
def guards(target: Identity) -> Iterator[Deadman]:
    pair = Deadman(target, clock() + LATER)
    yield pair
    with suppress(OSError):
        pair.end()


def kill(*guards: Identity, by: int = signal.SIGKILL) -> None:
    for pid, _ in guards:
        with suppress(ProcessLookupError):  # it ended when the other one did
            os.kill(pid, by)


ENDS: dict[str, Callable[[Deadman], None]] = {
    "the first is killed": lambda pair: kill(pair.guards[0]),
    "the second is killed": lambda pair: kill(pair.guards[1]),
    "both are killed": lambda pair: kill(*pair.guards),
    "both are killed, the second first": lambda pair: kill(*reversed(pair.guards)),
    "both are ended": lambda pair: pair.end(),
}


@pytest.mark.parametrize("way", ENDS)
def test_the_target_stops_when_a_guard_ends(target: Identity, guards: Deadman, way: str) -> None:
    assert not is_stopped(target)
    ENDS[way](guards)
    wait_until(lambda: is_stopped(target))
    wait_until(lambda: not guards.works)


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_guards_that_are_stopped_themselves_die_at_the_deadline(
    target: Identity, guards: Deadman, which: tuple[int, ...]
) -> None:
    until = clock() + 2
    assert guards.extend(until)
    kill(*(guards.guards[each] for each in which), by=signal.SIGSTOP)
    wait_until(lambda: is_stopped(target))
    assert clock() >= until
    wait_until(lambda: not guards.works)  # its pipes are closed before it is gone


def test_the_deadline_stops_it_without_anybody(target: Identity) -> None:
    pair = Deadman(target, clock() + 60)
    until = clock() + 2
    assert pair.extend(until)
    pair.close()
    wait_until(lambda: is_stopped(target))
    assert clock() >= until


def test_a_deadline_that_is_extended_in_time_stops_nothing(target: Identity, guards: Deadman) -> None:
    passed = clock() + 3
    assert guards.extend(passed)
    assert guards.extend(clock() + LATER)
    wait_until(lambda: clock() > passed)
    assert not is_stopped(target)
    assert guards.works


@pytest.mark.parametrize("last", [0, 1])
def test_one_guard_alone_stops_it_by_its_own_end(target: Identity, guards: Deadman, last: int) -> None:
    """As where the other one was killed while this one sent SIGCONT, and then this one before it noticed."""
    kill(guards.guards[last], by=signal.SIGSTOP)
    kill(guards.guards[1 - last])
    wait_until(lambda: is_stopped(target))
    os.kill(target[0], signal.SIGCONT)
    assert not is_stopped(target)
    kill(guards.guards[last])
    wait_until(lambda: is_stopped(target))


def test_a_process_with_many_descriptors_ends_guards(target: Identity) -> None:
    """select(2) takes none from 1024 on."""
    with ExitStack() as opened:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            opened.callback(os.close, os.dup(0))
        pair = Deadman(target, clock() + LATER)
        pair.end()
        wait_until(lambda: is_stopped(target))


def test_a_process_without_guards_is_stopped_and_another_one_is_not(target: Identity) -> None:
    deadman.stop((target[0], target[1] + 1))
    assert not is_stopped(target)
    deadman.stop(target)
    wait_until(lambda: is_stopped(target))
    let_continue((target[0], target[1] + 1))
    assert is_stopped(target)
    let_continue(target)
    wait_until(lambda: not is_stopped(target))


def test_only_live_guards_let_it_continue(target: Identity) -> None:
    first = Deadman(target, clock() + LATER)
    first.end()
    wait_until(lambda: is_stopped(target))
    assert not first.extend(clock() + LATER, resumes=True)
    second = Deadman(target, clock() + LATER)
    assert is_stopped(target)
    assert second.extend(clock() + LATER, resumes=True)
    assert not is_stopped(target)
    kill(second.guards[1], by=signal.SIGSTOP)
    os.kill(target[0], signal.SIGSTOP)
    wait_until(lambda: is_stopped(target))
    assert not second.extend(clock() + LATER, resumes=True, timeout=0.2), "one guard does not answer"
    assert is_stopped(target)
    second.end()


def test_a_deadline_that_has_passed_stops_it_at_once(target: Identity, guards: Deadman) -> None:
    assert not guards.extend(clock() - 1, resumes=True)
    wait_until(lambda: is_stopped(target))


def test_guards_end_with_their_target(target: Identity, guards: Deadman) -> None:
    os.kill(target[0], signal.SIGKILL)
    wait_until(lambda: not guards.works)
    wait_until(lambda: all(gone(pid) for pid, _ in guards.guards))


def test_guards_of_an_earlier_process_are_ended(target: Identity, guards: Deadman) -> None:
    guards.close()
    newer = Deadman(target, clock() + LATER)
    deadman.end(guards.guards)
    wait_until(lambda: is_stopped(target))
    assert newer.extend(clock() + LATER, resumes=True)
    assert not is_stopped(target)
    newer.end()
    let_continue(target)
    wait_until(lambda: not is_stopped(target))


def test_a_target_that_is_gone_is_not_guarded(target: Identity) -> None:
    with pytest.raises(NotFound, match="has ended"):
        Deadman((target[0], target[1] + 1), clock() + LATER)


@pytest.mark.soak
def test_two_guards_that_are_killed_at_once_never_miss_it(target: Identity) -> None:
    """In whichever order the kernel closes what they have open."""
    for round_ in range(200):
        pair = Deadman(target, clock() + LATER)
        let_continue(target)
        wait_until(lambda: not is_stopped(target))
        kill(*(pair.guards if round_ % 2 else reversed(pair.guards)))
        wait_until(lambda: is_stopped(target))
        pair.end()
