"""A stream of bytes in each direction, over descriptors: a pipe to ssh, or the standard streams that ssh gave us.

    channel.write([head, body])       all of it, or an error of the tree
    channel.read_into(buffer)         fills it; fewer bytes only at the end of the stream
    channel.read(65536)               what is there, at least a byte; b"" at the end

One thread may read while another writes, neither waits for the other, and nothing is held back in between: a write
returns when the bytes are in the kernel's hands.  A wait in which nothing moves ends after `patience` seconds, so a
dead link is noticed.  `abort` may come from any thread, and ends both directions at once.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from snapchain.errors import Unavailable
from snapchain.host.batches import Buffer, batches, rest

PATIENCE = 300.0
"""Seconds. A link that is cut for half a minute comes back: TCP sends again what was lost."""
_READ_AHEAD = 64 << 10
_AGAIN = "run it again: it resumes where it stopped"


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
    """Owns its descriptors, which are pipes, sockets, terminals or files; a context manager.

    reader, writer: either may be -1 where nothing is read or written; they may be one socket
    peer: names the other side in errors
    patience: seconds without a byte moved that a read or a write bears
    """

    def __init__(self, reader: int, writer: int, *, peer: str, patience: float = PATIENCE) -> None:
        self.peer = peer
        self.patience = patience
        self.bytes_read = 0
        self.bytes_written = 0
        self._reader, self._writer = reader, writer
        self._ahead = memoryview(bytearray(_READ_AHEAD))
        self._first = self._stop = 0
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._aborted = threading.Event()
        self._wake = Bell()
        self._blocking = {fd: os.get_blocking(fd) for fd in (reader, writer) if fd >= 0}
        for fd in self._blocking:
            os.set_blocking(fd, False)

    # ---- bytes

    def read(self, size: int, *, patience: float | None = None) -> bytes:
        """From 1 to `size` bytes as soon as there are any; b"" when the other side has ended in good order.

        Raises Unavailable when nothing comes for `patience` seconds (by default the channel's), after `abort`, and
        whatever the end of the other side's program means.
        """
        buffer = memoryview(bytearray(size))
        with self._reading:
            return bytes(buffer[: self.receive(buffer, patience)])

    def read_into(self, buffer: memoryview) -> int:
        """Fill the buffer; fewer bytes only when the other side has ended in good order. Raises as `read` does."""
        done = 0
        with self._reading:
            while done < len(buffer):
                count = self.receive(buffer[done:])
                if not count:
                    break
                done += count
        return done

    def receive(self, buffer: memoryview, patience: float | None = None) -> int:
        """Of what was read ahead, or of what comes; 0 at the end. For who alone reads from the channel."""
        # Small pieces are not worth a system call each.
        if self._first == self._stop:
            if len(buffer) >= _READ_AHEAD:
                return self._receive(buffer, patience)
            self._first, self._stop = 0, self._receive(self._ahead, patience)
        count = min(len(buffer), self._stop - self._first)
        buffer[:count] = self._ahead[self._first : self._first + count]
        self._first += count
        return count

    def _receive(self, buffer: memoryview, patience: float | None = None) -> int:
        """What one system call brings."""
        while True:
            self._check()
            if self._reader < 0:
                raise Unavailable("the connection is closed for reading", subject=self.peer)
            try:
                count = os.readv(self._reader, [buffer])
            except BlockingIOError:
                self._wait(self._reader, select.POLLIN, patience)
                continue
            except OSError as error:
                raise self._lost() from error
            if not count:
                self._ended()
            self.bytes_read += count
            return count

    def starts_with(self, magic: bytes) -> bool:
        """Whether the next bytes are these; they are still to be read. Waits for as many as it takes to tell."""
        with self._reading:
            while True:
                ahead = bytes(self._ahead[self._first : self._stop])[: len(magic)]
                if ahead == magic or not magic.startswith(ahead):
                    return ahead == magic
                self._ahead[: len(ahead)] = ahead
                count = self._receive(self._ahead[len(ahead) :])
                self._first, self._stop = 0, len(ahead) + count
                if not count:
                    return False

    def write(self, data: Buffer | Sequence[Buffer]) -> None:
        """Hand over all of it, several buffers one behind the other.

        Raises Unavailable when nothing can be handed over for `patience` seconds, after `abort`, and whatever the
        end of the other side's program means; it may have said more before, to be read.
        """
        parts = [data] if isinstance(data, bytes | bytearray | memoryview) else data
        with self._writing:
            for batch in batches(parts):
                left = batch
                while left:
                    left = rest(left, self.give(left))

    def give(self, batch: Sequence[Buffer]) -> int:
        """How much of it one system call took. For who alone writes to the channel."""
        while True:
            self._check()
            if self._writer < 0:
                raise Unavailable("the connection is closed for writing", subject=self.peer)
            try:
                count = os.writev(self._writer, batch)
            except BlockingIOError:
                self._wait(self._writer, select.POLLOUT, None)
                continue
            except OSError as error:
                raise self._lost() from error
            self.bytes_written += count
            return count

    def finish_writing(self) -> None:
        """The other side reads the end of the stream; reading goes on."""
        with self._writing:
            writer, self._writer = self._writer, -1
            if writer == self._reader and writer >= 0:
                with suppress(OSError), socket.socket(fileno=os.dup(writer)) as both:
                    both.shutdown(socket.SHUT_WR)
            else:
                self._release(writer)

    def detach(self) -> tuple[int, int]:
        """Give the descriptors, reader and writer, to the caller; the channel is closed. Nothing may be read ahead."""
        with self._reading, self._writing:
            assert self._first == self._stop, "bytes would be lost"
            descriptors = self._reader, self._writer
            self._reader = self._writer = -1
            self._wake.close()
        return descriptors

    # ---- the end

    def close(self) -> None:
        """End in good order. Raises what the end of the other side's program means, if that was no good one.

        Harmless when repeated.
        """
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
            self.abandon()

    def abandon(self) -> None:
        """End it now, in whatever order. Harmless when repeated."""
        self.abort()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        self.finish_writing()
        with self._reading, self._writing:
            reader, self._reader = self._reader, -1
            self._release(reader)
            self._wake.close()

    def _release(self, descriptor: int) -> None:
        if descriptor >= 0:
            os.set_blocking(descriptor, self._blocking[descriptor])  # it may be shared: a shell gets it back as it was
            os.close(descriptor)

    # ---- what a channel to a program knows better

    def _lost(self) -> Exception:
        """Why the other side takes or gives no more."""
        return Unavailable("the connection was closed by the other side", subject=self.peer, hint=_AGAIN)

    def _ended(self) -> None:
        """The other side has ended its stream: raise, unless that is in order."""

    # ---- waiting

    def _check(self) -> None:
        if self._aborted.is_set():
            raise Unavailable("the connection was ended here", subject=self.peer)

    def _wait(self, descriptor: int, event: int, patience: float | None) -> None:
        """Until the descriptor is ready, `abort`, or the end of patience."""
        bearable = self.patience if patience is None else patience
        poll = select.poll()
        poll.register(descriptor, event)
        poll.register(self._wake, select.POLLIN)
        until = time.monotonic() + bearable
        while True:
            left = max(0.0, until - time.monotonic())
            if poll.poll(left * 1000):
                return
            if left == 0.0:
                doing = "came from it" if event == select.POLLIN else "was taken by it"
                raise Unavailable(
                    f"nothing {doing} for {bearable:g} seconds",
                    subject=self.peer,
                    hint=f"look at the link and at the other host, then {_AGAIN}",
                )


# --- The standard streams that sshd has given this process, as a channel.
#
# From then on only the channel uses them. Other code that reads stdin finds it empty, and whatever prints to stdout, a
# library or a child, prints to stderr instead, which ssh shows to the user: nothing gets into the stream.


def stdio_channel(*, patience: float = PATIENCE) -> Channel:
    """The channel to whoever started us. To be called once, before anything is printed."""
    reader, writer = os.dup(0), os.dup(1)  # not inherited by programs that we start
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return Channel(reader, writer, peer=caller(os.environ), patience=patience)


def caller(environ: Mapping[str, str]) -> str:
    """Who is at the other end, as sshd tells it."""
    words = environ.get("SSH_CONNECTION", "").split()
    return words[0] if words else "the other side"
