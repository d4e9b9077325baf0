"""An S3 server that lies, floods, or does not end: bounded in memory and requests, and an error of ours each time."""

from __future__ import annotations

import gc
import gzip
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING

import pytest

from snapchain.errors import Corrupt, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.objects import s3, store as limits
from snapchain.objects.s3 import S3Store
from snapchain.objects.s3_client import LARGEST_ANSWER, new_client
from snapchain.objects.store import LARGEST, Refused

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

MIB = 1 << 20
BLOCK = b"A" * MIB
NO_S3 = r"malformed|does not speak S3|HTTP 500"
"""What botocore cannot parse it takes for an error of the server."""


@dataclass
class Hostile:
    """A server. answer: what it does with each request; sent: bytes of bodies that the client has taken."""

    answer: Callable[[BaseHTTPRequestHandler], None] = lambda _: None
    sent: int = 0
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def head(self, handler: BaseHTTPRequestHandler, status: int = 200, **headers: str) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    def body(self, handler: BaseHTTPRequestHandler, blocks: Iterator[bytes], *, chunked: bool = False) -> None:
        handler.close_connection = True
        with suppress(OSError):
            for block in blocks:
                handler.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if chunked else block)
                self.sent += len(block)

    def page(self, handler: BaseHTTPRequestHandler, inside: str, token: str | None = None) -> None:
        more = (
            "false" if token is None else f"true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken><x>"
        )
        end = "</IsTruncated>" if token is None else "</x>"
        text = f"<ListBucketResult><Name>b</Name><IsTruncated>{more}{end}{inside}</ListBucketResult>".encode()
        self.head(handler, Content_Length=str(len(text)), Content_Type="application/xml")
        handler.wfile.write(text)


@contextmanager
def _serving(hostile: Hostile) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def do_GET(self) -> None:
            hostile.requests.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hostile.answer(self)

        do_HEAD = do_PUT = do_DELETE = do_GET  # noqa: N815 - the base class's names

        def handle_expect_100(self) -> bool:
            go_on = super().handle_expect_100()
            self.wfile.flush()  # botocore waits a second for it
            return go_on

        def log_message(self, *args: object) -> None:
            """Silent."""

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *args: object) -> None:
            """A client that hangs up is what is tested."""

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hostile.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Hostile, S3Client]]:
    """One server and one client for all: to make a client takes half a second."""
    server = Hostile()
    with _serving(server), pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "x")
        patch.setenv("AWS_CONFIG_FILE", "/dev/null")
        client = new_client(server.endpoint, attempts=2)
        yield server, client
        client.close()


@pytest.fixture
def hostile(served: tuple[Hostile, S3Client]) -> Hostile:
    served[0].sent = 0
    served[0].requests.clear()
    return served[0]


@pytest.fixture
def store(served: tuple[Hostile, S3Client]) -> S3Store:
    return S3Store("b", client=served[1], sleep=lambda _: None)


def _endless() -> Iterator[bytes]:
    while True:
        yield BLOCK


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("name", sorted(LARGEST))
def test_an_object_without_end_is_read_no_further_than_its_kind_reaches(
    name: str, chunked: bool, hostile: Hostile, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LARGEST, name, min(LARGEST[name], 3 * MIB))
    largest = LARGEST[name]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if chunked:
            hostile.head(handler, Transfer_Encoding="chunked", ETag='"x"')
        else:
            hostile.head(handler, Content_Length=str(1 << 40), ETag='"x"')
        hostile.body(handler, _endless(), chunked=chunked)

    hostile.answer = answer
    for length in (None, largest + 1):
        with pytest.raises(Corrupt, match=f"at most {largest} are plausible") as caught:
            store.get(f"{name}/a", length=length)
        assert caught.value.subject == f"s3://b/{name}/a"
    assert hostile.sent < largest + 16 * MIB, "what lies in the buffers of two sockets"


