"""A process that freezes a guest's filesystems for us, and thaws them whatever happens to us.

    snapchain    freeze ->             thaw ->            it lives in a session of its own, started before the freeze
    watchdog              <- frozen            <- thawed  the only one that talks to the agent meanwhile

It thaws when it is told to, when we are gone (our end of the socket pair is closed: by any signal, also SIGKILL), and
when the time is up (we hang).  After that nothing that we send makes it freeze again.  It repeats sync and thaw until
the agent says that the filesystems are thawed, as long as the guest lives: a freeze whose reply did not come in time
may still happen later.  Then it removes the journal's record.

It writes nothing, so a full disk does not stop it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapchain.errors import Busy, SnapchainError, Unavailable, Unsupported
from snapchain.guest.agent import ConnectedAgent, NoReply, open_agent
from snapchain.host import files
from snapchain.host.priority import spare_from_memory_shortage
from snapchain.host.process_identity import identity, still_runs
from snapchain.host.readable import is_readable

THAW_SECONDS = 5.0
"""Deadline of one try to thaw; a thaw takes a tenth of a second."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_LINE = 4096
_ERRORS: dict[str, type[SnapchainError]] = {each.kind: each for each in (Busy, Unavailable, Unsupported)}


@dataclass(frozen=True, slots=True)
class Orders:
    """agent: its address; record: path of the journal's record; bound: seconds that the guest may stay frozen

    process, boot: of the guest's QEMU, process None where it is unknown
    """

    agent: dict[str, str]
    record: str
    bound: float
    process: tuple[int, int] | None
    boot: str

    @property
    def time_limit(self) -> float:
        """Seconds after the order to freeze at which it thaws by itself: early enough for the thaw itself."""
        return max(self.bound - THAW_SECONDS, self.bound / 2)

    def guest_lives(self) -> bool:
        """Where its process is not known: as long as its agent's socket is there; of libvirt, always."""
        if self.process is None:
            return "path" not in self.agent or Path(self.agent["path"]).exists()
        return still_runs(self.process, boot=self.boot)


# --- Our side.


class Watchdog:
    """The process, from the side of the one whom it watches. Raises Unavailable when it does not answer."""

    def __init__(self, orders: Orders, start: Callable[[str, int], int]) -> None:
        """start: runs `main(fd, argument)` of this module as a process, and returns its pid."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                self.pid = start(_encoded(orders), theirs.fileno())
            except BaseException:
                ours.close()
                raise
        self._socket = ours
        self._read = bytearray()
        self.hangs = False

    @property
    def works(self) -> bool:
        """Whether it runs, and answers as far as is known."""
        return not self.hangs and identity(self.pid) is not None

    def ping(self, *, timeout: float) -> None:
        """Whether the agent answers. Raises what `Agent.ping` raises."""
        self._ask({"do": "ping", "timeout": timeout}, timeout + _START_SECONDS)

    def freeze(self, *, timeout: float) -> int:
        """How many filesystems were frozen. Raises what `Agent.freeze` raises; the watchdog thaws after a failure."""
        return int(self._ask({"do": "freeze", "timeout": timeout}, timeout + _START_SECONDS)["filesystems"])

    def thaw(self) -> int:
        """How many filesystems were thawed. Raises Unavailable when the agent does not thaw in time."""
        return int(self._ask({"do": "thaw"}, THAW_SECONDS + _LIBVIRT_SECONDS)["filesystems"])

    def close(self) -> None:
        """Let it go: it thaws what is frozen, and ends."""
        self._socket.close()
        with suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)

    def ended(self) -> None:
        """Wait for its end, and reap it."""
        self._socket.close()
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def kill(self) -> None:
        """One that does not answer."""
        self._socket.close()
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _ask(self, order: dict[str, object], timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        try:
            self._socket.sendall(json.dumps(order).encode() + b"\n")
            self._socket.settimeout(max(deadline - time.monotonic(), 0.01))
            reply = _line(self._socket, self._read)
        except OSError as error:  # where it is the end: it thaws by itself already, or was killed
            self.hangs = isinstance(error, TimeoutError)
            raise Unavailable("the process that freezes and thaws the guest does not answer") from error
        if "error" not in reply:
            return reply
        failed: SnapchainError = _ERRORS.get(reply["kind"], Unavailable)(
            reply["error"], subject=reply["subject"], hint=reply["hint"]
        )
        raise failed


_START_SECONDS = 30.0
"""What a busy machine may need to start a Python."""
_LIBVIRT_SECONDS = 20.0
"""What libvirt may need for a command besides the agent's own time."""


