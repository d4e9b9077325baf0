"""An HTTP proxy before an S3 server: it counts what passes, and holds each request back for a time."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Passed:
    """One request. sent, received: bytes of the bodies"""

    method: str
    path: str
    sent: int
    received: int


@dataclass
class Proxy:
    """Where it listens, and what has passed."""

    endpoint: str = ""
    seen: list[Passed] = field(default_factory=list)


_HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}


@contextmanager
def counting_proxy(upstream: str, *, latency: float = 0.0) -> Iterator[Proxy]:
    """A proxy before the server at `upstream`. latency: seconds that each request waits"""
    proxy = Proxy()
    parts = urlsplit(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def setup(self) -> None:
            super().setup()
            self.upstream = http.client.HTTPConnection(parts.hostname or "", parts.port)

        def finish(self) -> None:
            self.upstream.close()
            super().finish()

        def pass_on(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if latency:
                time.sleep(latency)
            one = self.upstream
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
            one.request(self.command, self.path, body=sent or None, headers=headers)
            answer = one.getresponse()
            body = answer.read()
            proxy.seen.append(Passed(self.command, self.path, len(sent), len(body)))
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP | {"content-length", "date", "server"}:
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
            if answer.status != 204 and length is not None:
                self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_DELETE = pass_on  # noqa: N815 - the base class's names

        def handle_expect_100(self) -> bool:
            go_on = super().handle_expect_100()
            self.wfile.flush()
            return go_on

        def log_message(self, *args: object) -> None:
            """Tests look at `seen` instead."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
