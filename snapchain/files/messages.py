"""Messages between snapchain and the child that reads a file system: a kind, a length, and at most 1 MiB.

    snapchain                        child
                  <- READY           its rights are gone
    COMMAND ->                       one at a time
                  <- READ            bytes of the disk are wanted
    BYTES, LOST ->
                  <- ENTRY           a file; then DATA and HOLE of its content, and END
                  <- PROBLEM         something was left out
                  <- ALIVE           it is at work, and has found nothing
                  <- DONE, FAILED    the end of the command

The child may have been taken over by the file system that it reads.  So snapchain checks what it gets (records.py),
and the child's messages mean nothing but themselves.
"""

from __future__ import annotations

import math
import os
import struct
import time
from enum import IntEnum

MOST = 1 << 20
"""Bytes of a message, and of a read."""
_HEAD = struct.Struct(">BI")
READ = struct.Struct(">QI")
HOLE = struct.Struct(">Q")


class Kind(IntEnum):
    READY = 1
    COMMAND = 2
    READ = 3
    BYTES = 4
    LOST = 5
    ENTRY = 6
    DATA = 7
    HOLE = 8
    END = 9
    PROBLEM = 10
    ALIVE = 11
    DONE = 12
    FAILED = 13


_KINDS = frozenset(map(int, Kind))


class Hangup(Exception):
    """The other side has gone, or sends what is no message."""


def send(fd: int, kind: Kind, payload: bytes | memoryview = b"") -> None:
    """Raises OSError, and ValueError for a payload above MOST."""
    if len(payload) > MOST:
        raise ValueError("a message is too long")
    pieces = [memoryview(_HEAD.pack(kind, len(payload))), memoryview(payload)]
    while pieces:
        sent = os.writev(fd, pieces)
        while pieces and sent >= len(pieces[0]):
            sent -= len(pieces.pop(0))
        if pieces:
            pieces[0] = pieces[0][sent:]


def receive(fd: int, *, deadline: float = math.inf) -> tuple[Kind, bytes]:
    """The next message. deadline: on the monotonic clock. Raises Hangup, TimeoutError, OSError."""
    number, length = _HEAD.unpack(_exactly(fd, _HEAD.size, deadline))
    if length > MOST or number not in _KINDS:
        raise Hangup("no message")
    return Kind(number), _exactly(fd, length, deadline)


def _exactly(fd: int, length: int, deadline: float) -> bytes:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        got = os.readv(fd, [view])
        if not got:
            raise Hangup("the end")
        view = view[got:]
        if view and time.monotonic() > deadline:
            raise TimeoutError
    return bytes(data)
