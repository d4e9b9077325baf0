"""QEMU's monitor (QMP) over a unix socket, for callers that are not asynchronous.

    with Monitor(path) as monitor:
        monitor.execute("query-status")

`qemu.qmp` speaks the protocol, in an event loop that has a thread of its own.  This module adds what a guest depends
on: a deadline for every command, one error for each thing that can go wrong, and reconnecting.  A command whose answer
was lost may have been carried out; only one that changes nothing is sent again.

QEMU 7.2 crashes when its nodes are listed beside a stream job that has ended and is not dismissed, whether it
succeeded, failed or was cancelled.  A stream can fail at any moment, so `execute` never lists nodes beside one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError, Runstate

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, SnapchainError, ToolFailed, Unavailable
from snapchain.guest.socket_peers import clients_of
from snapchain.host.os_errors import denied, translated
from snapchain.host.terminal import printable, shell_word

GREETING_SECONDS = 10.0
"""QEMU greets at once, unless another client is connected."""
COMMAND_SECONDS = 60.0
"""A QEMU whose storage hangs answers late, or never."""
LARGEST_ANSWER = 32 << 20
"""Bytes. A node takes 1 KiB in a list of nodes; parsed, JSON takes up to thirty times its length."""
_GOODBYE_SECONDS = 5
_HUMAN = "type 'help' for more information"
"""In the greeting of QEMU's human monitor."""
_KEPT_EVENTS = 1000
_LONGEST_WORDS = 500
_CHANGES_NOTHING = ("query-", "qom-get", "qom-list")

# The library reports on its own; what counts is raised here.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class Refused(ToolFailed):
    """QEMU refused a command. error_class: such as GenericError; words: QEMU's own."""

    def __init__(self, command: str, error_class: str, words: str, *, subject: object, hint: str | None = None) -> None:
        super().__init__(
            f"QEMU refused {command}: {words}", argv=[command], status=1, stderr=words, subject=subject, hint=hint
        )
        self.error_class, self.words = error_class, words


def not_understood(command: str, what: str, *, subject: object) -> ToolFailed:
    """The error for an answer that does not look like QEMU's."""
    return ToolFailed(
        f"the answer to {command} was not understood: {what[:_LONGEST_WORDS]}",
        argv=[command],
        status=1,
        stderr=what[:_LONGEST_WORDS],
        subject=subject,
        hint="is this the QMP socket of a QEMU that runs?",
    )


