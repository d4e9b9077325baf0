"""One client: the negotiation, then its requests until it hangs up.

    receiver   takes all requests that have come; answers those whose bytes are in memory, in one call of the kernel
    answerer   waits for what must be fetched, in the order of the requests; begun at the first of them

Replies may come in another order than the requests. Each of the two threads has at most a portion of an answer in
memory. A client that does not read its replies stops only its own threads.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from snapchain.errors import SnapchainError
from snapchain.nbd.block_status import block_status
from snapchain.nbd.channel import Channel, Gone, PlainChannel, TlsChannel, receive
from snapchain.nbd.exports import OpenedExport
from snapchain.nbd.handshake import Handshake, Next, Offer
from snapchain.nbd.protocol import (
    CLIENT_FLAGS,
    DONE,
    MOST_READ,
    OPTION,
    REQUEST,
    Buffer,
    Command,
    Fault,
    Malformed,
    Piece,
    Request,
    data_head,
    done_chunk,
    error_chunk,
    fault_of,
    flat,
    greeting,
    parse_client_flags,
    parse_option,
    parse_request,
    read_reply,
    simple_reply,
    status_chunk,
)
from snapchain.nbd.read_ahead import ReadAhead
from snapchain.nbd.reading import PORTION, SHIFT

HANDSHAKE_SECONDS = 30.0
_MOST_OPTIONS = 1000
_REQUESTS = 64
"""The most that are taken from the kernel at once, and the most that may wait for the answerer."""


@dataclass(slots=True)
class Tally:
    """What a server did so far. Counted without a lock by each client, and summed at its end."""

    bytes_sent: int = 0
    requests: int = 0
    failed: int = 0

    def add(self, other: Tally) -> None:
        """Add what another one counted."""
        self.bytes_sent += other.bytes_sent
        self.requests += other.requests
        self.failed += other.failed


@dataclass(slots=True)
class Client:
    """A connected client. on_fault: gets the export, offset, length and error of each read that fails"""

    connected: socket.socket
    offer: Offer[OpenedExport]
    on_fault: Callable[[str, int, int, Exception], None]
    tls: ssl.SSLContext | None = None
    tally: Tally = field(default_factory=Tally)

    def serve(self, on_served: Callable[[], None] = lambda: None) -> None:
        """Until the client ends. on_served: called when it has got an export

        Raises Gone where it hung up in the middle, Malformed where it does not speak NBD.
        """
        found = self._negotiated()
        if found is None:
            return
        channel, agreed, opened = found
        with opened:
            on_served()
            self.connected.settimeout(None)
            _Transmission(self, channel, opened, structured=agreed.structured, contexts=agreed.contexts).run()

    def _negotiated(self) -> tuple[Channel, Handshake[OpenedExport], OpenedExport] | None:
        """None for a client that wants nothing."""
        until = time.monotonic() + HANDSHAKE_SECONDS

        def limit() -> None:
            left = until - time.monotonic()
            if left <= 0:
                raise Gone("the client did not choose an export in time")
            self.connected.settimeout(left)

        channel: Channel = PlainChannel(self.connected)
        limit()
        channel.send([greeting()])
        agreed = Handshake(
            self.offer, parse_client_flags(receive(channel, CLIENT_FLAGS.size)), tls=self.tls is not None
        )
        for _ in range(_MOST_OPTIONS):
            limit()
            option, length = parse_option(receive(channel, OPTION.size))
            limit()
            reply, then = agreed.answer(option, receive(channel, length))
            try:
                channel.send([reply] if reply else [])
                if then is Next.TLS:
                    assert self.tls is not None
                    channel = TlsChannel(self.connected, self.tls)
                    agreed.secured()
            except BaseException:
                if agreed.opened is not None:
                    agreed.opened.leave()
                raise
            if then is Next.CLOSE:
                return None
            if then is Next.SERVE:
                assert agreed.opened is not None
                return channel, agreed, agreed.opened
        raise Malformed(f"more than {_MOST_OPTIONS} options")


class _Transmission:
    def __init__(
        self, client: Client, channel: Channel, opened: OpenedExport, *, structured: bool, contexts: bool
    ) -> None:
        self._client, self._channel, self._tally = client, channel, client.tally
        self._name, self._reading = opened.name, opened.reading
        self._structured, self._contexts = structured, contexts
        self._ahead = ReadAhead(self._reading.most_ahead)
        self._recorder = self._reading.recorder
        self._sending = threading.Lock()
        self._waiting: queue.Queue[Request | None] = queue.Queue(_REQUESTS)
        self._answerer: threading.Thread | None = None
        self._broken: Exception | None = None

    def run(self) -> None:
        """Until the client says goodbye, or hangs up."""
        try:
            self._receive()
        finally:
            if self._answerer is not None:
                self._waiting.put(None)
                self._answerer.join()
        if self._broken is not None:
            raise self._broken

    def _receive(self) -> None:
        size = REQUEST.size
        buffer = memoryview(bytearray(size * _REQUESTS))
        have = 0
        while True:
            have += self._channel.receive_into(buffer[have:])
            place = 0
            out: list[Buffer] = []
            waiting = 0
            while have - place >= size:
                request = parse_request(buffer, place)
                place += size
                if request.command == Command.DISCONNECT:
                    self._send(out)
                    return
                if request.command == Command.WRITE:
                    place = self._discard(request.length, place, have)
                reply = self._at_once(request)
                if reply is None:
                    self._wait_for(request, out)
                    continue
                out += reply
                waiting += request.length if request.command == Command.READ else 0
                if waiting >= PORTION:
                    self._send(out)
                    out, waiting = [], 0
            self._send(out)
            buffer[: have - place] = buffer[place:have]
            have -= place

    def _discard(self, length: int, place: int, have: int) -> int:
        """Take the data of a write, which is refused; where the next request begins. Raises Malformed for too many."""
        if length > MOST_READ:
            raise Malformed(f"a write of {length} bytes")
        left = length - min(length, have - place)
        scratch = memoryview(bytearray(min(left, 64 << 10)))
        while left:
            left -= self._channel.receive_into(scratch[: min(left, len(scratch))])
        return place + min(length, have - place)

    def _at_once(self, request: Request) -> list[Buffer] | None:
        """The whole reply, None where it must be waited for."""
        self._tally.requests += 1
        reading, cookie, offset, length = self._reading, request.cookie, request.offset, request.length
        fault = fault_of(request, reading.size, structured=self._structured, contexts=self._contexts)
        if fault is not None:
            return [self._error(cookie, fault)]
        if request.command == Command.READ:
            if reading.most_ahead:
                first, stop = self._numbers(offset, length)
                ahead = self._ahead.wanted(first, stop) if first < stop else None
                if ahead is not None:
                    reading.ahead(*ahead)
            if self._recorder is not None:
                self._record(offset, length)
            try:
                pieces = reading.ready(offset, length)
            except (SnapchainError, OSError) as error:
                return [self._failed(request, error)]
            return None if pieces is None else self._read_reply(request, pieces)
        if request.command == Command.BLOCK_STATUS:
            self._recorder = None  # a program that copies the disk reads all of it, in its own order
            runs = block_status(reading.extents, offset, length, only_one=request.wants_one_run)
            return [status_chunk(cookie, runs)]
        if request.command == Command.CACHE:
            reading.ahead(*self._numbers(offset, length))
        return [done_chunk(cookie) if self._structured else simple_reply(cookie)]

    def _record(self, offset: int, length: int) -> None:
        if self._recorder is not None and self._recorder.is_open:
            self._recorder.note(offset, length)
        else:
            self._recorder = None

    def _numbers(self, offset: int, length: int) -> tuple[int, int]:
        """Of the blocks with data in a range: the first, and one past the last."""
        number = self._reading.data.number
        return number(offset >> SHIFT), number(((offset + length - 1) >> SHIFT) + 1)

    def _read_reply(self, request: Request, pieces: Sequence[Piece]) -> list[Buffer]:
        self._tally.bytes_sent += request.length
        if not self._structured:
            return [simple_reply(request.cookie), *flat(pieces)]
        if request.wants_one_chunk and len(pieces) > 1:
            return [data_head(request.cookie, request.offset, request.length, DONE), *flat(pieces)]
        return read_reply(request.cookie, pieces)

    def _wait_for(self, request: Request, out: list[Buffer]) -> None:
        """Leave a request to the answerer; what is in `out` goes first if that has too much to do."""
        self._reading.soon(request.offset, request.length)
        if self._answerer is None:
            self._answerer = threading.Thread(target=self._answer_all, name="nbd answer", daemon=True)
            self._answerer.start()
        try:
            self._waiting.put_nowait(request)
        except queue.Full:
            self._send(out)
            out.clear()
            self._waiting.put(request)

    def _answer_all(self) -> None:
        """Also when the client is gone: whoever puts in a request must not wait for ever."""
        while (request := self._waiting.get()) is not None:
            if self._broken is not None:
                continue
            try:
                self._answer(request)
            except Exception as error:  # noqa: BLE001 - raised by `run`
                self._broken = error
                _hang_up(self._client.connected)

    def _answer(self, request: Request) -> None:
        """Portion by portion; where all must come in one piece, it is gathered first."""
        cookie, offset, length = request.cookie, request.offset, request.length
        is_whole = not self._structured or request.wants_one_chunk
        if is_whole and self._structured and length > PORTION:
            self._send([self._error(cookie, Fault.EOVERFLOW)])
            return
        gathered: list[Piece] = []
        has_begun = False
        done = offset
        try:
            for pieces in self._reading.wait(offset, length):
                done += sum(each[1] for each in pieces)
                if is_whole and length <= PORTION:
                    gathered += pieces
                elif is_whole:
                    self._send([*([] if has_begun else [simple_reply(cookie)]), *flat(pieces)])
                else:
                    self._send(read_reply(cookie, pieces, ends=done == offset + length))
                has_begun = True
        except (SnapchainError, OSError) as error:
            if is_whole and not gathered and has_begun:
                # A simple reply cannot take back what it has promised.
                self._client.on_fault(self._name, done, offset + length - done, error)
                self._tally.failed += 1
                raise Gone("a read failed in the middle of a simple reply") from error
            self._send([self._failed(request, error, at=done)])
            return
        if gathered:
            self._send(self._read_reply(request, gathered))
        else:
            self._tally.bytes_sent += length

    def _failed(self, request: Request, error: Exception, *, at: int | None = None) -> bytes:
        """The reply to a read that failed, which is noted."""
        start = request.offset if at is None else at
        self._client.on_fault(self._name, start, request.offset + request.length - start, error)
        self._tally.failed += 1
        if not self._structured:
            return simple_reply(request.cookie, Fault.EIO)
        return error_chunk(request.cookie, Fault.EIO, str(error), offset=start)

    def _error(self, cookie: int, fault: Fault) -> bytes:
        return error_chunk(cookie, fault) if self._structured else simple_reply(cookie, fault)

    def _send(self, buffers: Sequence[Buffer]) -> None:
        if buffers:
            with self._sending:
                self._channel.send(buffers)


def _hang_up(connected: socket.socket) -> None:
    """So that the receiver, which waits for the client, ends."""
    try:
        connected.shutdown(socket.SHUT_RDWR)
    except OSError:  # the client was faster
        return
