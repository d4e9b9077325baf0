"""A bad link between two descriptors of one process, at exact bytes: cut, flipped, lost, stalled, in tiny pieces.

    with chaos(up=Fault(cut_at=1000)) as (here, there, link):
        with Channel(here, here, peer="there") as sender, Channel(there, there, peer="here") as receiver: ...

`here` and `there` are sockets' descriptors that the caller closes; up is from here to there.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tests.waiting import HANG


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one direction, by the number of bytes that have gone this way; nothing by default.

    cut_at: from then on both directions are dead; flip_at: that *bit* is the other one; lose: (from, to) vanish;
    stall_at: nothing more until `Link.release`; piece: bytes moved at once
    """

    cut_at: int | None = None
    flip_at: int | None = None
    lose: tuple[int, int] | None = None
    stall_at: int | None = None
    piece: int = 1 << 16


class Link:
    """The way between the two ends. passed: bytes that came out, up and down."""

    def __init__(self, here: socket.socket, there: socket.socket, up: Fault, down: Fault) -> None:
        self.passed = [0, 0]
        self.stalled = threading.Event()
        self._released = threading.Event()
        self._here, self._there = here, there
        self._threads = [
            threading.Thread(target=self._carry, args=arguments, daemon=True)
            for arguments in ((0, here, there, up), (1, there, here, down))
        ]
        for thread in self._threads:
            thread.start()

    def release(self) -> None:
        """End all stalls."""
        self._released.set()

    def cut(self) -> None:
        """Both ends see the connection gone."""
        for end in (self._here, self._there):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _carry(self, way: int, source: socket.socket, sink: socket.socket, fault: Fault) -> None:
        seen = 0
        try:
            while piece := source.recv(self._size(seen, fault)):
                first, seen = seen, seen + len(piece)
                sink.sendall(self._spoilt(piece, first, fault))
                self.passed[way] += len(piece)
                if fault.stall_at is not None and seen == fault.stall_at:
                    self.stalled.set()
                    self._released.wait()
                if fault.cut_at is not None and seen == fault.cut_at:
                    self.cut()
                    return
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # an end is gone: so is the other
            self.cut()

    def _size(self, seen: int, fault: Fault) -> int:
        """Up to the next byte at which something happens."""
        marks = [mark - seen for mark in (fault.cut_at, fault.stall_at) if mark is not None and mark > seen]
        return min([fault.piece, *marks])

    def _spoilt(self, piece: bytes, first: int, fault: Fault) -> bytes:
        spoilt = bytearray(piece)
        if fault.flip_at is not None and first <= fault.flip_at // 8 < first + len(piece):
            spoilt[fault.flip_at // 8 - first] ^= 1 << fault.flip_at % 8
        if fault.lose is not None:
            start, stop = (min(max(edge - first, 0), len(piece)) for edge in fault.lose)
            del spoilt[start:stop]
        return bytes(spoilt)

    def end(self) -> None:
        self.release()
        self.cut()
        for thread in self._threads:
            thread.join(HANG)
            assert not thread.is_alive(), "a direction of the link does not end"


@contextmanager
def chaos(*, up: Fault | None = None, down: Fault | None = None) -> Iterator[tuple[int, int, Link]]:
    """Two descriptors, the caller's to close, and the link between them."""
    (here, near), (there, far) = socket.socketpair(), socket.socketpair()
    with near, far:
        link = Link(near, far, up or Fault(), down or Fault())
        try:
            yield here.detach(), there.detach(), link
        finally:
            link.end()
