"""An NBD client that only reads: what a guest's QEMU exports of a disk, over a unix socket of this host.

    with NbdExport(socket, "vda") as export:
        export.size
        export.runs("qemu:dirty-bitmap:sc-1")       int64[n], uint32[n]: where runs begin, and their flags
        export.read_into(offset, buffer)            thread-safe: each thread takes a connection of its own

Fixed newstyle, NBD_OPT_GO, structured replies and metadata contexts, as the NBD project's doc/proto.md has them.  The
server is not trusted: each length is bounded before memory is taken, each byte that was asked for must come exactly
once, and each request has one deadline, however slowly the bytes trickle.
"""

from __future__ import annotations

import queue
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from snapchain.errors import Corrupt, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.model.extents import Int64s

SECONDS = 60.0
"""The deadline of a request."""
CONNECTIONS = 4
ALLOCATION = "base:allocation"
ZERO = 2
"""A flag of `base:allocation`. A flag of 1 of a dirty bitmap: written since it began to record."""
DIRTY = 1

_READ_BYTES = 32 << 20
"""No server has to take a longer request."""
_AHEAD = 16
"""Requests under way on a connection: as many as QEMU takes from a client."""
_STATUS_BYTES = (1 << 32) - (1 << 20)
_OPTION_BYTES = 64 << 10
_OPTION_REPLIES = 64
_MOST_RUNS = 1 << 24
"""A map of so many runs takes 192 MiB, and describes a terabyte in which every other cluster was written."""
_GRAIN = 512
_LARGEST = 1 << 62

_MAGIC, _HAVE_OPTION, _OPTION_REPLY = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_REQUEST, _SIMPLE, _CHUNK = 0x25609513, 0x67446698, 0x668E33EF
_GREETING = struct.Struct(">QQH")
_OPTION = struct.Struct(">QII")
_OPTION_HEAD = struct.Struct(">QIII")
_COMMAND = struct.Struct(">IHHQQI")
_CHUNK_HEAD = struct.Struct(">HHQI")
_SIMPLE_REST = struct.Struct(">IQ")
_U16, _U32, _U64 = struct.Struct(">H"), struct.Struct(">I"), struct.Struct(">Q")
_HOLE_CHUNK = struct.Struct(">QI")
_ERROR_HEAD = struct.Struct(">IH")


class _Option(IntEnum):
    GO = 7
    STRUCTURED_REPLY = 8
    SET_META_CONTEXT = 10


class _Reply(IntEnum):
    ACK = 1
    INFO = 3
    META_CONTEXT = 4


class _Command(IntEnum):
    READ = 0
    DISCONNECT = 2
    BLOCK_STATUS = 7


