"""A proxy between snapchain and QEMU's monitor: it records all that passes, and does harm where it is told to.

    with Spy(tmp_path / "spy", machine.qmp) as spy:              count the commands of an operation
        operate(spy.path)
    for fault in every(spy.commands, (KILL, DROP, LOSE)):         once per step and fault
        with fresh_machine() as machine, Spy(tmp_path / "spy", machine.qmp, fault) as spy:
            operate(spy.path)
            assert spy.happened
        spy.check()

Like QEMU it serves one client at a time: a second one connects, and gets no greeting until the first has left.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.waiting import HANG, wait_until

WALKS_ALL_NODES = {"query-named-block-nodes", "x-debug-query-block-graph"}
"""QEMU 7.2 dies of the first beside a stream that is concluded and not dismissed; the second visits the same nodes."""


class Place(Enum):
    """When a fault strikes."""

    BEFORE = "the command has left snapchain, and QEMU has not got it"
    SENT = "QEMU has done it, and snapchain has no answer"
    ANSWERED = "snapchain has the answer"


@dataclass
class Command:
    """What snapchain sent. number: from 0, None where it is not counted; answer: what QEMU returned, error: its words

    Both are None as long as QEMU has not answered.
    """

    name: str
    arguments: dict[str, Any]
    number: int | None
    answer: Any = None
    error: str | None = None
    answered: bool = False


@dataclass(frozen=True)
class Event:
    """What QEMU said unasked."""

    name: str
    data: dict[str, Any]


Act = Callable[["_Link"], bool]
"""What a fault does; returns whether the command or the answer still travels on."""


@dataclass(frozen=True)
class Fault:
    """number: of the command, as counted; act: KILL, DROP, LOSE, delay(seconds), call(function)"""

    number: int
    place: Place
    act: Act
    name: str = ""

    def __str__(self) -> str:
        return f"{self.name or getattr(self.act, '__name__', 'act')} at {self.number}: {self.place.value}"


def KILL(link: _Link) -> bool:  # noqa: N802 - a constant of the vocabulary
    """SIGKILL the process that is connected, never the test itself."""
    assert link.client_pid != os.getpid(), "the operation must run in a process of its own to be killed"
    with suppress(ProcessLookupError):
        os.kill(link.client_pid, signal.SIGKILL)
    link.close()
    return False


def DROP(link: _Link) -> bool:  # noqa: N802
    """Cut the connection; a new one is served."""
    link.close()
    return False


def LOSE(link: _Link) -> bool:  # noqa: N802
    """The command or the answer vanishes, and the connection stays."""
    return False


def delay(seconds: float) -> Act:
    """It travels on later."""

    def act(link: _Link) -> bool:
        time.sleep(seconds)
        return True

    return act


def call(function: Callable[[], object]) -> Act:
    """Call a function of the test, then go on."""

    def act(link: _Link) -> bool:
        function()
        return True

    return act


def every(
    commands: Sequence[Command],
    acts: Sequence[Act] = (KILL, DROP),
    places: Collection[Place] = (Place.BEFORE, Place.SENT),
) -> Iterator[Fault]:
    """Each act at each place of each command that was counted. KILL and DROP at ANSWERED are BEFORE of the next one."""
    for command in commands:
        if command.number is not None:
            for place in places:
                for act in acts:
                    yield Fault(command.number, place, act, f"{getattr(act, '__name__', 'act')} of {command.name}")


def changing(name: str) -> bool:
    """For Spy(counts=): only commands that change something; queries vary from run to run where they are polls."""
    return not name.startswith("query-") and name not in {"qmp_capabilities", "qom-get", "qom-list"}


class Spy:
    """path: where it listens; monitor: QEMU's socket; counts: which commands have a number

    happened: whether each fault has struck, or strikes right now
    log: commands and events, in the order in which they passed
    """

    def __init__(
        self,
        path: Path,
        monitor: Path,
        *faults: Fault,
        counts: Callable[[str], bool] = lambda name: name != "qmp_capabilities",
    ) -> None:
        self.path, self.monitor, self.counts = path, monitor, counts
        self.log: list[Command | Event] = []
        self.happened = not faults
        self._waiting = list(faults)
        self._next = 0
        self._lock = threading.Lock()
        self._links: list[_Link] = []
        self._ends = False
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._serve, name="spy", daemon=True)
        self._thread.start()

    @property
    def commands(self) -> list[Command]:
        """In the order in which they were sent, of all connections; the handshake is left out."""
        return [each for each in self.log if isinstance(each, Command) and each.name != "qmp_capabilities"]

    def names(self) -> list[str]:
        """Of the commands."""
        return [each.name for each in self.commands]

    def events(self, name: str) -> list[Event]:
        """Of that name."""
        return [each for each in self.log if isinstance(each, Event) and each.name == name]

    def check(self) -> None:
        """Assert that no command which walks all nodes was sent beside a stream that is concluded, not dismissed."""
        wrong = list(walks_beside_concluded_stream(self.log))
        assert not wrong, f"QEMU 7.2 dies of {wrong}"

    def drop(self) -> None:
        """Cut all connections now."""
        for link in list(self._links):
            link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()
        self._thread.join(HANG)
        self.path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while not self._ends:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                server.connect(str(self.monitor))
            except OSError:  # QEMU is gone: so is the connection
                server.close()
                client.close()
                continue
            link = _Link(self, client, server)
            self._links.append(link)
            link.run()
            self._links.remove(link)

    def _sent(self, name: str, arguments: dict[str, Any]) -> Command:
        with self._lock:
            number = None
            if self.counts(name):
                number, self._next = self._next, self._next + 1
            command = Command(name, arguments, number)
            self.log.append(command)
            return command

    def _said(self, event: Event) -> None:
        with self._lock:
            self.log.append(event)

    def _strike(self, link: _Link, command: Command | None, place: Place) -> bool:
        """Whether the message may travel on."""
        goes_on = True
        for fault in [each for each in self._waiting if command and each.number == command.number]:
            if fault.place is place:
                self._waiting.remove(fault)
                self.happened = not self._waiting  # before the operation can notice
                goes_on = fault.act(link) and goes_on
        return goes_on


@dataclass
class _Link:
    """One client's connection, and the one to QEMU that belongs to it."""

    spy: Spy
    client: socket.socket
    server: socket.socket
    pending: dict[str, Command] = field(default_factory=dict)

    def __post_init__(self) -> None:
        credentials = self.client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.client_pid: int = struct.unpack("3i", credentials)[0]

    def run(self) -> None:
        """Until either side leaves."""
        answers = threading.Thread(target=self._relay, args=(self.server, self._answer), name="spy-qemu", daemon=True)
        answers.start()
        self._relay(self.client, self._command)
        answers.join(HANG)
        self.client.close()
        self.server.close()

    def close(self) -> None:
        for each in (self.client, self.server):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _relay(self, source: socket.socket, handle: Callable[[bytes], None]) -> None:
        try:
            for message in messages(source):
                handle(message)
        except (OSError, ValueError):
            pass  # the other side left; closed below
        finally:
            self.close()

    def _command(self, line: bytes) -> None:
        message = json.loads(line)
        command = self.spy._sent(message.get("execute") or message.get("exec-oob"), message.get("arguments", {}))
        self.pending[str(message.get("id"))] = command
        if self.spy._strike(self, command, Place.BEFORE):
            self.server.sendall(line)

    def _answer(self, line: bytes) -> None:
        message = json.loads(line)
        if "event" in message:
            self.spy._said(Event(message["event"], message.get("data", {})))
            self.client.sendall(line)
            return
        command = self.pending.pop(str(message.get("id")), None) if "QMP" not in message else None
        if command is not None:
            command.answer, command.error = message.get("return"), message.get("error", {}).get("desc")
            command.answered = True
        if self.spy._strike(self, command, Place.SENT):
            self.client.sendall(line)
            self.spy._strike(self, command, Place.ANSWERED)