def _encoded(orders: Orders) -> str:
    return json.dumps({name: getattr(orders, name) for name in Orders.__slots__})


def _line(from_: socket.socket, read: bytearray) -> dict[str, Any]:
    """The next message; OSError at the end."""
    while b"\n" not in read:
        data = from_.recv(_LINE)
        if not data:
            raise ConnectionResetError
        read += data
    line, _, rest = bytes(read).partition(b"\n")
    read[:] = rest
    message: dict[str, Any] = json.loads(line)
    return message


# --- Its side.


def main(fd: int, argument: str) -> None:
    """The process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    os.closerange(fd + 1, min(_MOST_FDS, os.sysconf("SC_OPEN_MAX")))
    spare_from_memory_shortage()
    values = json.loads(argument)
    process = values.pop("process")
    orders = Orders(**values, process=None if process is None else (process[0], process[1]))
    _Guard(socket.socket(fileno=fd), orders, open_agent(orders.agent)).work()


_MOST_FDS = 65536


class _Guard:
    def __init__(self, client: socket.socket, orders: Orders, agent: ConnectedAgent) -> None:
        self._client, self._orders, self._agent = client, orders, agent
        self._read = bytearray()
        self._until: float | None = None
        """When it thaws by itself. None: nothing is frozen."""

    def work(self) -> None:
        with self._agent.connected():
            while self._has_order() and self._carry_out(_line(self._client, self._read)):
                pass
            # Nothing that is ordered from now on is carried out, so nothing freezes the guest again.
            self._client.close()
            if self._until is not None:
                self._thaw_for_good()
        with suppress(SnapchainError):  # the next run removes it
            files.remove(Path(self._orders.record))

    def _has_order(self) -> bool:
        """Wait for the next order; False when there will be none, or the time is up."""
        if b"\n" in self._read:
            return True
        left = None if self._until is None else max(self._until - time.monotonic(), 0.0)
        if not is_readable(self._client, left):
            return False
        try:
            data = self._client.recv(_LINE)
        except OSError:
            return False
        self._read += data
        return bool(data) and (b"\n" in self._read or self._has_order())

    def _carry_out(self, order: dict[str, Any]) -> bool:
        """Whether more orders may come."""
        try:
            match order["do"]:
                case "ping":
                    self._agent.ping(timeout=order["timeout"])
                    return self._say({})
                case "freeze":
                    return self._say({"filesystems": self._freeze(order["timeout"])})
                case _:
                    count = self._agent.thaw(timeout=THAW_SECONDS)
                    self._until = None
                    self._say({"filesystems": count})
                    return False
        except SnapchainError as error:
            self._say({"error": error.message, "kind": error.kind, "subject": error.subject, "hint": error.hint})
            return self._until is None and order["do"] == "ping"

    def _freeze(self, timeout: float) -> int:
        self._until = time.monotonic() + self._orders.time_limit
        try:
            return self._agent.freeze(timeout=min(timeout, self._orders.time_limit))
        except NoReply as error:
            if not error.was_sent:
                self._until = None
            raise
        except Busy:  # another program has frozen it, and will thaw it
            self._until = None
            raise

    def _say(self, reply: dict[str, object]) -> bool:
        with suppress(OSError):
            self._client.sendall(json.dumps(reply).encode() + b"\n")
            return True
        return False

    def _thaw_for_good(self) -> None:
        pause = _FIRST_PAUSE
        while self._orders.guest_lives():
            with suppress(SnapchainError):
                self._agent.thaw(timeout=THAW_SECONDS)
            with suppress(SnapchainError):
                # Commands are carried out in their order: after this reply none of ours is left to happen.
                if not self._agent.is_frozen(timeout=THAW_SECONDS):
                    return
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
