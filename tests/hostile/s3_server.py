"""A small S3 in this process that serves a repository from memory, and lies as a script says.

It speaks HTTP over sockets by hand, so that it can say what no library would: wrong lengths, half answers, listings
without end, bodies without end, other ranges than were asked for.
"""

from __future__ import annotations

import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hostile.mutate import Draw, spoil

BUCKET = "bucket"
MOST = 512 << 20
"""Bytes of a body without end; whoever reads so many has read too many."""
LIES = (
    *["body"] * 6, "short", "long", "no length", "endless", "huge length", "negative length", "odd length", "status",
    "status", "etag", "no etag", "range", "no range", "xml", "xml", "xml bomb", "huge xml", "error xml", "tokens",
    "same token",
    "tokens full", "names", "times", "sizes", "chunked", "bad chunks", "headers", "huge header", "close", "silence",
    "trickle",
    "redirect", "not modified", "empty", "html", "continue", "gzip", "other object", "old object", "lost put",
    "two answers",
)  # fmt: skip
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Request:
    method: str
    key: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes


@dataclass
class Server:
    """objects: key -> bytes; lies: by the number of the request, which of LIES; older: what keys held earlier"""

    objects: dict[str, bytes]
    draw: Draw
    lies: dict[int, str]
    always: dict[str, str] = field(default_factory=dict)
    older: dict[str, bytes] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    port: int = 0
    _count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = listening.getsockname()[1]
        threading.Thread(target=self._accept, args=(listening,), daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            visitor, _ = listening.accept()
            threading.Thread(target=self._serve, args=(visitor,), daemon=True).start()

    def _serve(self, visitor: socket.socket) -> None:
        with visitor, visitor.makefile("rb") as file, suppress(OSError, ValueError, IndexError):
            while (request := _read(file, visitor)) is not None:
                for piece in self._answer(request):
                    visitor.sendall(piece)
                if self._closing:
                    return

    _closing = False

    def _answer(self, request: Request) -> Iterator[bytes]:
        with self._lock:
            status, headers, body = self._truth(request)
            lie = self.lies.get(self._count) or self.always.get(_what(request))
            self._count += 1
            if lie is not None:
                self.told.append(f"{lie}: {_what(request)} {request.key}")
        if lie is None:
            yield _whole(status, headers, body, request)
        else:
            yield from self._lie(lie, request, status, headers, body)

    def _truth(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        key = request.key
        held = self.objects.get(key)
        if _what(request) == "LIST":
            return 200, {"Content-Type": "application/xml"}, self._listing(request)
        if _what(request) == "BUCKET":
            return 200, {}, b""
        if request.method == "PUT":
            if request.headers.get("if-none-match") == "*" and held is not None:
                return 412, {}, _error("PreconditionFailed")
            self.objects[key] = request.body
            return 200, {"ETag": _etag(request.body)}, b""
        if request.method == "DELETE":
            self.objects.pop(key, None)
            return 204, {}, b""
        if held is None:
            return 404, {}, _error("NoSuchKey")
        headers = {"ETag": _etag(held), "Last-Modified": "Sun, 29 Nov 2026 10:00:00 GMT"}
        if wanted := _RANGE.fullmatch(request.headers.get("range", "")):
            first, last = int(wanted[1]), min(len(held) - 1, int(wanted[2] or 1 << 62))
            if first >= len(held):
                return 416, {}, _error("InvalidRange")
            return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(held)}"}, held[first : last + 1]
        return 200, headers, held

    def _listing(
        self,
        request: Request,
        *,
        names: list[str] | None = None,
        token: str | None = None,
        size: int | None = None,
        when: str = "",
    ) -> bytes:
        prefix = request.query.get("prefix", [""])[0]
        delimiter = request.query.get("delimiter", [""])[0]
        found = sorted(key for key in self.objects if key.startswith(prefix)) if names is None else names
        folders: dict[str, None] = {}
        lines = []
        for key in found:
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folders[prefix + rest.split(delimiter)[0] + delimiter] = None
                continue
            length = len(self.objects.get(key, b"")) if size is None else size
            lines.append(
                f"<Contents><Key>{_escaped(key)}</Key><LastModified>{when or '2026-11-29T10:00:00.000Z'}</LastModified>"
                f"<ETag>&quot;x&quot;</ETag><Size>{length}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
        lines += [f"<CommonPrefixes><Prefix>{_escaped(each)}</Prefix></CommonPrefixes>" for each in folders]
        more = (
            f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
            if token
            else "<IsTruncated>false</IsTruncated>"
        )
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{_escaped(prefix)}</Prefix><KeyCount>{len(lines)}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"{more}{''.join(lines)}</ListBucketResult>"
        ).encode()

    def _lie(self, lie: str, request: Request, status: int, headers: dict[str, str], body: bytes) -> Iterator[bytes]:
        draw = self.draw
        prefix = request.query.get("prefix", [""])[0]
        some = [f"{prefix}{draw.getrandbits(128):032x}" for _ in range(1000)]
        match lie:
            case "body":
                yield _whole(status, headers, spoil(body, draw), request)
            case "short":
                yield _whole(status, headers, body, request, length=len(body) + draw.choice([1, 1000]))
                self._closing = True
            case "long":
                yield _whole(status, headers, body + draw.randbytes(draw.choice([1, 5000])), request, length=len(body))
            case "no length" | "endless":
                yield _head(status, {**headers, "Connection": "close"}, None)
                yield body
                if lie == "endless":
                    yield from _without_end()
                self._closing = True
            case "huge length":
                yield _head(status, headers, 1 << draw.choice([33, 62, 70]))
                yield body
                yield from _without_end()
            case "negative length" | "odd length":
                said = (
                    "-1" if lie == "negative length" else draw.choice(["abc", "", "1e3", "0x10", "9" * 5000, "12, 12"])
                )
                yield _head(status, {**headers, "Content-Length": said}, None)
                yield body
            case "status":
                codes = [
                    100,
                    199,
                    201,
                    202,
                    204,
                    206,
                    300,
                    304,
                    400,
                    401,
                    403,
                    404,
                    405,
                    409,
                    411,
                    412,
                    416,
                    429,
                    499,
                    500,
                    501,
                    502,
                    503,
                    504,
                    507,
                    599,
                    600,
                    999,
                ]
                yield _whole(
                    draw.choice(codes),
                    headers,
                    draw.choice([body, b"", _error("SlowDown"), _error("x" * 10_000)]),
                    request,
                )
            case "etag":
                yield _whole(
                    status,
                    {**headers, "ETag": draw.choice(['"x"', "", '"' + "0" * 32 + '"', '"\x01"', "W/" + '"a"'])},
                    body,
                    request,
                )
            case "no etag":
                headers.pop("ETag", None)
                yield _whole(status, headers, body, request)
            case "range":
                yield _whole(
                    206,
                    {
                        **headers,
                        "Content-Range": draw.choice(
                            [
                                f"bytes 5-{5 + len(body)}/{10**9}",
                                "bytes */1",
                                "x",
                                f"bytes 0-{len(body) - 1}/{len(body)}",
                            ]
                        ),
                    },
                    body,
                    request,
                )
            case "no range":
                yield _whole(200, headers, self.objects.get(request.key, body), request)
            case "xml":
                yield _whole(status, headers, spoil(body or self._listing(request), draw), request)
            case "xml bomb":
                entities = '<!ENTITY a "ha">' + "".join(
                    f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9)
                )
                yield _whole(
                    status,
                    headers,
                    f'<?xml version="1.0"?><!DOCTYPE x [{entities}]><ListBucketResult><Name>&j;</Name>'.encode(),
                    request,
                )
            case "huge xml":
                unit = draw.choice(
                    [
                        "<Contents><Key>a</Key></Contents>",
                        "<a>",
                        "<Contents>",
                        "<CommonPrefixes><Prefix>x/</Prefix></CommonPrefixes>",
                        "x",
                    ]
                )
                yield _whole(
                    status,
                    headers,
                    b"<ListBucketResult>" + unit.encode() * (draw.choice([1, 20, 60]) * (1 << 20) // len(unit)),
                    request,
                )
            case "error xml":
                yield _whole(
                    draw.choice([400, 403, 404, 500]),
                    headers,
                    _error(
                        draw.choice(
                            ["NoSuchBucket", "AccessDenied", "\x1b[2J", "RequestTimeTooSkewed", "a" * 100_000, ""]
                        )
                    ),
                    request,
                )
            case "tokens":
                yield _whole(200, headers, self._listing(request, names=[], token=str(draw.random())), request)
            case "same token":
                yield _whole(200, headers, self._listing(request, token="again"), request)
            case "tokens full":
                yield _whole(
                    200, headers, self._listing(request, names=sorted(some), token=str(draw.random())), request
                )
            case "names":
                odd = [
                    prefix,
                    f"{prefix}../x",
                    f"{prefix}a//b",
                    f"{prefix}\u0130",
                    "elsewhere/x",
                    f"{prefix}{'x' * 2000}",
                    f"{prefix}A\x01",
                    "",
                    f"{prefix}%00",
                ]
                every = [key for key in self.objects if key.startswith(prefix)]
                draw.shuffle(every)
                yield _whole(
                    200, headers, self._listing(request, names=[*every, *draw.sample(odd, 4), *every[:2]]), request
                )
            case "times":
                yield _whole(
                    200,
                    headers,
                    self._listing(
                        request,
                        when=draw.choice(
                            [
                                "now",
                                "0001-01-01T00:00:00+23:59",
                                "9999-12-31T23:59:59-23:59",
                                "1e300",
                                "2106-02-07T06:28:16Z",
                            ]
                        ),
                    ),
                    request,
                )
            case "sizes":
                yield _whole(200, headers, self._listing(request, size=draw.choice([0, -1, 1 << 40, 1 << 70])), request)
            case "chunked" | "bad chunks":
                yield _head(status, {**headers, "Transfer-Encoding": "chunked"}, None)
                sizes = (
                    [f"{len(body):x}"]
                    if lie == "chunked"
                    else [draw.choice(["-1", "zz", "f" * 40, f"{len(body) + 9:x}", "ffffffff"])]
                )
                for said in sizes:
                    yield said.encode() + b"\r\n" + body + b"\r\n"
                yield b"0\r\n\r\n"
            case "headers":
                yield (
                    _head(
                        status, {**headers, **{f"X-{n}": "y" * 100 for n in range(draw.choice([90, 5000]))}}, len(body)
                    )
                    + body
                )
            case "huge header":
                yield _head(status, {**headers, "X-Long": "y" * draw.choice([70_000, 20 << 20])}, len(body)) + body
            case "close":
                self._closing = True
            case "silence":
                threading.Event().wait(3.0)
                self._closing = True
            case "trickle":
                yield _head(status, headers, len(body) + 100)
                for _ in range(30):
                    yield b"x"
                    threading.Event().wait(0.1)
                self._closing = True
            case "redirect":
                to = draw.choice(
                    [f"http://127.0.0.1:{self.port}/{BUCKET}/x", "http://169.254.169.254/", "file:///etc/passwd", "//"]
                )
                yield _whole(
                    draw.choice([301, 302, 307, 308]),
                    {
                        **headers,
                        "Location": to,
                        **draw.choice([{}, {"x-amz-bucket-region": draw.choice(["eu-x", "../..", "a.b/c?"])}]),
                    },
                    _error("PermanentRedirect"),
                    request,
                )
            case "not modified" | "empty":
                yield _whole(304 if lie == "not modified" else 200, {}, b"", request)
            case "html":
                yield _whole(200, {"Content-Type": "text/html"}, b"<html><body>It works!<br></body></html>", request)
            case "continue":
                yield b"HTTP/1.1 100 Continue\r\n\r\n" * draw.choice([1, 50, 5000]) + _whole(
                    status, headers, body, request
                )
            case "gzip":
                import zlib

                packer = zlib.compressobj(wbits=31)
                data = packer.compress(bytes(draw.choice([1 << 20, 500 << 20]))) + packer.flush()
                yield _whole(status, {**headers, "Content-Encoding": "gzip"}, data, request)
            case "other object":
                other = draw.choice(sorted(self.objects))
                yield _whole(status, headers, self.objects[other], request)
            case "old object":
                yield _whole(status, headers, self.older.get(request.key, body), request)
            case "lost put":
                self.objects.pop(request.key, None)
                yield _whole(status, headers, body, request)
            case _:
                yield _whole(status, headers, body, request) * 2


def _what(request: Request) -> str:
    if not request.key:
        return "LIST" if "list-type" in request.query else "BUCKET"
    return request.method


def _read(file: object, visitor: socket.socket) -> Request | None:
    line = file.readline(1 << 16)  # type: ignore[attr-defined]
    if not line.strip():
        return None
    method, target, _ = line.decode("latin-1").split(" ", 2)
    headers: dict[str, str] = {}
    while line := file.readline(1 << 16).strip():  # type: ignore[attr-defined]
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("expect", "").lower() == "100-continue":
        visitor.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = file.read(int(headers.get("content-length", 0)))  # type: ignore[attr-defined]
    parts = urlsplit(target)
    key = unquote(parts.path).removeprefix(f"/{BUCKET}").removeprefix("/")
    return Request(method, key, parse_qs(parts.query, keep_blank_values=True), headers, body)


def _head(status: int, headers: dict[str, str], length: int | None) -> bytes:
    said = {**headers} if length is None else {**headers, "Content-Length": str(length)}
    lines = [f"HTTP/1.1 {status} Said", *(f"{name}: {value}" for name, value in said.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def _whole(status: int, headers: dict[str, str], body: bytes, request: Request, *, length: int | None = None) -> bytes:
    return _head(status, headers, len(body) if length is None else length) + (b"" if request.method == "HEAD" else body)


def _without_end() -> Iterator[bytes]:
    for _ in range(MOST >> 20):
        yield bytes(1 << 20)


def _error(code: str) -> bytes:
    return f'<?xml version="1.0"?><Error><Code>{_escaped(code)}</Code><Message>m</Message></Error>'.encode()


def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\x01", "&#1;")


def loaded(root: Path) -> dict[str, bytes]:
    """A repository's directory as objects."""
    if not root.is_dir():
        return {}
    return {
        f"repo/{path.relative_to(root)}": path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".reserve"
    }


def scripted(root: Path, older: Path, draw: Draw) -> Server:
    """A server that lies now and then, or always to one kind of question."""
    lies, always = {}, {}
    if draw.random() < 0.35:
        always[draw.choice(["LIST", "LIST", "GET", "GET", "PUT", "HEAD", "DELETE"])] = draw.choice(LIES)
    else:
        for _ in range(draw.choice([1, 1, 2, 4])):
            lies[int(draw.random() ** 2 * 60)] = draw.choice(LIES)
    return Server(loaded(root), draw, lies, always, loaded(older))