class Monitor:
    """A connection to one QEMU. A context manager; safe to use from several threads.

    path: of the socket; peer: pid of the process that listens there, None where the kernel does not tell
    """

    def __init__(
        self, path: Path, *, patience: float = GREETING_SECONDS, command_seconds: float = COMMAND_SECONDS
    ) -> None:
        """Connect. patience: seconds for QEMU's greeting; command_seconds: for the answer to a command.

        Raises NotFound (no socket, nobody listens), Busy (another client is connected), InvalidInput (permission
        denied, not a QMP socket), Unavailable (QEMU does not answer).
        """
        self.path = path
        self.peer: int | None = None
        self._patience, self._command_seconds = patience, command_seconds
        self._lock = threading.RLock()
        self._news = threading.Condition()
        self._events: deque[tuple[int, str, Mapping[str, Any]]] = deque(maxlen=_KEPT_EVENTS)
        self._times: dict[str, float] = {}
        self._heard = 0
        self._commands: set[str] | None = None
        self._schema: dict[str, frozenset[str]] | None = None
        self._client: QMPClient | None = None
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda _loop, _context: None)  # each failure is raised where it is met
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"qmp {path.name}", daemon=True)
        self._thread.start()
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent. Jobs and nodes in QEMU stay as they are."""
        with self._lock:
            if self._loop.is_closed():
                return
            try:
                self._drop()
            finally:  # whatever interrupts the goodbye
                with suppress(concurrent.futures.TimeoutError):
                    asyncio.run_coroutine_threadsafe(_end_tasks(), self._loop).result(_GOODBYE_SECONDS)
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()

    # --- Commands.

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        seconds: float | None = None,
        repeatable: bool = False,
    ) -> Any:
        """What QEMU returns. seconds: deadline, by default the monitor's.

        repeatable: whether it may be sent again after a lost link, as all queries are

        Raises Refused with QEMU's words; Unavailable when the answer did not come: a command that changes something
        may have been carried out then. Connects again where the link was lost before. Raises Busy for a command
        that lists all nodes while there is a stream job, which may kill QEMU.
        """
        if _lists_nodes(command, arguments):
            self._check_no_stream()
        client = self._connected()
        try:
            return self._send(client, command, arguments, seconds or self._command_seconds)
        except _LinkLostError as lost:
            if not repeatable and not command.startswith(_CHANGES_NOTHING):
                raise Unavailable(
                    f"the connection to QEMU was lost before its answer to {command}; whether it was done is unknown",
                    subject=self.path,
                    hint="run the command again; it looks first",
                ) from lost
        try:
            return self._send(self._connected(), command, arguments, seconds or self._command_seconds)
        except _LinkLostError as lost:
            raise Unavailable(
                f"the connection to QEMU was lost at {command}: {lost}", subject=self.path, hint="is QEMU running?"
            ) from lost

    def rows(self, command: str, arguments: Mapping[str, Any] | None = None) -> list[Mapping[str, Any]]:
        """The answer to a command that returns a list of objects. Raises ToolFailed for another one."""
        answer = self.execute(command, arguments)
        if not isinstance(answer, list) or not all(isinstance(each, Mapping) for each in answer):
            raise not_understood(command, f"{type(answer).__name__}, not a list of objects", subject=self.path)
        return answer

    def fields(self, command: str, arguments: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """The answer to a command that returns an object. Raises ToolFailed for another one."""
        answer = self.execute(command, arguments)
        if not isinstance(answer, Mapping):
            raise not_understood(command, f"{type(answer).__name__}, not an object", subject=self.path)
        return answer

    def has(self, command: str, argument: str | None = None) -> bool:
        """Whether this QEMU knows a command, and an argument of it. Asked once a connection.

        For an argument QEMU describes all of its commands, which takes its main loop, and so the guest, 20 ms.
        """
        with self._lock:
            if argument is None:
                if self._commands is None:
                    self._commands = {str(each.get("name")) for each in self.rows("query-commands")}
                return command in self._commands
            if self._schema is None:
                self._schema = commands_of(self.rows("query-qmp-schema"))
            return argument in self._schema.get(command, ())

    def human(self, line: str, *, repeatable: bool = False) -> str:
        """What a line of the human monitor prints. repeatable: as for `execute`."""
        answer = self.execute("human-monitor-command", {"command-line": line}, repeatable=repeatable)
        if not isinstance(answer, str):
            raise not_understood("human-monitor-command", f"{type(answer).__name__}, not text", subject=self.path)
        return answer

    def _check_no_stream(self) -> None:
        for job in self.rows("query-jobs"):
            if job.get("type") == "stream":
                raise Busy(
                    f"the block job {_short(job.get('id'))} streams; QEMU's nodes cannot be listed beside it",
                    subject=self.path,
                    hint="wait until it is dismissed, or dismiss it: job-dismiss",
                )

    def _send(self, client: QMPClient, command: str, arguments: Mapping[str, Any] | None, seconds: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(client.execute(command, arguments), self._loop)
        try:
            return future.result(seconds)
        except concurrent.futures.TimeoutError as error:
            if future.done():  # a time-out of the transport itself
                raise _LinkLostError(str(error)) from error
            raise Unavailable(
                f"QEMU did not answer {command} within {seconds:g} seconds; it may still be carried out",
                subject=self.path,
                hint="is its storage available? Run the command again; it looks first",
            ) from error
        except ExecuteError as error:
            raise Refused(command, _short(error.error_class), _short(error), subject=self.path) from error
        except (QMPError, OSError, EOFError, AssertionError) as error:
            self._drop()
            raise _LinkLostError(_short(error)) from error
        finally:
            future.cancel()

    # --- Events.

    def mark(self) -> int:
        """The number of events so far, for `wait`."""
        with self._news:
            return self._heard

    def wait(self, concerns: Callable[[str, Mapping[str, Any]], bool], *, after: int, seconds: float) -> bool:
        """Wait for an event, by name and data, that came after a `mark`. Also ends when the link is lost.

        Returns whether there was one, or the link was lost: then events may have been missed.
        """
        end = time.monotonic() + seconds
        with self._news:
            while True:
                if any(number >= after and concerns(name, data) for number, name, data in self._events):
                    return True
                if self._heard - after > _KEPT_EVENTS or not self._is_up(self._client):
                    return True
                rest = end - time.monotonic()
                if rest <= 0:
                    return False
                self._news.wait(min(rest, 0.5))  # a lost link gives no notice

    def newest(self, concerns: Callable[[str, Mapping[str, Any]], bool], *, after: int) -> Mapping[str, Any] | None:
        """The data of the newest event, by name and data, that came after a `mark`; None where none is known."""
        with self._news:
            found = [data for number, name, data in self._events if number >= after and concerns(name, data)]
            return found[-1] if found else None

    def time_of(self, name: str) -> float | None:
        """When the newest event of a name happened, by QEMU's clock: seconds since the epoch; None for none so far."""
        with self._news:
            return self._times.get(name)

    def _hear(self, event: Mapping[str, Any]) -> bool:
        name, data = event.get("event"), event.get("data", {})
        with self._news:
            if (at := _seconds_of(event.get("timestamp"))) is not None:
                self._times[str(name)] = at
            self._events.append((self._heard, str(name), data if isinstance(data, Mapping) else {}))
            self._heard += 1
            self._news.notify_all()
        return False

    # --- The connection.

    @staticmethod
    def _is_up(client: QMPClient | None) -> bool:
        return client is not None and client.runstate is Runstate.RUNNING

    def _connected(self) -> QMPClient:
        with self._lock:
            if self._loop.is_closed():
                raise Unavailable("the connection to QEMU was closed", subject=self.path)
            if not self._is_up(self._client):
                self._drop()
                self._connect()
            assert self._client is not None
            return self._client

    def _connect(self) -> None:
        link = self._open()
        peer = _peer_of(link)
        if self.peer is not None and peer != self.peer:
            link.close()
            raise Conflict("another QEMU listens at this socket now", subject=self.path, hint="run the command again")
        client = QMPClient(readbuflen=LARGEST_ANSWER)
        client.events.event_filter = self._hear  # and nothing is put into the library's queue, which nobody empties
        future = asyncio.run_coroutine_threadsafe(client.connect(link), self._loop)
        try:
            future.result(self._patience)
        except concurrent.futures.TimeoutError as error:
            future.cancel()
            raise self._no_greeting() from error
        except (ConnectError, QMPError, OSError, EOFError, AssertionError) as error:
            raise self._no_session(error) from error
        except BaseException:
            future.cancel()
            raise
        finally:
            if not self._is_up(client):
                link.close()
        self._client, self.peer = client, peer
        self._hear({"event": "snapchain-connected"})

    def _open(self) -> socket.socket:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.settimeout(self._patience)
        try:
            connect_by_path(link, self.path)
        except BaseException as error:
            link.close()
            if isinstance(error, OSError):
                raise self._unreachable(error) from error
            raise
        return link

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        future = asyncio.run_coroutine_threadsafe(client.disconnect(), self._loop)
        with suppress(concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            future.exception(_GOODBYE_SECONDS)  # what ended the link: raised already where it was met

    def _unreachable(self, error: OSError) -> SnapchainError:
        is_socket = _is_socket(self.path)
        if is_socket is False:
            return InvalidInput("not a socket", subject=self.path, hint="give the path of QEMU's -qmp unix: socket")
        if isinstance(error, ConnectionRefusedError):
            return NotFound(
                "no process listens at this socket: its QEMU has ended",
                subject=self.path,
                hint="if the guest is off, name its images instead",
            )
        if isinstance(error, FileNotFoundError):
            return NotFound(
                "there is no such socket",
                subject=self.path,
                hint="start QEMU with -qmp unix:PATH,server=on,wait=off and give that path",
            )
        if isinstance(error, PermissionError):
            return denied(self.path)
        if isinstance(error, (BlockingIOError, TimeoutError)):
            return self._no_greeting()
        return translated(error, self.path)

    def _no_greeting(self) -> SnapchainError:
        holders = clients_of(self.path)
        who = f"{' and '.join(holders)} is connected to it" if holders else "another client is connected to it"
        words = f"QEMU sent no greeting within {self._patience:g} seconds: {who}, or it is not a QMP socket"
        domain = _libvirt_domain(self.path)
        if domain is not None:
            return Busy(words, subject=self.path, hint=f"libvirt manages this guest: --domain {shell_word(domain)}")
        return Busy(
            words, subject=self.path, hint="QMP serves one client; give QEMU a second -qmp socket for snapchain"
        )

    def _no_session(self, error: BaseException) -> SnapchainError:
        cause = error.exc if isinstance(error, ConnectError) else error
        if isinstance(cause, (EOFError, OSError)):
            return Unavailable("QEMU closed the connection", subject=self.path, hint="is QEMU running?")
        why = "it is that of QEMU's human monitor" if _HUMAN in str(cause) else _short(cause)
        return InvalidInput(
            f"not a QMP socket: {why}", subject=self.path, hint="give the path of QEMU's -qmp unix: socket"
        )


async def _end_tasks() -> None:
    """What still runs in this event loop ends, such as a connection that got no greeting."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _LinkLostError(Exception):
    """The connection broke; nobody knows what became of the command."""


def commands_of(schema: list[Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    """The commands of a `query-qmp-schema`, each with the names of its arguments."""
    by_name = {str(each.get("name")): each for each in schema}
    found = {}
    for name, each in by_name.items():
        if each.get("meta-type") == "command":
            members = by_name.get(str(each.get("arg-type")), {}).get("members", [])
            named = [str(one.get("name")) for one in members if isinstance(one, Mapping)] if _is_list(members) else []
            found[name] = frozenset(named)
    return found


def connect_by_path(link: socket.socket, path: Path) -> None:
    """Connect a unix socket, also to a path longer than the 107 bytes that the kernel takes. Raises OSError."""
    if len(os.fsencode(path)) <= 107:
        link.connect(os.fsencode(path))
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        link.connect(f"/proc/self/fd/{folder}/".encode() + os.fsencode(path.name))
    finally:
        os.close(folder)


def _seconds_of(timestamp: object) -> float | None:
    """Of an event; QEMU says -1 where it could not ask its clock."""
    if not isinstance(timestamp, Mapping):
        return None
    seconds, micros = timestamp.get("seconds"), timestamp.get("microseconds")
    return seconds + micros / 1e6 if isinstance(seconds, int) and isinstance(micros, int) and seconds >= 0 else None


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _lists_nodes(command: str, arguments: Mapping[str, Any] | None) -> bool:
    if command == "query-blockstats":
        return bool((arguments or {}).get("query-nodes"))
    return command == "query-named-block-nodes"


def _peer_of(link: socket.socket) -> int | None:
    """The process that listens, as the kernel knows it; None where it is not of this host's processes."""
    packed = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", packed)[0]
    return pid or None


def _is_socket(path: Path) -> bool | None:
    """None where nobody may look."""
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return None


def _libvirt_domain(path: Path) -> str | None:
    """web1, of /var/lib/libvirt/qemu/domain-3-web1/monitor.sock."""
    folder = path.parent.name
    if "libvirt" not in path.parts or not folder.startswith("domain-"):
        return None
    return folder.split("-", 2)[-1] or None


def _short(words: object) -> str:
    text = printable(" ".join(str(words).split())) or type(words).__name__
    return text if len(text) <= _LONGEST_WORDS else f"{text[:_LONGEST_WORDS]}..."