def messages(source: socket.socket) -> Iterator[bytes]:
    """Whole JSON messages from a stream: QEMU ends each with a line feed, qemu.qmp does not."""
    decoder, text = json.JSONDecoder(), ""
    while data := source.recv(1 << 20):
        text = (text + data.decode()).lstrip()
        while text:
            try:
                _, end = decoder.raw_decode(text)
            except ValueError:  # not whole yet
                break
            yield text[:end].encode() + b"\n"
            text = text[end:].lstrip()


def walks_beside_concluded_stream(log: Sequence[Command | Event]) -> Iterator[str]:
    """The commands of a log that walk all nodes while a stream is concluded and not dismissed."""
    streams: set[str] = set()
    concluded: set[str] = set()
    for each in log:
        if isinstance(each, Event):
            job, status = each.data.get("id"), each.data.get("status")
            if each.name == "JOB_STATUS_CHANGE" and isinstance(job, str):
                if status == "concluded" and job in streams:
                    concluded.add(job)
                elif status == "null":
                    concluded.discard(job)
            continue
        if each.name == "block-stream":
            streams.add(str(each.arguments.get("job-id", each.arguments.get("device"))))
        for known in each.answer if each.name == "query-jobs" and isinstance(each.answer, list) else ():
            if known.get("type") == "stream":  # begun before we listened
                streams.add(known["id"])
                if known.get("status") == "concluded":
                    concluded.add(known["id"])
        if concluded and _walks(each):
            yield f"{each.name} beside {', '.join(sorted(concluded))}"


def _walks(command: Command) -> bool:
    if command.name == "human-monitor-command":
        return "info block -n" in str(command.arguments.get("command-line"))
    if command.name == "query-blockstats":
        return command.arguments.get("query-nodes") is True
    return command.name in WALKS_ALL_NODES


def wait_for(spy: Spy, name: str, count: int = 1) -> None:
    """Until the spy has seen that many commands of a name."""
    wait_until(lambda: spy.names().count(name) >= count)
