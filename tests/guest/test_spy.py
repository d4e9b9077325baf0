"""The spy itself: it records, and each fault strikes where it is told to."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest.machine import Machine, Monitor
from tests.guest.spy import (
    DROP,
    KILL,
    LOSE,
    Command,
    Event,
    Fault,
    Place,
    Spy,
    call,
    changing,
    delay,
    every,
    walks_beside_concluded_stream as walks,
)
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with Machine(tmp_path_factory.mktemp("machine")) as found:
        yield found


def ask(path: Path, *commands: str) -> list[Any]:
    monitor = Monitor(path)
    try:
        return [monitor.ask(each) for each in commands]
    finally:
        monitor.close()


def test_it_records_commands_answers_and_events(machine: Machine, tmp_path: Path) -> None:
    with Spy(tmp_path / "spy", machine.qmp) as spy:
        answers = ask(spy.path, "query-status", "stop", "cont", "query-name")
        wait_until(lambda: spy.events("RESUME"))
    assert answers[0]["status"] == "running"
    assert spy.names() == ["query-status", "stop", "cont", "query-name"]
    assert [each.number for each in spy.commands] == [0, 1, 2, 3]
    assert spy.commands[3].answer == {"name": "web1"}
    assert spy.events("STOP")
    assert spy.happened


def test_it_can_count_only_what_changes_something(machine: Machine, tmp_path: Path) -> None:
    with Spy(tmp_path / "spy", machine.qmp, counts=changing) as spy:
        ask(spy.path, "query-status", "stop", "query-status", "cont")
    assert [each.number for each in spy.commands] == [None, 0, None, 1]
    assert [(each.number, each.place) for each in every(spy.commands, (DROP,))] == [
        (0, Place.BEFORE), (0, Place.SENT), (1, Place.BEFORE), (1, Place.SENT),
    ]  # fmt: skip


@pytest.mark.parametrize(("place", "status"), [(Place.BEFORE, "running"), (Place.SENT, "paused")])
def test_a_dropped_link_and_what_qemu_did(machine: Machine, tmp_path: Path, place: Place, status: str) -> None:
    with Spy(tmp_path / "spy", machine.qmp, Fault(0, place, DROP), counts=changing) as spy:
        with pytest.raises(AssertionError, match="QEMU went away at stop"):
            ask(spy.path, "stop")
        assert spy.happened
        assert ask(spy.path, "query-status")[0]["status"] == status, "a new connection is served"
    machine.ask("cont")


@pytest.mark.parametrize(("place", "status"), [(Place.BEFORE, "running"), (Place.SENT, "paused")])
def test_a_killed_client(machine: Machine, tmp_path: Path, place: Place, status: str) -> None:
    with Spy(tmp_path / "spy", machine.qmp, Fault(0, place, KILL), counts=changing) as spy:
        code = f"from tests.guest.test_spy import ask; from pathlib import Path; ask(Path({str(spy.path)!r}), 'stop')"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert machine.status() == status
    machine.ask("cont")


def test_a_lost_answer_and_a_lost_command(machine: Machine, tmp_path: Path) -> None:
    faults = Fault(0, Place.BEFORE, LOSE), Fault(1, Place.SENT, LOSE)
    with Spy(tmp_path / "spy", machine.qmp, *faults) as spy:
        monitor = Monitor(spy.path)
        monitor._socket.sendall(b'{"execute": "query-status"}\n{"execute": "query-name", "id": "lost"}\n')
        monitor._socket.sendall(b'{"execute": "query-uuid", "id": "third"}\n')
        assert json.loads(monitor._lines.readline())["id"] == "third"
        monitor.close()
    assert [each.answered for each in spy.commands] == [False, True, True]


def test_a_function_is_called_between_command_and_answer(machine: Machine, tmp_path: Path) -> None:
    seen: list[str] = []
    faults = [
        Fault(0, place, call(lambda: seen.append(machine.status())))
        for place in (Place.BEFORE, Place.SENT, Place.ANSWERED)
    ]
    with Spy(tmp_path / "spy", machine.qmp, *faults, Fault(0, Place.SENT, delay(0.01))) as spy:
        ask(spy.path, "stop")
        wait_until(lambda: len(seen) == 3)
    assert spy.happened
    assert seen == ["running", "paused", "paused"]
    machine.ask("cont")


def test_a_second_client_waits_as_at_qemu(machine: Machine, tmp_path: Path) -> None:
    with Spy(tmp_path / "spy", machine.qmp) as spy:
        first = Monitor(spy.path)
        with socket.socket(socket.AF_UNIX) as second:
            second.settimeout(0.2)
            second.connect(str(spy.path))
            with pytest.raises(TimeoutError, match="timed out"):
                second.recv(1)
            first.close()
            second.settimeout(60)
            assert b"QMP" in second.recv(100)


def status(job: str, name: str) -> Event:
    return Event("JOB_STATUS_CHANGE", {"id": job, "status": name})


STREAM = Command("block-stream", {"job-id": "sc-1"}, 0)
COMMIT = Command("block-commit", {"job-id": "sc-2"}, 0)
NODES = Command("query-named-block-nodes", {"flat": True}, 1)


@pytest.mark.parametrize(
    ("log", "is_wrong"),
    [
        ([STREAM, status("sc-1", "running"), NODES], False),
        ([STREAM, status("sc-1", "concluded"), NODES], True),
        ([STREAM, status("sc-1", "concluded"), Command("x-debug-query-block-graph", {}, 1)], True),
        ([STREAM, status("sc-1", "concluded"), Command("query-block", {}, 1)], False),
        ([STREAM, status("sc-1", "concluded"), Command("query-blockstats", {"query-nodes": True}, 1)], True),
        ([STREAM, status("sc-1", "concluded"), status("sc-1", "null"), NODES], False),
        ([COMMIT, status("sc-2", "concluded"), NODES], False),
        ([Command("query-jobs", {}, 0, [{"id": "x", "type": "stream", "status": "concluded"}]), NODES], True),
    ],
)
def test_walks_beside_a_concluded_stream_are_seen(log: list[Command | Event], is_wrong: bool) -> None:
    assert bool(list(walks(log))) is is_wrong


def test_check_names_the_command() -> None:
    spy = Spy.__new__(Spy)
    spy.log = [STREAM, status("sc-1", "concluded"), NODES]
    with pytest.raises(AssertionError, match="query-named-block-nodes beside sc-1"):
        spy.check()
