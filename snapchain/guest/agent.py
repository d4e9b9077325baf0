"""The guest agent (qemu-ga): freeze and thaw of the guest's filesystems, through its socket or through libvirt.

The socket has no message ids, serves one client at a time, and gives a client the late replies that were meant for the
client before it.  So each call begins with a sync:

    -> 0xFF {"execute":"guest-sync-delimited","arguments":{"id":N}}
    <- {"error":...}           to the 0xFF, which also clears a command that an earlier client sent only half of
    <- 0xFF {"return":N}       all that came before it, and any other N, is dropped
    -> {"execute":"guest-fsfreeze-freeze"}
    <- {"return":2}

This module loads fast: the watchdog (watchdog.py) is a process of its own, and uses it.
"""

from __future__ import annotations

import json
import secrets
import select
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from snapchain.errors import Busy, InvalidInput, SnapchainError, Unavailable, Unsupported
from snapchain.guest.protocol import Agent

SYNC_SECONDS = 3.0
"""How long an agent that runs may take to answer a sync; libvirt allows 5."""
_LINE = 64 << 10
"""Bytes of a reply; those that are asked for here have a hundred."""
_MOST = 4 << 20
"""Bytes that are read in one call: late replies to others are dropped up to here."""
_PAUSE = 0.02
_MARK = b"\xff"


class NoReply(Unavailable):
    """was_sent: the command may still be carried out, later: it was sent, and its reply did not come in time."""

    was_sent = False


class ConnectedAgent(Agent, Protocol):
    """An Agent whose connection can be kept between calls."""

    def connected(self) -> Any:
        """A context manager: one connection for all calls in it. No other client is served meanwhile."""
        ...


def open_agent(address: Mapping[str, str]) -> ConnectedAgent:
    """The agent at an address, as `Agent.address` gives it. Nothing is sent yet. Raises InvalidInput."""
    match address:
        case {"kind": "socket", "path": str(path)}:
            return SocketAgent(Path(path))
        case {"kind": "libvirt", "domain": str(domain)}:
            from snapchain.guest.libvirt_agent import LibvirtAgent  # a socket needs no virsh
            from snapchain.host.virsh import Virsh

            return LibvirtAgent(Virsh(address.get("connect")), domain, address.get("name", domain))
    raise InvalidInput("not the address of a guest agent", subject=json.dumps(dict(address)))


