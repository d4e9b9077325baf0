"""The server: listens, gives each client a thread, and ends them all.

Clients beyond the limit are disconnected at once, so that the others keep what was agreed with them.
"""

from __future__ import annotations

import errno
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from snapchain.errors import SnapchainError
from snapchain.nbd.channel import Gone
from snapchain.nbd.connection import Client, Tally
from snapchain.nbd.exports import Exports

MOST_CLIENTS = 400
"""Threads and descriptors: below the usual limit of 1,024 open files."""
_NOT_ENOUGH = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_PAUSE = 0.2
_LOOK_SECONDS = 1.0

OnFault = Callable[[str, int, int, Exception], None]


class Server:
    """Serves exports on sockets that listen already. A context manager: at its end all clients are disconnected.

    on_fault: gets the export, offset, length and error of each read that fails; on_note: words for the log
    tally: of the clients that have ended
    """

    def __init__(
        self,
        exports: Exports,
        listening: Sequence[socket.socket],
        *,
        on_fault: OnFault,
        on_note: Callable[[str], None],
        tls: ssl.SSLContext | None = None,
        most_clients: int = MOST_CLIENTS,
    ) -> None:
        self.tally = Tally()
        self.clients = self.refused = 0
        self._exports, self._listening, self._tls = exports, listening, tls
        self._on_fault, self._on_note, self._most = on_fault, on_note, most_clients
        self._changed = threading.Condition()
        self._ends: dict[socket.socket, threading.Thread] = {}
        self._served: set[socket.socket] = set()
        self._closed = False

    def __enter__(self) -> Self:
        self._acceptors = [
            threading.Thread(target=self._accept, args=(each,), name="nbd accept", daemon=True)
            for each in self._listening
        ]
        for thread in self._acceptors:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            threads = list(self._ends.values())
            for each in [*self._listening, *self._ends]:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        self._exports.end()
        for thread in [*self._acceptors, *threads]:
            thread.join()

    def wait_for_last(self) -> None:
        """Wait until a client has opened an export, and no client has one open any more."""
        with self._changed:
            # A signal that another thread gets does not wake this one.
            while not self._changed.wait_for(lambda: self.clients > 0 and not self._served, _LOOK_SECONDS):
                pass

    @property
    def connected(self) -> int:
        """Clients that are connected now."""
        return len(self._ends)

    def _accept(self, listening: socket.socket) -> None:
        while not self._closed:
            try:
                connected, _ = listening.accept()
            except OSError as error:
                if error.errno in _NOT_ENOUGH:  # until another client has gone
                    with self._changed:
                        self._changed.wait(_PAUSE)
                continue
            self._begin(connected)

    def _begin(self, connected: socket.socket) -> None:
        thread = threading.Thread(target=self._serve, args=(connected,), name="nbd client", daemon=True)
        with self._changed:
            is_welcome = not self._closed and len(self._ends) < self._most
            if is_welcome:
                self._ends[connected] = thread
        if not is_welcome:
            self.refused += 1
            connected.close()
            return
        try:
            thread.start()
        except RuntimeError:  # no more threads
            self.refused += 1
            self._leave(connected)

    def _serve(self, connected: socket.socket) -> None:
        client = Client(connected, self._exports, self._on_fault, self._tls)
        try:
            if connected.family != socket.AF_UNIX:
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            client.serve(lambda: self._has_begun(connected))
        except (Gone, OSError):
            pass
        except SnapchainError as error:
            self._on_note(f"a client was disconnected: {error}")
        finally:
            self._leave(connected, client.tally)

    def _has_begun(self, connected: socket.socket) -> None:
        with self._changed:
            self.clients += 1
            self._served.add(connected)

    def _leave(self, connected: socket.socket, tally: Tally | None = None) -> None:
        with self._changed:
            # Under the lock: the end of the server shuts down no descriptor that is another file by now.
            connected.close()
            self._ends.pop(connected, None)
            self._served.discard(connected)
            if tally is not None:
                self.tally.add(tally)
            self._changed.notify_all()
