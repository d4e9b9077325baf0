"""An HTTP server that says what a test wants it to say, in order, and remembers what it was asked."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Reply:
    """One reply.

    cut: promise the whole body, send so many bytes, hang up; drop: hang up at once; hang: seconds to wait first
    silent: send nothing, or, with `cut`, nothing more than so many bytes, until the script lets go; dribble: seconds
    between two bytes of the reply
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    drop: bool = False
    hang: float = 0.0
    silent: bool = False
    dribble: float = 0.0


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


def error(status: int, code: str, message: str = "said the server") -> Reply:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Reply(status, body.encode(), {"Content-Type": "application/xml"})


def stored(data: bytes, **headers: str) -> Reply:
    """The reply to a good PUT."""
    return Reply(200, b"", {"ETag": f'"{hashlib.md5(data).hexdigest()}"', **headers})


def content(data: bytes, **headers: str) -> Reply:
    """The reply to a good GET of a whole object."""
    return Reply(200, data, {"ETag": f'"{hashlib.md5(data).hexdigest()}"', **headers})


DROP = Reply(drop=True)
MISSING = error(404, "NoSuchKey")


class Script:
    """Replies one after the other, the last one for ever."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.requests: list[Request] = []
        self.endpoint = ""
        self.expectations: list[int] = []  # statuses for requests with Expect, one after the other; then 100
        self.over = threading.Event()  # ends what is silent

    def says(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.requests.clear()

    def next(self, request: Request) -> Reply:
        self.requests.append(request)
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    @property
    def methods(self) -> list[str]:
        return [request.method for request in self.requests]


@contextmanager
def scripted_server() -> Iterator[Script]:
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet a reply: two would wait for the client's delayed acknowledgement

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            reply = script.next(Request(self.command, self.path, dict(self.headers), body))
            if reply.hang:
                time.sleep(reply.hang)
            if reply.silent and reply.cut is None:
                script.over.wait()
                self.close_connection = True
                return
            if reply.dribble:
                self._dribble(reply.dribble)
                return
            if reply.drop:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body[: reply.cut])
            if reply.cut is not None:
                self.wfile.flush()
                if reply.silent:
                    script.over.wait()
                self.close_connection = True

        def _dribble(self, pause: float) -> None:
            self.close_connection = True
            with suppress(OSError):  # the client has hung up
                for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Long: " + b"x" * 1000:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    if script.over.wait(pause):
                        return

        do_GET = do_PUT = do_HEAD = do_DELETE = answer  # noqa: N815 - the base class's names

        def handle_expect_100(self) -> bool:
            if script.expectations:
                status = script.expectations.pop(0)
                script.requests.append(Request(self.command, self.path, dict(self.headers), b""))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                self.wfile.flush()
                return False
            go_on = super().handle_expect_100()
            self.wfile.flush()  # botocore waits a second for it
            return go_on

        def log_message(self, *args: object) -> None:
            """Tests look at `requests` instead."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    script.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield script
    finally:
        script.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