class _Chunk(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5


_FIXED, _NO_ZEROES = 1, 2
_DONE = 1
_IS_ERROR = 1 << 15
_REFUSED = 1 << 31
_UNKNOWN_EXPORT = _REFUSED + 6
_ERRORS = {1: "not permitted", 5: "I/O error", 12: "no memory", 22: "invalid argument", 28: "no space", 75: "too large",
           95: "not supported", 108: "shutting down"}  # fmt: skip


class ConnectionLostError(Unavailable):
    """The server hung up."""


class Connection:
    """One connection to an export; a context manager. For one thread at a time.

    size: of the export, bytes; context: the one metadata context that `runs` asks for, None for none
    """

    def __init__(
        self,
        path: Path,
        export: str,
        *,
        context: str | None = None,
        unit: int = _READ_BYTES,
        seconds: float = SECONDS,
    ) -> None:
        """Connect and negotiate. unit: bytes, at whose multiples requests for data end.

        Raises NotFound for an export or context that the server does not have, Unavailable where nobody answers,
        Unsupported for a server without structured replies, Corrupt for one that breaks the protocol.
        """
        self._subject = f"NBD export {export} at {path}"
        self._seconds, self._unit, self._handle, self._context_id = seconds, unit, 0, -1
        self._end = time.monotonic() + seconds
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(seconds)
            try:
                self._socket.connect(str(path))
            except OSError as error:
                raise Unavailable(f"nobody answers: {error.strerror or error}", subject=self._subject) from error
            self.size = self._negotiated(export, context)
        except BaseException:
            self._socket.close()
            raise

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes from `offset` on.

        Raises Unavailable where the server reports an error, naming the range, or does not answer in time; Corrupt
        where it breaks the protocol. After an error the connection is not used again.
        """
        view = buffer.cast("B")
        pieces: deque[_Piece] = deque()
        at = 0
        try:
            while at < len(view) or pieces:
                # Some requests ahead of the replies, so that the server never waits for us.
                while at < len(view) and len(pieces) < _AHEAD:
                    stop = min(len(view), (offset + at) // self._unit * self._unit + self._unit - offset)
                    handle = self._request(_Command.READ, offset + at, stop - at)
                    pieces.append(_Piece(handle, offset + at, view[at:stop]))
                    at = stop
                self._read(pieces)
        except ConnectionLostError as error:
            # QEMU 7.2 hangs up where a read fails in the middle of a reply.
            first = pieces[0].offset if pieces else offset + at
            words = f"bytes {first} to {offset + len(view)} cannot be read: {error.message}"
            raise Unavailable(words, subject=self._subject) from error

    def runs(self) -> tuple[Int64s, npt.NDArray[np.uint32]]:
        """(int64[n], uint32[n]): where runs of equal flags begin, ascending from 0, and the flags. Errors as reading.

        Asks again with a deadline of its own each time, for as long as the server gets on.
        """
        starts: list[Int64s] = []
        flags: list[npt.NDArray[np.uint32]] = []
        count = at = 0
        while at < self.size:
            lengths, found = self._status(at, min(_STATUS_BYTES, self.size - at))
            ends = at + np.cumsum(lengths)
            begin = np.concatenate([[at], ends[:-1]]).astype(np.int64)
            count += len(begin)
            if count > _MOST_RUNS:
                raise Unsupported(f"its map has more than {_MOST_RUNS} runs", subject=self._subject)
            inside = begin < self.size  # the last run of a reply may be longer than what was asked for
            starts.append(begin[inside])
            flags.append(found[inside])
            at = int(ends[-1])
        if not starts:
            return np.zeros(0, np.int64), np.zeros(0, np.uint32)
        return np.concatenate(starts), np.concatenate(flags)

    def close(self) -> None:
        """Say goodbye, and close. Idempotent."""
        with suppress(OSError):
            self._socket.settimeout(1)
            self._socket.sendall(_COMMAND.pack(_REQUEST, 0, _Command.DISCONNECT, 0, 0, 0))
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- negotiation

    def _negotiated(self, export: str, context: str | None) -> int:
        magic, options, flags = _GREETING.unpack(self._take(_GREETING.size))
        if magic != _MAGIC or options != _HAVE_OPTION:
            raise Corrupt("it is no NBD server of the newstyle", subject=self._subject)
        if not flags & _FIXED:
            raise Unsupported("the NBD server does not offer fixed newstyle", subject=self._subject)
        self._send(_U32.pack(flags & (_FIXED | _NO_ZEROES)))
        if any(True for _ in self._asked(_Option.STRUCTURED_REPLY, b"")):
            raise self._broken("an answer where none belongs")
        name = export.encode()
        if context is not None:
            wanted = context.encode()
            body = _U32.pack(len(name)) + name + _U32.pack(1) + _U32.pack(len(wanted)) + wanted
            for kind, data in self._asked(_Option.SET_META_CONTEXT, body):
                if kind == _Reply.META_CONTEXT and len(data) > _U32.size and data[_U32.size :] == wanted:
                    self._context_id = _U32.unpack_from(data)[0]
            if self._context_id < 0:
                raise NotFound(f"it offers no map {context}", subject=self._subject)
        size: int | None = None
        for kind, data in self._asked(_Option.GO, _U32.pack(len(name)) + name + _U16.pack(0)):
            if kind == _Reply.INFO and len(data) == 12 and _U16.unpack_from(data)[0] == 0:
                size = _U64.unpack_from(data, 2)[0]
        if size is None or size > _LARGEST:
            raise self._broken("an export without a size")
        return size

    def _asked(self, option: _Option, body: bytes) -> Iterator[tuple[int, bytes]]:
        """(type, data) of the replies to an option, up to its ACK."""
        self._send(_OPTION.pack(_HAVE_OPTION, option, len(body)) + body)
        for _ in range(_OPTION_REPLIES):
            magic, which, kind, length = _OPTION_HEAD.unpack(self._take(_OPTION_HEAD.size))
            if magic != _OPTION_REPLY or which != option or length > _OPTION_BYTES:
                raise self._broken("a malformed reply to an option")
            data = bytes(self._take(length))
            if kind == _Reply.ACK:
                return
            if kind == _UNKNOWN_EXPORT:
                raise NotFound("there is no such export", subject=self._subject)
            if kind & _REFUSED:
                words = data[:200].decode(errors="replace")
                raise Unsupported(f"the NBD server refuses {option.name}: {words or kind}", subject=self._subject)
            yield kind, data
        raise self._broken("too many replies to an option")

    # ---- transmission

    def _read(self, pieces: deque[_Piece]) -> None:
        """Take one chunk of any of the requests; those that are complete are gone from `pieces`."""
        done, kind, handle, length = self._head()
        piece = next((each for each in pieces if each.handle == handle), None)
        if piece is None:
            raise self._broken("a reply to no request")
        size = len(piece.view)
        if kind & _IS_ERROR:
            raise self._failed(_Command.READ, piece.offset, size, self._error(length))
        if kind == _Chunk.OFFSET_DATA and length > _U64.size:
            start = _U64.unpack(self._take(_U64.size))[0] - piece.offset
            stop = start + length - _U64.size
        elif kind == _Chunk.OFFSET_HOLE and length == _HOLE_CHUNK.size:
            place, hole = _HOLE_CHUNK.unpack(self._take(length))
            start, stop = place - piece.offset, place - piece.offset + hole
        elif kind == _Chunk.NONE and not length and done:
            start = stop = 0
        else:
            raise self._broken(f"a chunk of type {kind} with {length} bytes in answer to a read")
        if stop:
            if not 0 <= start < stop <= size or len(piece.parts) > size // _GRAIN:
                raise self._broken("data outside of what was asked for")
            piece.parts.append((start, stop))
            if kind == _Chunk.OFFSET_DATA:
                self._fill(piece.view[start:stop])
            else:
                piece.view[start:stop] = bytes(stop - start)
        if done:
            if not piece.is_whole():
                raise self._broken("an answer that does not give each byte exactly once")
            pieces.remove(piece)

    def _status(self, offset: int, length: int) -> tuple[Int64s, npt.NDArray[np.uint32]]:
        handle = self._request(_Command.BLOCK_STATUS, offset, length)
        found: npt.NDArray[np.uint32] | None = None
        done = False
        while not done:
            done, kind, whose, size = self._head()
            if whose != handle:
                raise self._broken("a reply to no request")
            if kind & _IS_ERROR:
                raise self._failed(_Command.BLOCK_STATUS, offset, length, self._error(size))
            if kind == _Chunk.NONE and not size and done:
                break
            most = 2 * 4 * (length // _GRAIN + 2) + 4
            if kind != _Chunk.BLOCK_STATUS or size < 12 or size % 8 != 4 or size > min(most, 2 * 4 * _MOST_RUNS):
                raise self._broken(f"a chunk of type {kind} with {size} bytes in answer to a question for a map")
            data = self._take(size)
            if _U32.unpack_from(data)[0] != self._context_id or found is not None:
                raise self._broken("a map that was not asked for")
            found = np.frombuffer(data, ">u4", offset=4).astype(np.uint32).reshape(-1, 2)
        if found is None:
            raise self._broken("no map where one was asked for")
        lengths = found[:, 0].astype(np.int64)
        # Only the last run of a reply may pass the end of what was asked for; an empty one would never end.
        if not (lengths > 0).all() or int(lengths[:-1].sum()) >= length:
            raise self._broken("a map that does not fit what was asked for")
        return lengths, found[:, 1]

    def _request(self, command: _Command, offset: int, length: int) -> int:
        """Send a request, which also sets the deadline anew; its handle."""
        self._end = time.monotonic() + self._seconds
        self._handle += 1
        self._send(_COMMAND.pack(_REQUEST, 0, command, self._handle, offset, length))
        return self._handle

    def _head(self) -> tuple[bool, int, int, int]:
        """(whether it is the reply's last, type, handle, bytes) of the next chunk; a simple error reply is one, too."""
        magic = _U32.unpack(self._take(_U32.size))[0]
        if magic == _SIMPLE:
            error, handle = _SIMPLE_REST.unpack(self._take(_SIMPLE_REST.size))
            if not error:
                raise self._broken("a simple reply where a structured one was agreed")
            raise Unavailable(f"the NBD server refuses a request: {_named(error)}", subject=self._subject)
        if magic != _CHUNK:
            raise self._broken("bytes that are no reply")
        flags, kind, handle, length = _CHUNK_HEAD.unpack(self._take(_CHUNK_HEAD.size))
        if length > max(_READ_BYTES, 2 * 4 * _MOST_RUNS) + _U64.size:
            raise self._broken("a reply that is too long")
        return bool(flags & _DONE), kind, handle, length

    def _error(self, size: int) -> str:
        if not _ERROR_HEAD.size <= size <= _OPTION_BYTES:
            raise self._broken("a malformed error")
        error, length = _ERROR_HEAD.unpack_from(data := self._take(size))
        if _ERROR_HEAD.size + length > size:
            raise self._broken("a malformed error")
        words = bytes(data[_ERROR_HEAD.size :][:length]).decode(errors="replace")[:200]
        return f"{_named(error)} ({words})" if words and words.isprintable() else _named(error)

    def _failed(self, command: _Command, offset: int, length: int, why: str) -> Unavailable:
        what = "be read" if command is _Command.READ else "be mapped"
        return Unavailable(f"bytes {offset} to {offset + length} cannot {what}: {why}", subject=self._subject)

    def _broken(self, what: str) -> Corrupt:
        return Corrupt(f"the NBD server sent {what}", subject=self._subject)

    # ---- bytes

    def _send(self, data: bytes) -> None:
        try:
            self._socket.settimeout(self._left())
            self._socket.sendall(data)
        except OSError as error:
            raise self._lost(error) from error

    def _take(self, count: int) -> bytearray:
        data = bytearray(count)
        self._fill(memoryview(data))
        return data

    def _fill(self, view: memoryview) -> None:
        while view:
            try:
                self._socket.settimeout(self._left())
                count = self._socket.recv_into(view)
            except OSError as error:
                raise self._lost(error) from error
            if not count:
                raise ConnectionLostError("the NBD server closed the connection", subject=self._subject)
            view = view[count:]

    def _left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _lost(self, error: OSError) -> Unavailable:
        if isinstance(error, TimeoutError):
            return Unavailable(f"the NBD server did not answer within {self._seconds:g} s", subject=self._subject)
        return ConnectionLostError(f"the connection is lost: {error.strerror or error}", subject=self._subject)


@dataclass(slots=True, eq=False)
class _Piece:
    """A request for data. parts: (start, stop) within it that have come."""

    handle: int
    offset: int
    view: memoryview
    parts: list[tuple[int, int]] = field(default_factory=list)

    def is_whole(self) -> bool:
        """Whether each byte came exactly once."""
        at = 0
        for start, stop in sorted(self.parts):
            if start != at:
                return False
            at = stop
        return at == len(self.view)


def _named(error: int) -> str:
    return _ERRORS.get(error, f"error {error}")


class NbdExport:
    """An export, read by several connections; a context manager.

    size: bytes; bytes_read: so many were read so far
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        connections: int = CONNECTIONS,
        unit: int = _READ_BYTES,
        seconds: float = SECONDS,
    ) -> None:
        """unit: as `Connection` has it. Raises as that."""
        self._path, self._name, self._unit, self._seconds = path, name, unit, seconds
        # A place for each connection: None until a thread needs it, and after an error.
        self._places: queue.LifoQueue[Connection | None] = queue.LifoQueue()
        for _ in range(connections - 1):
            self._places.put(None)
        first = self._connected()
        self.size, self.bytes_read = first.size, 0
        self._places.put(first)
        self._count = connections

    def _connected(self, context: str | None = None) -> Connection:
        return Connection(self._path, self._name, context=context, unit=self._unit, seconds=self._seconds)

    def runs(self, context: str) -> tuple[Int64s, npt.NDArray[np.uint32]]:
        """As `Connection.runs`, over a connection of its own. Raises NotFound where the server lacks the context."""
        with self._connected(context) as connection:
            if connection.size != self.size:
                raise Corrupt("its size changed", subject=f"NBD export {self._name} at {self._path}")
            return connection.runs()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on. Thread-safe. Raises as `Connection.read_into`."""
        with self._connection() as connection:
            connection.read_into(offset, buffer)
            self.bytes_read += len(buffer.cast("B"))

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        held = self._places.get()
        usable = None
        try:
            usable = held or self._connected()
            yield usable
        except SnapchainError:
            if usable is not None:
                usable.close()
            usable = None
            raise
        finally:
            self._places.put(usable)

    def close(self) -> None:
        """Close all connections; no read may be under way. Idempotent."""
        for held in [self._places.get() for _ in range(self._count)]:
            if held is not None:
                held.close()
            self._places.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
