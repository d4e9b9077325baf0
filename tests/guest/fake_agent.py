"""A guest agent as qemu-ga behaves on its virtio-serial port, with faults that a test asks for.

Like QEMU's socket it serves one client at a time, and like the agent it has one queue: what it is late with delays all
that was sent after it, and a late reply goes to whoever is connected then.
"""

from __future__ import annotations

import json
import socket
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.waiting import wait_until


class FakeAgent:
    """frozen: now; log: the commands that were carried out, in order

    hold: commands that are kept until `release`: as an agent that hangs in its hook; lose: whose reply is lost
    replies: raw bytes in place of the reply to a command; filesystems: that a freeze freezes
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.frozen = False
        self.filesystems = 2
        self.log: list[str] = []
        self.froze = 0
        self.hold: set[str] = set()
        self.lose: set[str] = set()
        self.replies: dict[str, bytes] = {}
        self.before_sync = b""
        self._may_go_on = threading.Event()
        self._queue: deque[bytes] = deque()
        self._arrived = threading.Condition()
        self._client: socket.socket | None = None
        self._ended = False
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(1)
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._accept, self._work)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        self._may_go_on.set()
        with self._arrived:
            self._arrived.notify_all()
        # Closing alone would wake no thread that waits in it.
        for each in (self._server, self._client):
            if each is not None:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._server.close()

    def release(self) -> None:
        """What is held back goes on, and nothing is held any more."""
        self.hold.clear()
        self._may_go_on.set()

    @property
    def waits(self) -> bool:
        """Whether it hangs in a command."""
        return self._hanging

    _hanging = False

    def _accept(self) -> None:
        while not self._ended:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            self._client = client
            read = b""
            while True:
                try:
                    data = client.recv(65536)
                except OSError:
                    break
                if not data:
                    break
                read += data
                *lines, read = read.split(b"\n")
                with self._arrived:
                    self._queue.extend(lines)
                    self._arrived.notify()
            self._client = None
            client.close()

    def _work(self) -> None:
        half = b""
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._queue or self._ended)
                if self._ended:
                    return
                line = self._queue.popleft()
            line, half = half + line, b""
            if b"\xff" in line:
                self._say(b'{"error": {"class": "GenericError", "desc": "JSON parse error, stray"}}\n')
                line = line.rpartition(b"\xff")[2]
            try:
                message = json.loads(line)
            except ValueError:
                continue
            self._carry_out(message)

    def _carry_out(self, message: dict[str, Any]) -> None:
        name = message["execute"]
        if name in self.hold:
            self._hanging = True
            self._may_go_on.wait()
            self._hanging = False
        self.log.append(name)
        reply: dict[str, Any]
        match name:
            case "guest-sync-delimited":
                self._say(self.before_sync)
                self._say(b"\xff" + json.dumps({"return": message["arguments"]["id"]}).encode() + b"\n")
                return
            case "guest-fsfreeze-status":
                reply = {"return": "frozen" if self.frozen else "thawed"}
            case "guest-fsfreeze-freeze" if self.frozen:
                words = (
                    "The command guest-fsfreeze-freeze has been disabled for this instance: agent is in frozen state"
                )
                reply = {"error": {"class": "CommandNotFound", "desc": words}}
            case "guest-fsfreeze-freeze":
                self.frozen = self.filesystems > 0
                self.froze += 1
                reply = {"return": self.filesystems}
            case "guest-fsfreeze-thaw":
                count, self.frozen = (self.filesystems if self.frozen else 0), False
                reply = {"return": count}
            case _:
                reply = {"return": {}}
        if name in self.lose:
            return
        self._say(self.replies.get(name, json.dumps(reply).encode() + b"\n"))

    def _say(self, data: bytes) -> None:
        try:
            wait_until(lambda: self._client is not None or self._ended)
            if self._client is not None:
                self._client.sendall(data)
        except OSError:
            return
