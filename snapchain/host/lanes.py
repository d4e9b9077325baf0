"""Several connections to one host that carry one stream, for links on which one ssh is too slow.

ssh lets 2 MiB be on the way in a connection, which at 80 ms are 25 MB/s, whatever the link could carry.  So the stream
is laid over several of them: byte n goes over lane n / STRIPE mod lanes, which says all, so there are no headers, and
what is written is on its way at once.

    here     opens each connection as usual, and says on each: MAGIC, a secret, which lane it is, of how many
    there    as many processes are started; those of the lanes 1, 2, ... hand their descriptors to that of lane 0, over
             a socket whose name only who knows the secret can know, and only to and from the same user
    lane 0   answers with the set of lanes that came in time; these carry the stream

Without MAGIC a stream is one that comes over a single connection, as it is.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress

from snapchain.errors import Corrupt, InvalidInput, SnapchainError, Unavailable
from snapchain.host.batches import Buffer
from snapchain.host.channel import PATIENCE, Channel

MAGIC = b"snapchain-lanes\n"
STRIPE = 128 << 10
MOST_LANES = 16
JOIN_SECONDS = 10.0
"""How long lane 0 waits for the others; a login that takes longer is done without."""
_SECRET = 16
_PREFACE = struct.Struct(f"<16s{_SECRET}sBB")
_ANSWER = struct.Struct("<16sI")
_JOIN = struct.Struct(f"<{_SECRET}sB")
_PEER = struct.Struct("3i")  # pid, uid, gid: struct ucred


class Lanes(Channel):
    """One channel over several, which it owns."""

    def __init__(self, lanes: Sequence[Channel], *, peer: str, patience: float = PATIENCE) -> None:
        super().__init__(-1, -1, peer=peer, patience=patience)
        self.lanes = tuple(lanes)

    def _receive(self, buffer: memoryview, patience: float | None = None) -> int:
        at = self.bytes_read
        lane = self.lanes[at // STRIPE % len(self.lanes)]
        count = lane.receive(buffer[: STRIPE - at % STRIPE], self.patience if patience is None else patience)
        if not count:
            self._all_ended(lane)
        self.bytes_read += count
        return count

    def _all_ended(self, first: Channel) -> None:
        for lane in self.lanes:
            if lane is not first and lane.receive(memoryview(bytearray(1)), self.patience):
                raise Unavailable("a part of the connection was lost", subject=self.peer)

    def give(self, batch: Sequence[Buffer]) -> int:
        at = self.bytes_written
        room = STRIPE - at % STRIPE
        fitting: list[Buffer] = []
        for part in batch:
            if not room:
                break
            fitting.append(memoryview(part)[:room])
            room -= len(fitting[-1])
        count = self.lanes[at // STRIPE % len(self.lanes)].give(fitting)
        self.bytes_written += count
        return count

    def finish_writing(self) -> None:
        for lane in self.lanes:
            lane.finish_writing()

    def close(self) -> None:
        self.finish_writing()
        with ExitStack() as stack:
            stack.callback(super().close)
            for lane in self.lanes:
                stack.callback(lane.close)

    def abort(self) -> None:
        super().abort()
        for lane in self.lanes:
            lane.abort()

    def _close_descriptors(self) -> None:
        super()._close_descriptors()
        for lane in self.lanes:
            with suppress(SnapchainError):  # aborted, or said already
                lane.close()


def join_lanes(channels: Sequence[Channel], *, peer: str, patience: float = PATIENCE) -> Channel:
    """One channel over these, newly opened to the same host; those that do not come to anything are aborted.

    Raises what the first one raises, and Corrupt for an answer that is none.
    """
    if not 1 <= len(channels) <= MOST_LANES:
        raise InvalidInput(f"a stream goes over 1 to {MOST_LANES} connections, not {len(channels)}")
    secret = secrets.token_bytes(_SECRET)
    try:
        channels[0].write(_PREFACE.pack(MAGIC, secret, 0, len(channels)))
        for index, channel in enumerate(channels[1:], 1):
            with suppress(SnapchainError):  # it will not come, then
                channel.write(_PREFACE.pack(MAGIC, secret, index, len(channels)))
        came = _answer(channels[0], len(channels))
    except BaseException:
        for channel in channels:
            _drop(channel)
        raise
    for index, channel in enumerate(channels):
        if not came >> index & 1:
            _drop(channel)
    return Lanes([c for index, c in enumerate(channels) if came >> index & 1], peer=peer, patience=patience)


def _answer(first: Channel, count: int) -> int:
    """The set of lanes that came, a bit each."""
    answer = memoryview(bytearray(_ANSWER.size))
    if first.read_into(answer) < _ANSWER.size:
        raise Unavailable("the connection was closed by the other side", subject=first.peer)
    magic, came = _ANSWER.unpack(answer)
    if magic != MAGIC or not came & 1 or came >> count:
        raise Corrupt(
            "it does not answer as snapchain does",
            subject=first.peer,
            hint="nothing else may write to the stream, such as the greeting of a login script",
        )
    return int(came)


def accept_lanes(channel: Channel) -> Channel | None:
    """The channel that carries the stream which begins on this one; None where this process was but a lane of it.

    A lane ends when the stream does, and there is nothing left to do then.  Raises Unavailable, and Corrupt for what is
    no beginning.
    """
    if not channel.starts_with(MAGIC):
        return channel
    preface = memoryview(bytearray(_PREFACE.size))
    if channel.read_into(preface) < _PREFACE.size:
        raise Unavailable("the connection was closed by the other side", subject=channel.peer)
    _, secret, index, count = _PREFACE.unpack(preface)
    if not 1 <= count <= MOST_LANES or index >= count:
        raise Corrupt(f"lane {index} of {count} makes no sense", subject=channel.peer)
    if index:
        _hand_over(channel, secret, index)
        return None
    lanes = {0: channel, **dict(_joining(channel, secret, count))}
    channel.write(_ANSWER.pack(MAGIC, sum(1 << lane for lane in lanes)))
    return Lanes([lanes[lane] for lane in sorted(lanes)], peer=channel.peer, patience=channel.patience)


class _Lane(Channel):
    """A lane whose descriptors another process handed over, which ends when `held` does."""

    def __init__(self, reader: int, writer: int, held: socket.socket, *, peer: str, patience: float) -> None:
        super().__init__(reader, writer, peer=peer, patience=patience)
        self._held = held

    def _close_descriptors(self) -> None:
        super()._close_descriptors()
        self._held.close()


def _joining(first: Channel, secret: bytes, count: int) -> Iterator[tuple[int, Channel]]:
    """The other lanes, as they come, until all are there or it takes too long."""
    seen = {0}
    until = time.monotonic() + JOIN_SECONDS
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as place:
        place.bind(_name(secret))
        place.listen(MOST_LANES)
        while len(seen) < count and (left := until - time.monotonic()) > 0:
            place.settimeout(left)
            try:
                visitor, _ = place.accept()
            except TimeoutError:
                return
            lane = _taken_over(visitor, first, secret)
            if lane is None or lane[0] in seen or lane[0] >= count:
                visitor.close()
                continue
            seen.add(lane[0])
            yield lane


def _taken_over(visitor: socket.socket, first: Channel, secret: bytes) -> tuple[int, Channel] | None:
    visitor.settimeout(1.0)
    with suppress(OSError):
        if not _is_us(visitor):
            return None
        message, descriptors, _, _ = socket.recv_fds(visitor, _JOIN.size, 2)
        if len(message) == _JOIN.size and len(descriptors) == 2:
            told, index = _JOIN.unpack(message)
            if hmac.compare_digest(told, secret):
                reader, writer = descriptors
                return index, _Lane(reader, writer, visitor, peer=first.peer, patience=first.patience)
        for descriptor in descriptors:
            os.close(descriptor)
    return None


def _hand_over(channel: Channel, secret: bytes, index: int) -> None:
    """Give our descriptors to lane 0, and wait until it needs them no more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as place:
        _connect(place, _name(secret), channel.peer)
        if not _is_us(place):
            raise Unavailable("somebody else is where lane 0 should be", subject=channel.peer)
        reader, writer = channel.detach()
        socket.send_fds(place, [_JOIN.pack(secret, index)], [reader, writer])
        os.close(reader)
        os.close(writer)
        with suppress(OSError):
            place.recv(1)  # its end


def _connect(place: socket.socket, name: str, peer: str) -> None:
    until = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            place.connect(name)
        except ConnectionRefusedError as error:  # lane 0 is not there yet
            if time.monotonic() > until:
                raise Unavailable("lane 0 did not come", subject=peer) from error
            time.sleep(0.02)
        else:
            return


def _name(secret: bytes) -> str:
    """Of a socket in the abstract namespace. Everybody may see it, so it is not the secret."""
    return f"\0snapchain-lanes-{hashlib.sha256(secret).hexdigest()[:32]}"


def _is_us(other: socket.socket) -> bool:
    _, uid, _ = _PEER.unpack(other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return bool(uid == os.geteuid())


def _drop(channel: Channel) -> None:
    channel.abort()
    with suppress(SnapchainError):
        channel.close()