def test_memory_follows_what_is_kept_and_not_what_is_sent(hostile: Hostile, store: S3Store) -> None:
    """A server that ignores the range and sends a pack of 120 MiB."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        hostile.head(handler, Content_Length=str(120 * MIB), ETag='"x"')
        hostile.body(handler, (BLOCK for _ in range(120)))

    hostile.answer = answer
    store.get("packs/warm", offset=0, length=1)
    tracemalloc.start()
    try:
        assert store.get("packs/a", offset=100 * MIB, length=10) == b"A" * 10
        assert store.get("packs/a", offset=0, length=10) == b"A" * 10
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


def test_more_bytes_than_were_asked_for_are_left(hostile: Hostile, store: S3Store) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        hostile.head(handler, 206, Content_Length="100", Content_Range="bytes 5-104/200", ETag='"x"')
        hostile.body(handler, iter([bytes(range(100))]))

    hostile.answer = answer
    assert store.get("packs/a", offset=5, length=10) == bytes(range(10))
    with pytest.raises(Unsupported, match="not bytes from 6 on"):
        store.get("packs/a", offset=6, length=10)


def test_an_object_without_a_length_is_no_bug(hostile: Hostile, store: S3Store) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        hostile.head(handler, ETag='"x"', Connection="close")
        hostile.body(handler, iter([] if handler.command == "HEAD" else [b"{}"]))

    hostile.answer = answer
    with pytest.raises(Unsupported, match=r"malformed .the length of the object is missing"):
        store.get("config")
    with pytest.raises(Unsupported, match=r"malformed .the length of the object is None"):
        store.size("config")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # botocore's parser drops the response
@pytest.mark.parametrize("length", ["-1", "x", "1e3", str(1 << 80), "9" * 5000])
def test_lengths_that_make_no_sense(length: str, hostile: Hostile, store: S3Store) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        hostile.head(handler, Content_Length=length, ETag='"x"')
        handler.close_connection = True

    hostile.answer = answer
    for call in (lambda: store.get("config"), lambda: store.size("config")):
        with pytest.raises((Unsupported, Corrupt, Unavailable)) as caught:
            call()
        assert len(str(caught.value)) < 600
    del caught
    gc.collect()  # the response that botocore's parser has dropped


# ---- listings


def test_ever_new_tokens_without_names_end(hostile: Hostile, store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "IDLE_PAGES", 5)
    hostile.answer = lambda handler: hostile.page(handler, "", token=str(len(hostile.requests)))
    for listing in (store.list, store.list_dirs):
        hostile.requests.clear()
        with pytest.raises(Unsupported, match="does not end, and brings no new names"):
            list(listing("disks/"))
        assert len(hostile.requests) <= 8


def test_a_slow_listing_without_names_ends(hostile: Hostile, store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "IDLE_SECONDS", 0.0)
    hostile.answer = lambda handler: hostile.page(handler, "", token=str(len(hostile.requests)))
    with pytest.raises(Unsupported, match="does not end"):
        list(store.list("disks/"))
    assert len(hostile.requests) <= 3


@pytest.mark.parametrize("kind", ["keys", "leases", "disks", "index", "layers", "packs"])
def test_ever_new_names_end(kind: str, hostile: Hostile, store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_LISTED", dict.fromkeys(limits.MOST_LISTED, 50))
    monkeypatch.setattr(limits, "LONGEST_LISTING", 50)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        some = [f"{kind}/{len(hostile.requests):032x}{number}" for number in range(20)]
        inside = "".join(f"<Contents><Key>{name}</Key><Size>1</Size></Contents>" for name in some)
        inside += "".join(f"<CommonPrefixes><Prefix>{name}/</Prefix></CommonPrefixes>" for name in some)
        hostile.page(handler, inside, token=str(len(hostile.requests)))

    hostile.answer = answer
    for listing in (store.list, store.list_dirs):
        hostile.requests.clear()
        with pytest.raises(Unsupported, match="more than 50 objects"):
            list(listing(f"{kind}/"))
        assert len(hostile.requests) <= 4


@pytest.mark.parametrize(
    "inside",
    [
        "<Contents><Key>disks/a</Key><Size>x</Size></Contents>",
        "<Contents><Key>disks/a</Key><Size>-1</Size></Contents>",
        "<Contents><Key>disks/a</Key><Size>99999999999999999999999</Size></Contents>",
        f"<Contents><Key>disks/a</Key><Size>{'9' * 5000}</Size></Contents>",
        "<Contents><Key>disks/a</Key></Contents>",
        "<Contents><Key>disks/a</Key><Size>1</Size><LastModified>never</LastModified></Contents>",
        "<Contents><Key>disks/a</Key><Size>1</Size><LastModified>99999-01-01T00:00:00Z</LastModified></Contents>",
        "<Contents><Key>disks/a</Key><Size>1</Size><LastModified>1e300</LastModified></Contents>",
        "&bomb;",
    ],
)
def test_entries_that_make_no_sense(inside: str, hostile: Hostile, store: S3Store) -> None:
    hostile.answer = lambda handler: hostile.page(handler, inside)
    with pytest.raises((Unsupported, Unavailable), match=NO_S3):
        list(store.list("disks/"))


@pytest.mark.parametrize(
    "key",
    [
        "disks/../../etc/passwd",
        "disks/\x07",
        "disks/" + "a" * 5000,
        "/disks/a",
        "disks//a",
        "disks/\N{SNOWMAN}",
        "tmp/x",
        "",
    ],
)
def test_names_that_are_no_object_of_ours_are_left_out(key: str, hostile: Hostile, store: S3Store) -> None:
    inside = f"<Contents><Key>{key.replace(chr(7), '%07')}</Key><Size>1</Size></Contents>"
    hostile.answer = lambda handler: hostile.page(handler, inside)
    assert list(store.list("")) == []
    assert list(store.list_dirs("disks/")) == []


def test_a_token_of_absurd_length(hostile: Hostile, store: S3Store) -> None:
    hostile.answer = lambda handler: hostile.page(handler, "", token="t" * 100_000)
    with pytest.raises(Unsupported, match="continuation token of 100000"):
        list(store.list("disks/"))


def test_a_page_without_end_is_not_read_to_its_end(hostile: Hostile, store: S3Store) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        hostile.head(handler, Transfer_Encoding="chunked", Content_Type="application/xml")
        hostile.body(handler, _endless(), chunked=True)

    hostile.answer = answer
    for call in (
        lambda: list(store.list("disks/")),
        lambda: store.put("disks/a", b"x"),
        lambda: store.delete("disks/a"),
    ):
        hostile.sent = 0
        with pytest.raises(Unsupported, match=f"more than {LARGEST_ANSWER} bytes"):
            call()
        assert hostile.sent < LARGEST_ANSWER + 16 * MIB


def test_entities_that_expand(hostile: Hostile, store: S3Store) -> None:
    levels = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))
    head = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY l0 "aaaaaaaaaa">{levels}]>'
    text = f"{head}<ListBucketResult>&l11;</ListBucketResult>"

    def answer(handler: BaseHTTPRequestHandler) -> None:
        hostile.head(handler, Content_Length=str(len(text)), Content_Type="application/xml")
        handler.wfile.write(text.encode())

    hostile.answer = answer
    with pytest.raises((Unsupported, Unavailable), match=NO_S3):
        list(store.list("disks/"))


# ---- errors and redirects


@pytest.mark.parametrize(
    ("status", "error"), [(400, Unsupported), (403, Refused), (404, NotFound), (500, Unavailable), (503, Unavailable)]
)
def test_an_error_of_megabytes_is_one_line(
    status: int, error: type[SnapchainError], hostile: Hostile, store: S3Store
) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        hostile.head(handler, status, Transfer_Encoding="chunked", Content_Type="application/xml")
        hostile.body(handler, iter([b"<Error><Code>Bad</Code><Message>", *[BLOCK] * 50]), chunked=True)

    hostile.answer = answer
    for call in (lambda: store.get("config"), lambda: list(store.list("disks/")), lambda: store.put("disks/a", b"x")):
        hostile.sent = 0
        with pytest.raises(error, match=f"HTTP {status}") as caught:
            call()
        assert len(str(caught.value)) < 600
        assert hostile.sent < 50 * MIB


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b""),
        ({}, b"<Error><Code></Code><Region></Region></Error>"),
        ({}, b"<Error><Code>PermanentRedirect</Code><Region></Region></Error>"),
        ({"x-amz-bucket-region": ""}, b""),
        ({"x-amz-bucket-region": "eu/../../evil"}, b""),
        ({"x-amz-bucket-region": "eu-west-7"}, b""),
        ({"Location": "http://evil.example/x"}, b""),
        ({"Location": "http://x;curl evil|sh"}, b""),
        ({"Location": "/elsewhere"}, b""),
    ],
)
def test_a_redirect_is_not_followed_and_steers_no_command(
    status: int, headers: dict[str, str], body: bytes, hostile: Hostile, store: S3Store
) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        hostile.head(handler, status, Content_Length=str(len(body)), **headers)
        if handler.command != "HEAD":
            handler.wfile.write(body)

    hostile.answer = answer
    for call in (
        lambda: store.get("config"),
        lambda: store.size("config"),
        lambda: store.put("config", b"x"),
        lambda: list(store.list("disks/")),
    ):
        hostile.requests.clear()
        with pytest.raises(InvalidInput, match=r"another region|redirects to") as caught:
            call()
        words = f"{caught.value} {caught.value.hint}"
        assert "recursion" not in words
        assert not any(bad in words for bad in (";", "|", ".."))
        assert len(hostile.requests) <= 3


def test_a_body_that_says_it_is_compressed_is_taken_as_it_is(hostile: Hostile, store: S3Store) -> None:
    bomb = gzip.compress(bytes(10 * MIB))

    def answer(handler: BaseHTTPRequestHandler) -> None:
        hostile.head(handler, Content_Length=str(len(bomb)), Content_Encoding="gzip", ETag='"x"')
        handler.wfile.write(bomb)

    hostile.answer = answer
    assert store.get("config") == bomb
    with pytest.raises((Unsupported, Unavailable), match=NO_S3):
        list(store.list("disks/"))
