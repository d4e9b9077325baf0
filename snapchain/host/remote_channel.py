"""A stream of bytes in each direction, over two descriptors: a pipe to ssh, or the standard streams that ssh gave us.

    channel.write(frame)            all of it, or an error of the tree
    channel.read(65536)             what is there, at least a byte; b"" is the end

One thread may read while another writes, neither waits for the other, and nothing is held back in between: a write
returns when the bytes are in the kernel's hands.  A wait in which nothing moves ends after `patience` seconds, so a
dead link is noticed.  `abort` may come from any thread, and ends both directions at once.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from snapchain.errors import Unavailable

PACED_PIECE = 32 << 10
"""Bytes written at once under a rate limit: small, so that a slow stream still moves all the time."""

_Buffer = bytes | bytearray | memoryview


class Bell:
    """Wakes a thread that polls `fileno`; may be rung by any thread, at any time, also when it is closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._event: int | None = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return -1 if self._event is None else self._event

    def ring(self) -> None:
        with self._lock:  # else the number could be another file's by now
            if self._event is not None:
                os.eventfd_write(self._event, 1)

    def close(self) -> None:
        with self._lock:
            event, self._event = self._event, None
            if event is not None:
                os.close(event)


class Channel:
    """Two descriptors, which it closes at the end. name: the other side, for messages.

    patience: seconds without a byte moved that a read or a write bears, None for ever; pace: is told of each piece
    before it is written and waits as long as it likes, such as the `take` of a token bucket.
    """

    def __init__(
        self,
        reader: int,
        writer: int,
        *,
        name: str,
        patience: float | None = None,
        pace: Callable[[int], None] | None = None,
    ) -> None:
        self.name = name
        self.bytes_read = 0
        self.bytes_written = 0
        self._reader: int | None = reader
        self._writer: int | None = writer
        self._patience = patience
        self._pace = pace
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._aborted = threading.Event()
        self._wake = Bell()
        self._blocking = [(fd, os.get_blocking(fd)) for fd in (reader, writer)]
        for fd in (reader, writer):
            os.set_blocking(fd, False)

    # ---- bytes

    def read(self, size: int, *, patience: float | None = None) -> bytes:
        """From 1 to `size` bytes as soon as there are any; b"" when the other side has ended in good order.

        Raises Unavailable when nothing comes for `patience` seconds (by default the channel's), after `abort`, and
        whatever the end of the other side's program means.
        """
        with self._reading:
            while self._reader is not None:
                self._check()
                try:
                    piece = os.read(self._reader, size)
                except BlockingIOError:
                    self._wait(self._reader, select.POLLIN, patience)
                    continue
                except OSError as error:
                    raise self._lost() from error
                if not piece:
                    break
                self.bytes_read += len(piece)
                return piece
        self._check()
        self._ended()
        return b""

    def write(self, data: _Buffer) -> None:
        """Hand over all of it.

        Raises Unavailable when nothing can be handed over for `patience` seconds, after `abort`, and whatever the
        end of the other side's program means; it may have said more before, to be read.
        """
        view = memoryview(data).cast("B")
        with self._writing:
            if self._pace is None:
                self._write(view)
                return
            for start in range(0, len(view), PACED_PIECE):
                piece = view[start : start + PACED_PIECE]
                self._pace(len(piece))
                self._write(piece)

    def _write(self, view: memoryview) -> None:
        while view:
            self._check()
            if self._writer is None:
                raise Unavailable("the connection is closed for writing", subject=self.name)
            try:
                written = os.write(self._writer, view)
            except BlockingIOError:
                self._wait(self._writer, select.POLLOUT, None)
                continue
            except OSError as error:
                raise self._lost() from error
            self.bytes_written += written
            view = view[written:]

    def finish_writing(self) -> None:
        """The other side reads the end of the stream; reading goes on."""
        with self._writing:
            writer, self._writer = self._writer, None
            if writer is not None:
                self._release(writer)

    # ---- the end

    def close(self) -> None:
        """End in good order. Raises what the end of the other side's program means, if that was no good one."""
        self.finish_writing()
        self._close_descriptors()

    def abort(self) -> None:
        """End at once, from any thread: whoever reads or writes gets Unavailable. Never raises."""
        self._aborted.set()
        self._wake.ring()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        self.finish_writing()
        with self._reading, self._writing:
            reader, self._reader = self._reader, None
            if reader is not None:
                self._release(reader)
                self._wake.close()

    def _release(self, descriptor: int) -> None:
        for fd, blocking in self._blocking:
            if fd == descriptor:
                os.set_blocking(fd, blocking)  # standard streams may be shared with others
        os.close(descriptor)

    # ---- what a channel to a program knows better

    def _lost(self) -> Exception:
        """Why the other side takes or gives no more."""
        return Unavailable("the connection was closed by the other side", subject=self.name)

    def _ended(self) -> None:
        """The other side has ended its stream: raise, unless that is in order."""

    # ---- waiting

    def _check(self) -> None:
        if self._aborted.is_set():
            raise Unavailable("the connection was ended here", subject=self.name)

    def _wait(self, descriptor: int, event: int, patience: float | None) -> None:
        """Until the descriptor is ready, `abort`, or the end of patience."""
        bearable = self._patience if patience is None else patience
        poll = select.poll()
        poll.register(descriptor, event)
        poll.register(self._wake, select.POLLIN)
        until = None if bearable is None else time.monotonic() + bearable
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            if poll.poll(None if left is None else left * 1000):
                return
            if left == 0.0:
                doing = "came" if event == select.POLLIN else "was taken"
                raise Unavailable(
                    f"nothing {doing} for {bearable:g} seconds",
                    subject=self.name,
                    hint="the host or the way to it is down or overloaded; the same command goes on from here",
                )
