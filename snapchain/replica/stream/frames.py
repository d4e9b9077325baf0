"""Frames: the unit of the stream, each sealed by a check that covers everything before it too.

    magic     16 bytes, once
    frame     u8 kind | u8 0 | u16 0 | u32 bytes of the body | body | check, 16 bytes
    check     BLAKE3(check of the frame before | head | body), its first 16 bytes; before the first: of the magic

So one flipped bit, a frame lost, repeated or out of place is found at that frame, before its body is believed.  How
long a body may be depends on its kind and is judged before a byte of it is read.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from blake3 import blake3

from snapchain.errors import Corrupt, Unavailable
from snapchain.host.batches import Buffer
from snapchain.host.channel import Channel

MAGIC = b"snapchain-stream"
HEAD = struct.Struct("<BBHI")
CHECK_BYTES = 16
FRAME_BYTES = HEAD.size + CHECK_BYTES
"""Bytes of a frame besides its body."""
MOST_BEATS = 24 * 360
"""BEAT frames in a row. A side that sends nothing else, every ten seconds, is given up after a day."""


class Kind(IntEnum):
    """What a frame is; see docs/stream.md."""

    HELLO = 1
    OPEN = 2
    LAYER = 3
    MAP = 4
    DATA = 5
    MARK = 6
    END = 7
    POINT = 8
    STOP = 9
    BEAT = 10
    FAIL = 11
    CUT = 12
    ACTIVE = 13
    ASK = 14
    MERGE = 15
    HANDOVER = 16
    FETCH = 17
    LEAVES = 18
    HOLD = 19
    RELEASE = 20
    GUEST = 21
    MOVE = 24
    INVENTORY = 32
    ACK = 33
    STORED = 34
    DONE = 35
    READINESS = 36
    DISK = 37
    VERDICT = 38
    FINDING = 39
    PROGRESS = 40
    MERGED = 41
    HANDED = 42
    LEAF_HASHES = 43
    HELD = 44
    STANDING = 45
    MOVING = 48


@dataclass(frozen=True, slots=True)
class Frame:
    """body: valid until the next frame is read."""

    kind: Kind
    body: memoryview


class FrameWriter:
    """Seals frames and sends them. Not thread-safe."""

    def __init__(self, channel: Channel) -> None:
        """The magic goes with the first frame."""
        self._channel = channel
        self._check = blake3(MAGIC).digest(CHECK_BYTES)
        self._pending = MAGIC

    def send(self, kind: Kind, *body: Buffer) -> None:
        """Raises what Channel.write raises."""
        head = HEAD.pack(kind, 0, 0, sum(len(part) for part in body))
        self._check = _seal(self._check, head, body)
        before, self._pending = self._pending, b""
        self._channel.write([before, head, *body, self._check])


class FrameReader:
    """Receives frames and judges them. Not thread-safe.

    allowed: the kinds that the other side may send, each with the longest body
    """

    def __init__(self, channel: Channel, allowed: Mapping[Kind, int]) -> None:
        self._channel = channel
        self._allowed = allowed
        self._check = blake3(MAGIC).digest(CHECK_BYTES)
        self._begun = False
        self._small = memoryview(bytearray(max(HEAD.size, CHECK_BYTES)))
        self._body = memoryview(bytearray(64 << 10))
        self._count = self._beats = 0

    def read(self) -> Frame:
        """The next frame. Raises Unavailable at the end of the stream, Corrupt for anything that is not a frame."""
        frame = self.read_or_end()
        if frame is None:
            raise gone(self._channel.peer)
        return frame

    def read_or_end(self) -> Frame | None:
        """The next frame, or None where the stream ends between two."""
        if not self._begun:
            self._read_magic()
        found = self._channel.read_into(self._small[: HEAD.size])
        if not found:
            return None
        if found < HEAD.size:
            raise self._cut_off()
        head = bytes(self._small[: HEAD.size])
        kind, flags, reserved, length = HEAD.unpack(head)
        if kind not in self._allowed or flags or reserved:
            raise self._bad(f"frame {self._count} is of kind {kind}, which is not allowed here")
        if length > self._allowed[Kind(kind)]:
            raise self._bad(f"frame {self._count} claims {length} bytes, more than {Kind(kind).name} may have")
        if length > len(self._body):
            self._body = memoryview(bytearray(max(length, min(2 * len(self._body), self._allowed[Kind(kind)]))))
        body = self._body[:length]
        check = self._small[:CHECK_BYTES]
        if self._channel.read_into(body) < length or self._channel.read_into(check) < CHECK_BYTES:
            raise self._cut_off()
        self._check = _seal(self._check, head, [body])
        if check != self._check:
            raise self._bad(f"frame {self._count} is not what was sent: its check is wrong")
        self._count += 1
        self._beats = self._beats + 1 if kind == Kind.BEAT else 0
        if self._beats > MOST_BEATS:
            raise Unavailable(
                f"it sent {self._beats} signs of life in a row, and nothing else",
                subject=self._channel.peer,
                hint="look at what it is doing; to continue, run it again",
            )
        return Frame(Kind(kind), body)

    def _read_magic(self) -> None:
        first = memoryview(bytearray(len(MAGIC)))
        found = self._channel.read_into(first)
        if not found:
            raise gone(self._channel.peer)
        if found < len(MAGIC) and MAGIC.startswith(first[:found]):
            raise self._cut_off()
        if first != MAGIC:
            raise Corrupt(
                f"this is not a snapchain stream: it begins with {ascii(bytes(first[:found]))[1:]}",
                subject=self._channel.peer,
                hint="nothing else may write to it, such as the greeting of a login script",
            )
        self._begun = True

    def _cut_off(self) -> Unavailable:
        return Unavailable(
            f"the stream ends in the middle of frame {self._count}",
            subject=self._channel.peer,
            hint="run it again: it resumes where it stopped",
        )

    def _bad(self, what: str) -> Corrupt:
        return Corrupt(what, subject=self._channel.peer, hint="run it again; if it persists, look for a bad link")


def _seal(before: bytes, head: bytes, body: Sequence[Buffer]) -> bytes:
    state = blake3(before)
    state.update(head)
    for part in body:
        state.update(part)
    return state.digest(CHECK_BYTES)


def gone(peer: str) -> Unavailable:
    """The other side has closed the connection."""
    return Unavailable(
        "the connection was closed by the other side",
        subject=peer,
        hint="run it again: it resumes where it stopped",
    )
