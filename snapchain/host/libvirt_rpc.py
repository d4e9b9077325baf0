"""A connection of virsh to libvirt that goes through us, because of two calls of a migration.

    virsh -- socket of ours -- libvirtd

Before Perform, the block waits for a last check: since Begin libvirt lets nobody change the chains of the disks.

Confirm, the last call, is never made.  It tells the source what became of Finish at the destination.  When that answer
was lost, virsh says that it has failed, and libvirt lets the guest go on here while it runs there: tried with libvirt
9.0.  So the connection ends before that call.  libvirt then leaves the guest paused, for whoever finds out.

Of libvirt's protocol only the header of a message is read, seven numbers of 4 bytes; they are the same in all versions:

    length of the message, program, version, procedure, type, serial, status
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from snapchain.errors import SnapchainError, Unavailable
from snapchain.host.os_errors import os_errors

_HEADER = struct.Struct(">7I")
_PROGRAM = 0x20008086
PERFORM = frozenset({216, 305})
CONFIRM = frozenset({218, 307})
"""Procedures: DOMAIN_MIGRATE_PERFORM3 and _CONFIRM3, and the same with typed parameters."""
_CALL = 0
_LONGEST = (32 << 20) + 4
_PIECE = 256 << 10


class Carried:
    """The connections of one virsh. fault: what the last check has raised, None where it was fine"""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self.fault: SnapchainError | None = None

    def goes_on(self, message: bytes) -> bool:
        """Whether a message is passed on; else the connection ends."""
        _, program, _, procedure, kind, _, _ = _HEADER.unpack_from(message)
        if program != _PROGRAM or kind != _CALL:
            return True
        if procedure in PERFORM:
            try:
                self._check()
            except SnapchainError as error:
                self.fault = error
                return False
        return procedure not in CONFIRM


@contextmanager
def without_confirm(ours: Path, daemon: Path, check: Callable[[], None]) -> Iterator[Carried]:
    """Carry connections from a socket that is made at `ours` to the daemon's, for the length of the block.

    check: called before Perform, on another thread; what it raises ends the connection
    """
    with os_errors(ours), socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(ours))
        listening.listen(8)
        carried = Carried(check)
        carrier = _Carrier(listening, daemon, carried)
        try:
            yield carried
        finally:
            carrier.close()


class _Carrier:
    def __init__(self, listening: socket.socket, daemon: Path, carried: Carried) -> None:
        self._listening, self._daemon, self._carried = listening, str(daemon), carried
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="libvirt", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            _end(*self._ends, self._listening)
        self._thread.join()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                theirs, _ = self._listening.accept()
            except OSError:  # closed
                return
            thread = threading.Thread(target=self._carry, args=(theirs,), name="libvirt", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _carry(self, theirs: socket.socket) -> None:
        """One connection, to its end."""
        with theirs, socket.socket(socket.AF_UNIX) as daemon:
            with self._lock:
                self._ends += [theirs, daemon]
                if self._closed:
                    return
            try:
                daemon.connect(self._daemon)
            except OSError:  # virsh finds its connection ended
                return
            answers = threading.Thread(target=_answers, args=(daemon, theirs), name="libvirt", daemon=True)
            answers.start()
            _calls(theirs, daemon, self._carried)
            answers.join()


def _calls(source: socket.socket, sink: socket.socket, carried: Carried) -> None:
    """Whole messages up to the first that does not go on; then both sides find the connection ended."""
    with suppress(OSError, Unavailable):  # an end like any other: whoever is left notices it
        for message in _messages(source):
            if not carried.goes_on(message):
                break
            sink.sendall(message)
    _end(source, sink)


def _answers(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(_PIECE):
            sink.sendall(piece)
    _end(source, sink)


def _end(*ends: socket.socket) -> None:
    for each in ends:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def _messages(source: socket.socket) -> Iterator[bytes]:
    """Raises Unavailable for what is none."""
    pending = bytearray()
    while piece := source.recv(_PIECE):
        pending += piece
        while len(pending) >= _HEADER.size:
            length = _HEADER.unpack_from(pending)[0]
            if not _HEADER.size <= length <= _LONGEST:
                raise Unavailable("not libvirt's protocol", subject="virsh")
            if len(pending) < length:
                break
            yield bytes(pending[:length])
            del pending[:length]
