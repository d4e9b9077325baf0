"""The bytes to and from one client, through TLS or not. One thread receives; any thread sends, one at a time."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from snapchain.nbd.protocol import Buffer

_MOST_BUFFERS = 512
"""Of one call; the kernel takes 1,024."""
_CIPHERTEXT = 64 << 10


class Gone(Exception):
    """The client has hung up, or was disconnected."""


class Channel(Protocol):
    """Methods raise Gone."""

    def receive_into(self, view: memoryview, /) -> int:
        """Some bytes, at least one."""
        ...

    def send(self, buffers: Sequence[Buffer], /) -> None:
        """All of these, one after the other."""
        ...


def receive(channel: Channel, count: int) -> bytes:
    """Exactly so many bytes. Raises Gone."""
    data = memoryview(bytearray(count))
    done = 0
    while done < count:
        done += channel.receive_into(data[done:])
    return bytes(data)


class PlainChannel:
    """A Channel that is a socket."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def receive_into(self, view: memoryview) -> int:
        """See `Channel`."""
        try:
            count = self._socket.recv_into(view)
        except OSError as error:  # a time-out, too
            raise Gone(str(error)) from error
        if not count:
            raise Gone("the client has hung up")
        return count

    def send(self, buffers: Sequence[Buffer]) -> None:
        """See `Channel`."""
        try:
            for place in range(0, len(buffers), _MOST_BUFFERS):
                self._send(buffers[place : place + _MOST_BUFFERS])
        except OSError as error:
            raise Gone(str(error)) from error

    def _send(self, buffers: Sequence[Buffer]) -> None:
        left = sum(map(len, buffers)) - (sent := self._socket.sendmsg(buffers))
        if not left:
            return
        for each in buffers:
            if sent >= len(each):
                sent -= len(each)
                continue
            self._socket.sendall(memoryview(each)[sent:])
            sent = 0


class TlsChannel:
    """A Channel over TLS.

    OpenSSL allows one thread at a time, and a thread that receives mostly waits. So the socket is read and written
    here, and OpenSSL only encrypts and decrypts in memory, under a lock that nobody holds while waiting.
    """

    def __init__(self, connected: socket.socket, context: ssl.SSLContext) -> None:
        """Do the TLS handshake. Raises Gone for a client that fails it, such as one without a certificate."""
        self._plain = PlainChannel(connected)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._buffer = memoryview(bytearray(_CIPHERTEXT))
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._feed()
            except ssl.SSLError as error:
                with suppress(Gone):
                    self._flush()  # the alert that tells the client why
                raise Gone(f"TLS: {error.reason or error}") from error
            else:
                self._flush()
                return

    def receive_into(self, view: memoryview) -> int:
        """See `Channel`."""
        while True:
            try:
                with self._lock:
                    count = self._tls.read(len(view), view)
            except ssl.SSLWantReadError:
                self._flush()
                self._feed()
            except ssl.SSLError as error:
                raise Gone(f"TLS: {error.reason or error}") from error
            else:
                if not count:
                    raise Gone("the client has hung up")
                return int(count)

    def send(self, buffers: Sequence[Buffer]) -> None:
        """See `Channel`."""
        try:
            with self._lock:
                for each in buffers:
                    if len(each):
                        self._tls.write(each)
        except ssl.SSLError as error:
            raise Gone(f"TLS: {error.reason or error}") from error
        self._flush()

    def _feed(self) -> None:
        count = self._plain.receive_into(self._buffer)
        with self._lock:
            self._in.write(self._buffer[:count])

    def _flush(self) -> None:
        with self._sending:
            with self._lock:
                data = self._out.read()
            if data:
                self._plain.send([data])