class SocketAgent:
    """The agent at a unix socket that QEMU has connected to the guest's virtio-serial port."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._keeping = False
        self._kept: _Connection | None = None

    def address(self) -> dict[str, str]:
        """See `Agent`."""
        return {"kind": "socket", "path": str(self.path.absolute())}

    @contextmanager
    def connected(self) -> Iterator[None]:
        """See `ConnectedAgent`. A new connection costs the agent a tenth of a second: it polls for it."""
        self._keeping = True
        try:
            yield
        finally:
            self._keeping = False
            if self._kept is not None:
                self._kept.close()
                self._kept = None

    def ping(self, *, timeout: float) -> None:
        """See `Agent`."""
        self._call("guest-ping", timeout)

    def freeze(self, *, timeout: float) -> int:
        """See `Agent`. Raises NoReply; Busy when it is frozen already, Unsupported where that is disabled."""
        return _count(self._call("guest-fsfreeze-freeze", timeout))

    def thaw(self, *, timeout: float) -> int:
        """See `Agent`."""
        return _count(self._call("guest-fsfreeze-thaw", timeout))

    def is_frozen(self, *, timeout: float) -> bool:
        """See `Agent`."""
        return bool(self._call("guest-fsfreeze-status", timeout) == "frozen")

    def _call(self, command: str, timeout: float) -> Any:
        deadline = time.monotonic() + timeout
        connection = self._kept or _Connection(self.path, deadline)
        try:
            connection.sync(min(deadline, time.monotonic() + SYNC_SECONDS))
            return connection.ask(command, deadline)
        finally:
            # After a time-out too: the sync of the next call drops what comes late.
            if connection.usable and self._keeping:
                self._kept = connection
            else:
                self._kept = None
                connection.close()


class _Connection:
    """One connection to the socket. Deadlines are of time.monotonic."""

    def __init__(self, path: Path, deadline: float) -> None:
        self._path = path
        self._read = bytearray()
        self._budget = 0
        self.usable = True
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        try:
            self._connect(deadline)
        except BaseException:
            self._socket.close()
            raise

    def _connect(self, deadline: float) -> None:
        while True:
            try:
                self._socket.connect(str(self._path))
            except BlockingIOError as error:  # others wait in front of us
                if time.monotonic() >= deadline:
                    raise NoReply(
                        "another program is connected to the guest agent", subject=self._path, hint=_ONE_CLIENT
                    ) from error
                time.sleep(_PAUSE)
            except OSError as error:
                hint = "is the path right, and does the guest run?"
                if "too long" in str(error):
                    hint = "a socket's path has at most 107 bytes: use a shorter one"
                raise NoReply(
                    f"the guest agent's socket cannot be used: {error.strerror or error}", subject=self._path, hint=hint
                ) from error
            else:
                return

    def sync(self, deadline: float) -> None:
        """Bring both ends in step: the next line that comes is the reply to the next command."""
        number = secrets.randbelow(1 << 31)
        self._budget = _MOST
        self._send(_MARK + _encoded("guest-sync-delimited", id=number), deadline)
        while True:
            self._skip_past_mark(deadline)
            try:
                reply = json.loads(self._line(deadline).rpartition(_MARK)[2])
            except ValueError:
                continue
            if isinstance(reply, dict) and reply.get("return") == number and not isinstance(reply["return"], bool):
                return

    def ask(self, command: str, deadline: float) -> Any:
        """The return value. Raises Busy, Unsupported and Unavailable for the agent's refusals."""
        try:
            self._send(_encoded(command), deadline)
            line = self._line(deadline)
        except NoReply as error:
            error.was_sent = True
            raise
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if isinstance(reply, dict) and "return" in reply:
            return reply["return"]
        if isinstance(reply, dict) and isinstance(reply.get("error"), dict):
            raise refused(command, str(reply["error"].get("desc", "")), subject=self._path)
        self.usable = False
        unknown = NoReply(f"the guest agent's reply to {command} is no reply", subject=self._path)
        unknown.was_sent = True
        raise unknown

    def _send(self, data: bytes, deadline: float) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
            except OSError as error:
                raise self._lost(error) from error

    def _skip_past_mark(self, deadline: float) -> None:
        while _MARK not in self._read:
            self._read.clear()
            self._receive(deadline)
        del self._read[: self._read.index(_MARK) + 1]

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._read:
            if len(self._read) > _LINE:
                self.usable = False
                raise NoReply("the guest agent sent a reply without an end", subject=self._path)
            self._receive(deadline)
        line, _, rest = bytes(self._read).partition(b"\n")
        self._read[:] = rest
        return line

    def _receive(self, deadline: float) -> None:
        if self._budget <= 0:
            self.usable = False
            raise NoReply("the guest agent sent more than it was asked for", subject=self._path)
        self._wait(select.POLLIN, deadline)
        try:
            data = self._socket.recv(min(_LINE, self._budget))
        except BlockingIOError:
            return
        except OSError as error:
            raise self._lost(error) from error
        if not data:
            raise self._lost(None)
        self._budget -= len(data)
        self._read += data

    def _wait(self, event: int, deadline: float) -> None:
        left = deadline - time.monotonic()
        ready = select.poll()
        ready.register(self._socket, event)
        if left <= 0 or not ready.poll(left * 1000):
            raise NoReply("the guest agent did not answer in time", subject=self._path, hint=_IS_IT_THERE)

    def _lost(self, error: OSError | None) -> NoReply:
        self.usable = False
        why = "QEMU closed the connection" if error is None else str(error.strerror or error)
        return NoReply(f"the connection to the guest agent was lost: {why}", subject=self._path)

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()


_ONE_CLIENT = "its socket serves one client at a time: find the other one with `ss -xp`"
_IS_IT_THERE = "see whether qemu-guest-agent runs in the guest, and whether another program uses its socket"


def refused(command: str, words: str, *, subject: object) -> SnapchainError:
    """The error for a command that the agent answers with an error. words: its own"""
    said = _printable(words)
    if "frozen state" in said:  # then only a few commands are allowed, and not another freeze
        return Busy(
            "the guest's filesystems are frozen already, by another program",
            subject=subject,
            hint="wait for its end, or thaw them: `virsh domfsthaw`, guest-fsfreeze-thaw",
        )
    if "disabled" in said or "not been found" in said or "not found" in said:
        return Unsupported(
            f"the guest agent does not offer {command}: {said}",
            subject=subject,
            hint="allow it in the agent's configuration in the guest (block-rpcs)",
        )
    return Unavailable(f"the guest agent refused {command}: {said}", subject=subject, hint="see its log")


def _encoded(command: str, **arguments: object) -> bytes:
    message: dict[str, object] = {"execute": command}
    if arguments:
        message["arguments"] = arguments
    return json.dumps(message).encode() + b"\n"


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)[:500]
