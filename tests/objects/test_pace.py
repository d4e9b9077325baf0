"""A server that answers SlowDown gets fewer requests at once, until the work is done."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from snapchain.errors import Unavailable
from snapchain.objects.pace import ATTEMPTS, BUDGET, Pace
from snapchain.objects.s3 import S3Store
from snapchain.objects.s3_client import CONNECTIONS
from tests.objects.test_s3_faults import shared_client
from tests.servers import S3Server
from tests.waiting import HANG


class Slow(Exception):
    """The server's refusal."""


def is_slow(error: Exception) -> bool:
    return isinstance(error, Slow)


def refuse() -> None:
    raise Slow("slow down")


def answer() -> None:
    pass


def test_a_refusal_halves_and_answers_raise_it_again() -> None:
    waits: list[float] = []
    paced = Pace(16, sleep=waits.append)
    seen = []
    for request in (refuse, refuse):
        with suppress(Slow):
            paced.ask(request, is_refusal=is_slow)
        seen.append(paced.allowed)
    assert seen == [1, 1], "each of its repetitions is a refusal at the new pace"
    assert len(waits) == 2 * (ATTEMPTS - 1)
    counts = [1]
    while paced.allowed < 16:
        paced.ask(answer, is_refusal=is_slow)
        counts.append(paced.allowed)
    assert all(after - before in {0, 1} for before, after in pairwise(counts))
    assert 16 < len(counts) < 16 * 16, "a round of answers adds one"


def test_of_requests_that_were_under_way_together_one_counts() -> None:
    paced = Pace(16, sleep=lambda _: None)
    together = threading.Barrier(8)
    refused = threading.local()

    def request() -> None:
        if not getattr(refused, "once", False):
            refused.once = True
            together.wait(HANG)
            raise Slow("slow down")

    with ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(paced.ask, request, is_refusal=is_slow) for _ in range(8)]:
            each.result(HANG)
    assert paced.allowed >= 8


def test_other_errors_change_nothing() -> None:
    paced = Pace(4)
    with pytest.raises(ZeroDivisionError):
        paced.ask(lambda: 1 // 0, is_refusal=is_slow)
    assert paced.allowed == 4


def test_waits_double_and_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[float] = []

    def longest(_: float, most: float) -> float:
        bounds.append(most)
        return most

    monkeypatch.setattr("random.uniform", longest)
    with pytest.raises(Slow, match="slow down"):
        Pace(4, sleep=lambda _: None).ask(refuse, is_refusal=is_slow)
    assert bounds == [0.5, 1, 2, 4, 8, 16, 20]


def test_repetitions_come_out_of_one_budget() -> None:
    paced = Pace(4, sleep=lambda _: None)
    tries = 0

    def refused() -> None:
        nonlocal tries
        tries += 1
        raise Slow("slow down")

    requests = 2 * BUDGET
    for _ in range(requests):
        with pytest.raises(Slow, match="slow down"):
            paced.ask(refused, is_refusal=is_slow)
    assert tries == requests + BUDGET, "when it is used up, nothing is repeated"
    for _ in range(3):
        paced.ask(answer, is_refusal=is_slow)
    tries = 0
    with pytest.raises(Slow, match="slow down"):
        paced.ask(refused, is_refusal=is_slow)
    assert tries == 1 + 3, "an answer gives one back"


@given(st.lists(st.booleans(), max_size=200), st.integers(1, 32))
def test_there_is_always_a_place_and_never_more_than_all(refusals: list[bool], most: int) -> None:
    paced = Pace(most, sleep=lambda _: None)
    for refusal in refusals:
        with suppress(Slow):
            paced.ask(refuse if refusal else answer, is_refusal=is_slow)
        assert 1 <= paced.allowed <= most


# ---- against a server


class Crowded:
    """An S3 server that answers SlowDown while more than `limit` requests are under way. A request takes some time.

    The first `CONNECTIONS` requests are under way together: it answers none of them before all have come.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.all_here = threading.Barrier(CONNECTIONS, timeout=HANG)
        self.refused: list[bool] = []  # of each request, in order
        self.endpoint = ""
        self._running = 0
        self._lock = threading.Lock()

    def admits(self) -> bool:
        with self._lock:
            self._running += 1
            admitted = self._running <= self.limit
            self.refused.append(not admitted)
            is_early = len(self.refused) <= CONNECTIONS
        if is_early:
            self.all_here.wait()
        return admitted

    def ended(self) -> None:
        with self._lock:
            self._running -= 1


@contextmanager
def crowded_server(limit: int) -> Iterator[Crowded]:
    crowd = Crowded(limit)
    never = threading.Event()
    slow = (
        b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    )

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def answer(self) -> None:
            admitted = crowd.admits()
            try:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                never.wait(0.005)  # how long a request takes
            finally:
                crowd.ended()
            self.send_response(200 if admitted else 503)
            body = b"" if admitted else slow
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PUT = do_DELETE = answer  # noqa: N815

        def handle_expect_100(self) -> bool:
            go_on = super().handle_expect_100()
            self.wfile.flush()
            return go_on

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 4 * CONNECTIONS  # a connection that is refused would be one request more

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    crowd.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield crowd
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3Server("", "none", None).environment.items():  # type: ignore[arg-type]
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")


def _delete_all(store: S3Store, count: int) -> int:
    """Delete so many objects from 16 threads; how many deletions failed."""

    def delete(number: int) -> bool:
        try:
            store.delete(f"a/{number}")
        except Unavailable:
            return False
        return True

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(delete, range(count))).count(False)


def test_a_crowded_server_gets_fewer_requests_and_the_work_ends() -> None:
    never = threading.Event()

    def wait(seconds: float) -> None:
        never.wait(seconds / 50)

    with crowded_server(limit=3) as crowd:
        store = S3Store("bucket", client=shared_client(crowd.endpoint), sleep=wait)
        count = 600
        assert _delete_all(store, count) == 0
    refused = sum(crowd.refused)
    quarter = len(crowd.refused) // 4
    shares = [sum(crowd.refused[at : at + quarter]) / quarter for at in range(0, 4 * quarter, quarter)]
    print(f"{refused} of {len(crowd.refused)} requests were refused; by quarters {[f'{each:.0%}' for each in shares]}")
    assert crowd.refused[:CONNECTIONS].count(True) == CONNECTIONS - 3, "at first there were too many"
    # The pace goes up by one after each round, and so meets the limit again in each: about a fifth is refused. Without
    # a pace it is two thirds.
    assert max(shares[1:]) < 0.4, "once it is known how many the server takes, few are refused"
    traffic = store.meter.traffic
    assert (traffic.deletes, traffic.refused, traffic.retries) == (count + refused, refused, refused)
