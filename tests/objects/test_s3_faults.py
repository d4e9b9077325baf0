"""What an S3 server can do to us, from a server that does it: ambiguous creates, cut bodies, every error code."""

from __future__ import annotations

import hashlib
import threading
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.objects import open_store, s3, store as limits
from snapchain.objects.pace import ATTEMPTS
from snapchain.objects.probe import still_conditional
from snapchain.objects.s3 import CONFLICT_ATTEMPTS, MOST_TIMEOUTS, READ_ATTEMPTS, S3Store
from snapchain.objects.s3_client import (
    REQUEST_THREAD,
    TOTAL_ATTEMPTS,
    Patience,
    Silent,
    Watch,
    WatchedBody,
    new_client,
    warnings_about,
)
from snapchain.objects.s3_errors import CODES, EXCEPTIONS, STATUSES, from_s3_error
from snapchain.objects.store import NoConditions, ObjectInfo, Refused
from tests.objects.scripted import DROP, MISSING, Reply, Script, content, error, scripted_server, stored
from tests.servers import S3Server, free_port
from tests.waiting import HANG

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

BODY = b"bytes of mine, nonce 4711"
BUSY = error(503, "SlowDown")


@cache
def shared_client(endpoint: str, read_timeout: float = HANG) -> S3Client:
    """One for all tests: making a client takes a tenth of a second."""
    return new_client(endpoint, read_timeout=read_timeout)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3Server("", "none", None).environment.items():  # type: ignore[arg-type]
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda _: None))
    # A client retries less while its failures outweigh its successes; these tests count attempts.
    monkeypatch.setattr("botocore.retries.quota.RetryQuota.acquire", lambda *_: True)


@pytest.fixture(scope="module")
def script() -> Iterator[Script]:
    with scripted_server() as script:
        yield script


@pytest.fixture
def store(script: Script) -> S3Store:
    store = S3Store("bucket", "some/prefix", client=shared_client(script.endpoint), sleep=lambda _: None)
    store.properties = replace(store.properties, conditional_put=True)
    return store


# ---- what is sent


def test_a_put_carries_its_md5_and_no_trailer(store: S3Store, script: Script) -> None:
    script.says(stored(BODY))
    store.put("a/b", [BODY[:5], BODY[5:]])
    (request,) = script.requests
    assert (request.method, request.path) == ("PUT", "/bucket/some/prefix/a/b")
    headers = {name.lower(): value for name, value in request.headers.items()}
    assert headers["content-md5"] == b64encode(hashlib.md5(BODY).digest()).decode()
    assert request.body == BODY
    assert "if-none-match" not in headers
    assert not [name for name in headers if "checksum" in name or "trailer" in name or name == "content-encoding"]


def test_a_create_carries_its_condition(store: S3Store, script: Script) -> None:
    script.says(stored(BODY))
    assert store.create("a", BODY) is True
    (request,) = script.requests
    assert request.headers["If-None-Match"] == "*"


def test_an_unproven_store_is_asked_first(store: S3Store, script: Script) -> None:
    for known in (None, False):
        store.properties = replace(store.properties, conditional_put=known)
        script.says(content(b"old"))
        assert store.create("a", BODY) is False
        assert script.methods == ["HEAD"]
        script.says(Reply(404), stored(BODY))
        assert store.create("a", BODY) is True
        assert script.methods == ["HEAD", "PUT"], "the bucket was seen: no reason is asked for"


def test_amazon_itself_also_gets_a_sha256(monkeypatch: pytest.MonkeyPatch, store: S3Store, script: Script) -> None:
    script.says(stored(BODY))
    store.endpoint = "https://s3.eu-central-1.amazonaws.com"
    store.put("a", BODY)
    headers = {name.lower(): value for name, value in script.requests[0].headers.items()}
    assert headers["x-amz-checksum-sha256"] == b64encode(hashlib.sha256(BODY).digest()).decode()


# ---- create, when the answer leaves doubt


def test_a_plain_412_is_no(store: S3Store, script: Script) -> None:
    script.says(error(412, "PreconditionFailed"))
    assert store.create("a", BODY) is False
    assert script.methods == ["PUT"]


@pytest.mark.parametrize("first", [BUSY, DROP, error(500, "InternalError")])
def test_a_412_after_a_retry_may_be_about_our_own_write(store: S3Store, script: Script, first: Reply) -> None:
    script.says(first, error(412, "PreconditionFailed"), content(BODY))
    assert store.create("a", BODY) is True
    assert script.methods == ["PUT", "PUT", "GET"]
    script.says(first, error(412, "PreconditionFailed"), content(b"bytes of theirs"))
    assert store.create("a", BODY) is False


@pytest.mark.parametrize(("failure", "count"), [(BUSY, ATTEMPTS), (DROP, TOTAL_ATTEMPTS)])
def test_a_create_without_an_answer_is_settled_by_reading(
    store: S3Store, script: Script, failure: Reply, count: int
) -> None:
    attempts = [failure] * count
    script.says(*attempts, content(BODY))
    assert store.create("a", BODY) is True
    assert script.methods == ["PUT"] * count + ["GET"]
    script.says(*attempts, content(b"bytes of theirs"))
    assert store.create("a", BODY) is False
    script.says(*attempts, MISSING)
    with pytest.raises(Unavailable, match=r"overloaded|broke off"):
        store.create("a", BODY)
    script.says(*attempts, BUSY)
    with pytest.raises(Unavailable, match="overloaded"):
        store.create("a", BODY)


def test_a_create_whose_answer_does_not_come_in_time_is_settled_by_reading(script: Script) -> None:
    client = new_client(script.endpoint, read_timeout=2)
    store = S3Store("bucket", "some/prefix", client=client, sleep=lambda _: None)
    store.properties = replace(store.properties, conditional_put=True)
    script.says(Reply(hang=2.5), error(412, "PreconditionFailed"), content(BODY))
    assert store.create("a", BODY) is True
    assert script.methods == ["PUT", "PUT", "GET"]


def test_a_409_is_tried_again(store: S3Store, script: Script) -> None:
    busy = error(409, "ConditionalRequestConflict")
    script.says(busy, busy, stored(BODY))
    assert store.create("a", BODY) is True
    script.says(busy, error(412, "PreconditionFailed"))
    assert store.create("a", BODY) is False
    script.says(busy)
    with pytest.raises(Conflict, match="same time"):
        store.create("a", BODY)
    assert len(script.requests) == CONFLICT_ATTEMPTS


def test_a_server_that_refuses_conditions(store: S3Store, script: Script) -> None:
    """As OpenStack Swift does. Where conditions are relied on, nothing is written without them."""
    script.says(error(501, "NotImplemented"))
    with pytest.raises(NoConditions, match="does no conditional writes"):
        store.create("a", BODY)
    assert script.methods == ["PUT"]
    assert not still_conditional(store, "a", BODY)


@pytest.mark.parametrize("known", [False, None])
def test_where_nothing_relies_on_conditions_they_are_tried_once(
    store: S3Store, script: Script, known: bool | None
) -> None:
    store.properties = replace(store.properties, conditional_put=known)
    script.says(MISSING, MISSING, error(501, "NotImplemented"), stored(BODY), MISSING, stored(BODY))
    assert store.create("a", BODY) is True
    assert store.create("b", BODY) is True
    puts = [request.headers.get("If-None-Match") for request in script.requests if request.method == "PUT"]
    assert puts == ["*", None, None]


# ---- what was stored


def test_an_etag_of_other_bytes_is_corrupt(store: S3Store, script: Script) -> None:
    script.says(stored(b"other bytes"))
    for write in (store.put, store.create):
        with pytest.raises(Corrupt, match="stored other bytes"):
            write("a", BODY)


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"0123"'},
        {"ETag": f'"{"0" * 32}-2"'},
        {"ETag": f'"{"z" * 32}"'},
        {"ETag": f'"{"0" * 32}"', "x-amz-server-side-encryption": "aws:kms"},
        {"ETag": f'"{"0" * 32}"', "x-amz-server-side-encryption-customer-algorithm": "AES256"},
        {},
    ],
)
def test_an_etag_that_is_no_md5_says_nothing(store: S3Store, script: Script, headers: dict[str, str]) -> None:
    script.says(Reply(200, b"", headers))
    store.put("a", BODY)
    script.says(Reply(200, BODY, headers))
    assert store.get("a") == BODY
    assert len(script.requests) == 1


# ---- get, when the body is not what it should be


def test_a_cut_body_is_read_again(store: S3Store, script: Script) -> None:
    script.says(replace(content(BODY), cut=7), content(BODY))
    assert store.get("a") == BODY
    part = Reply(206, BODY[2:9], {"Content-Range": f"bytes 2-8/{len(BODY)}"})
    script.says(replace(part, cut=1), part)
    assert store.get("a", offset=2, length=7) == BODY[2:9]


def test_a_body_that_is_always_cut_is_unavailable(store: S3Store, script: Script) -> None:
    script.says(replace(content(BODY), cut=7))
    with pytest.raises(Unavailable, match="broke off"):
        store.get("a")
    assert len(script.requests) == READ_ATTEMPTS


TORN = replace(content(BODY), body=b"torn between two objects!")


def test_a_body_that_contradicts_its_etag_is_read_again(store: S3Store, script: Script) -> None:
    script.says(TORN, content(BODY))
    assert store.get("a") == BODY
    script.says(*[replace(TORN, body=b"torn %d" % number) for number in range(10)])
    with pytest.raises(Corrupt, match="differs from its ETag, 5 times"):
        store.get("a")


def test_etags_that_are_no_md5s_are_known_by_two_reads(store: S3Store, script: Script) -> None:
    script.says(TORN)
    assert store.get("a") == TORN.body
    assert len(script.requests) == 2


@pytest.mark.parametrize("known_by", ["put", "get"])
def test_where_etags_are_md5s_the_same_tear_twice_is_no_object(store: S3Store, script: Script, known_by: str) -> None:
    if known_by == "put":
        script.says(stored(BODY))
        store.put("a", BODY)
    else:
        script.says(content(BODY))
        store.get("a")
    script.says(TORN, TORN, content(BODY))
    assert store.get("a") == BODY
    script.says(TORN)
    with pytest.raises(Corrupt, match="differs from its ETag, 5 times"):
        store.get("a")


@pytest.mark.parametrize("headers", [{"ETag": '""'}, {}], ids=["empty", "none"])
def test_where_etags_are_md5s_an_object_without_one_is_read_again(
    store: S3Store, script: Script, headers: dict[str, str]
) -> None:
    # rclone sends an empty one while the object is being replaced: the old length, and the bytes of the new one.
    script.says(content(BODY))
    store.get("a")
    script.says(Reply(200, BODY[:-1], headers), content(BODY))
    assert store.get("a") == BODY
    # What comes twice is the object: a server need not store an MD5 for each.
    script.says(Reply(200, BODY, headers))
    assert store.get("a") == BODY
    assert len(script.requests) == 2
    script.says(*[Reply(200, b"torn %d" % number, headers) for number in range(10)])
    with pytest.raises(Corrupt, match="it is replaced while it is read, 5 times"):
        store.get("a")


def test_a_server_may_ignore_ranges(store: S3Store, script: Script) -> None:
    script.says(content(BODY))
    assert store.get("a", offset=3, length=5) == BODY[3:8]
    assert store.get("a", offset=3) == BODY[3:]
    with pytest.raises(Corrupt, match="ends 78 bytes before 103"):
        store.get("a", offset=3, length=100)


def test_another_range_is_refused(store: S3Store, script: Script) -> None:
    script.says(Reply(206, BODY[:5], {"Content-Range": f"bytes 0-4/{len(BODY)}"}))
    with pytest.raises(Unsupported, match="bytes 0-4"):
        store.get("a", offset=3, length=5)


def test_a_short_range_is_corrupt(store: S3Store, script: Script) -> None:
    script.says(Reply(206, BODY[3:5], {"Content-Range": f"bytes 3-4/{len(BODY)}"}))
    with pytest.raises(Corrupt, match="ends 3 bytes before 8"):
        store.get("a", offset=3, length=5)


# ---- listings


def page(names: list[str], token: str | None = None) -> Reply:
    entries = "".join(
        f"<Contents><Key>{name}</Key><Size>1</Size><LastModified>2026-01-02T03:04:05Z</LastModified></Contents>"
        for name in names
    )
    more = "<IsTruncated>false</IsTruncated>"
    if token is not None:
        more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
    body = f"<?xml version='1.0'?><ListBucketResult>{more}{entries}</ListBucketResult>"
    return Reply(200, body.encode(), {"Content-Type": "application/xml"})


def test_pages_follow_each_other(store: S3Store, script: Script) -> None:
    # The console makes an empty object of a folder's own name.
    script.says(
        page(["some/prefix/", "some/prefix/a"], "t1"), page(["some/prefix/b", "some/prefix/not ours"], "t2"), page([])
    )
    assert list(store.list("")) == [ObjectInfo("a", 1, 1767323045.0), ObjectInfo("b", 1, 1767323045.0)]
    assert [request.path.count("continuation-token") for request in script.requests] == [0, 1, 1]


def test_a_page_out_of_order_is_put_in_order(store: S3Store, script: Script) -> None:
    script.says(page(["some/prefix/b", "some/prefix/a"], "t1"), page(["some/prefix/c"]))
    assert [info.name for info in store.list("")] == ["a", "b", "c"]


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
def test_pages_may_come_in_any_order_be_empty_and_repeat_keys(
    store: S3Store, script: Script, data: st.DataObject
) -> None:
    names = data.draw(st.sets(st.sampled_from([f"{letter}{digit}" for letter in "abc/" for digit in "012"])))
    keys = [f"some/prefix/d/{name}" for name in names if not name.startswith("/")]
    shown = [*keys, *data.draw(st.lists(st.sampled_from(["some/other/a", "a", "some/prefix/e", "some/prefix/d/No"])))]
    shown = data.draw(st.permutations(shown + data.draw(st.lists(st.sampled_from(keys or ["x"]), max_size=3))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(shown)), max_size=4)))
    parts = [shown[begin:end] for begin, end in pairwise([0, *cuts, len(shown)])]
    script.says(*(page(part, None if number == len(parts) else f"t{number}") for number, part in enumerate(parts, 1)))
    assert [info.name for info in store.list("d/")] == sorted(key.removeprefix("some/prefix/") for key in keys)
    assert len(script.requests) == len(parts)


def test_a_server_may_ignore_delimiters(store: S3Store, script: Script) -> None:
    script.says(page(["some/prefix/d/b/1", "some/prefix/d/a/2/x", "some/prefix/d/top", "some/prefix/e/c/1"]))
    assert list(store.list_dirs("d")) == ["a", "b"]


@pytest.mark.parametrize("tokens", [["t1", "t1"], ["t1", "t2", "t1"]])
def test_a_token_that_comes_twice_is_refused(store: S3Store, script: Script, tokens: list[str]) -> None:
    script.says(*(page([f"some/prefix/{number}"], token) for number, token in enumerate(tokens)))
    for listing in (store.list, store.list_dirs):
        script.says(*(page([f"some/prefix/{number}"], token) for number, token in enumerate(tokens)))
        with pytest.raises(Unsupported, match="same continuation token twice"):
            list(listing(""))


def test_pages_that_bring_nothing_new_are_refused(
    store: S3Store, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "IDLE_PAGES", 3)
    script.says(*(page(["some/prefix/a"], f"t{number}") for number in range(9)))
    with pytest.raises(Unsupported, match="no new names"):
        list(store.list(""))
    script.says(*(page([], f"t{number}") for number in range(3)), page(["some/prefix/a"]))
    assert [info.name for info in store.list("")] == ["a"]


def test_a_listing_that_is_cut_off_is_refused(store: S3Store, script: Script) -> None:
    """Taken for whole, it would make gc delete what the rest of it needs."""
    script.says(page(["some/prefix/a"], ""))
    with pytest.raises(Unsupported, match="no continuation token"):
        list(store.list(""))


def test_a_listing_has_a_bound(store: S3Store, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LONGEST_LISTING", 2)
    script.says(page([f"some/prefix/{name}" for name in "abc"]))
    with pytest.raises(Unsupported, match="more than 2 objects"):
        list(store.list(""))


# ---- proxies


def html(status: int, **headers: str) -> Reply:
    return Reply(status, b"<html><h1>nginx</h1></html>", {"Content-Type": "text/html", **headers})


def test_an_object_that_a_proxy_refuses_for_its_size(store: S3Store, script: Script) -> None:
    for reply in (html(413), error(400, "EntityTooLarge")):
        for write in (store.put, store.create):
            script.says(reply)
            with pytest.raises(Unsupported, match="an object of 25 bytes: the request is larger than") as caught:
                write("packs/a", BODY)
            assert caught.value.subject == "s3://bucket/some/prefix/packs/a"
            assert "--pack-size" in str(caught.value.hint)
            assert "client_max_body_size" in str(caught.value.hint)


def test_an_expectation_that_a_proxy_does_not_meet(script: Script) -> None:
    store = S3Store("bucket", "some/prefix", client=new_client(script.endpoint), sleep=lambda _: None)
    store.properties = replace(store.properties, conditional_put=True)
    script.says(stored(BODY))
    store.put("a", BODY)
    assert script.requests[0].headers["Expect"] == "100-continue"
    for write in (store.put, store.create):
        fresh = S3Store("bucket", "some/prefix", client=new_client(script.endpoint), sleep=lambda _: None)
        fresh.properties = replace(store.properties, conditional_put=True)
        script.requests.clear()
        script.expectations = [417]
        getattr(fresh, write.__name__)("a", BODY)
        fresh.put("b", BODY)
        assert ["Expect" in request.headers for request in script.requests] == [True, False, False], "it is remembered"
        fresh.close()
    script.says(Reply(417))
    with pytest.raises(Unsupported, match="Expect: 100-continue"):
        store.put("a", BODY)
    store.close()


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_a_page_of_a_proxy_is_no_answer(store: S3Store, script: Script, status: int) -> None:
    script.says(html(status))
    for call in (
        lambda: store.put("a", BODY),
        lambda: store.get("a"),
        lambda: store.delete("a"),
        lambda: list(store.list("")),
        lambda: store.size("a"),
    ):
        with pytest.raises(Unsupported, match=f"a web page.*HTTP {status}"):
            call()


def test_a_portal_that_shows_one_page_for_everything(store: S3Store, script: Script) -> None:
    script.says(html(200, ETag='"5f3-21"'))
    for call in (lambda: store.get("a"), lambda: store.get("a", offset=3, length=2), lambda: store.size("a")):
        with pytest.raises(Unsupported, match="a web page"):
            call()
    script.says(html(200))
    with pytest.raises(Unsupported, match="a web page"):
        store.put("a", BODY)
    for listing in (store.list, store.list_dirs):
        with pytest.raises(Unsupported, match="a web page"):
            list(listing(""))


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_an_endpoint_that_redirects(store: S3Store, script: Script, status: int) -> None:
    script.says(Reply(status, b"", {"Location": "https://s3.example:8443/bucket/some/prefix/a"}))
    for call in (lambda: store.put("a", BODY), lambda: store.size("a"), lambda: list(store.list(""))):
        with pytest.raises(InvalidInput, match=r"redirects to https://s3\.example:8443 ") as caught:
            call()
        assert "AWS_ENDPOINT_URL_S3=https://s3.example:8443" in str(caught.value.hint)


def test_a_bucket_in_another_region(store: S3Store, script: Script) -> None:
    moved = replace(error(301, "PermanentRedirect"), headers={"x-amz-bucket-region": "eu-west-7"})
    script.says(moved)
    with pytest.raises(InvalidInput, match="another region") as caught:
        store.put("a", BODY)
    assert "eu-west-7" in str(caught.value.hint)


# ---- what a HEAD does not tell


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (404, "NoSuchBucket", NotFound, "no such bucket"),
        (400, "ExpiredToken", Refused, "credentials have expired"),
        (403, "RequestTimeTooSkewed", Refused, "clock differs"),
        (403, "InvalidAccessKeyId", Refused, "access key"),
        (403, "AccessDenied", Refused, "access denied"),
        (400, "AuthorizationHeaderMalformed", InvalidInput, "another region"),
    ],
)
def test_the_reason_of_a_head_is_asked_for(
    store: S3Store, script: Script, status: int, code: str, kind: type[SnapchainError], words: str
) -> None:
    script.says(Reply(status), error(status, code))
    with pytest.raises(kind, match=words) as caught:
        store.size("config")
    assert type(caught.value) is kind
    assert caught.value.hint
    assert script.methods[-1] == "GET"


def test_an_object_that_is_not_there_is_asked_for_twice_once(store: S3Store, script: Script) -> None:
    script.says(Reply(404), MISSING)
    assert store.size("a") is None
    assert script.methods == ["HEAD", "GET"]
    assert store.size("a") is None
    assert script.methods == ["HEAD", "GET", "HEAD"]


@pytest.mark.parametrize(
    ("operation", "permission"),
    [("put", "s3:PutObject"), ("get", "s3:GetObject"), ("delete", "s3:DeleteObject"), ("list", "s3:ListBucket")],
)
def test_a_permission_that_lacks_is_named(store: S3Store, script: Script, operation: str, permission: str) -> None:
    script.says(error(403, "AccessDenied"))
    calls: dict[str, Callable[[], object]] = {
        "put": lambda: store.put("a", BODY),
        "get": lambda: store.get("a"),
        "delete": lambda: store.delete("a"),
        "list": lambda: list(store.list("")),
    }
    with pytest.raises(Refused, match="access denied") as caught:
        calls[operation]()
    assert permission in str(caught.value.hint)


# ---- silence


@pytest.fixture
def silent_script() -> Iterator[Script]:
    """A server for one test: a request that was given up may still arrive, and would take another test's reply."""
    with scripted_server() as script:
        yield script


def impatient(script: Script, answer_within: float = 0.38, read_timeout: float = 0.2) -> S3Store:
    client = new_client(script.endpoint, read_timeout=read_timeout)
    store = S3Store("bucket", "some/prefix", client=client, sleep=lambda _: None, answer_within=answer_within)
    store.properties = replace(store.properties, conditional_put=True)
    return store


@pytest.mark.parametrize("reply", [Reply(silent=True), Reply(dribble=0.05)], ids=["silent", "dribbles"])
@pytest.mark.parametrize("call", ["put", "create", "get", "size", "delete", "list", "list_dirs"])
def test_a_server_that_does_not_answer(silent_script: Script, reply: Reply, call: str) -> None:
    store = impatient(silent_script)
    silent_script.says(reply)
    sent: list[object] = []  # what the server has seen by now is another matter
    store._client.meta.events.register("before-send.s3", lambda request, **_: sent.append(request.url))
    arguments = {"put": ("a", BODY), "create": ("a", BODY), "list": ("",), "list_dirs": ("",)}.get(call, ("a",))
    with pytest.raises(
        Silent, match=r"^s3://bucket/some/prefix.*127\.0\.0\.1:\d+ accepts requests and does not answer"
    ):
        deque(getattr(store, call)(*arguments) or (), maxlen=0)
    if reply.silent:  # (what dribbles does so until the server of this test ends)
        _join_requests()
    asked = len(sent)
    assert 1 <= asked < TOTAL_ATTEMPTS, "what was given up is not repeated"
    for again in (lambda: store.delete("a"), lambda: store.get("a"), lambda: list(store.list(""))):
        with pytest.raises(Silent, match="a moment ago"):
            again()
    assert len(sent) == asked, "what cleans up after the error waits no second time"


def _join_requests() -> None:
    """Wait for the requests that were given up: they end at their next timeout."""
    for thread in threading.enumerate():
        if thread.name == REQUEST_THREAD:
            thread.join(HANG)
            assert not thread.is_alive()


def test_a_body_that_stops_coming(silent_script: Script) -> None:
    store = impatient(silent_script, answer_within=10, read_timeout=1)  # which no busy machine needs for the headers
    silent_script.says(replace(content(BODY), cut=7, silent=True))
    with pytest.raises(Unavailable, match="does not answer"):
        store.get("a")
    assert len(silent_script.requests) == MOST_TIMEOUTS
    with pytest.raises(Silent, match="a moment ago"):
        store.delete("a")


def test_a_body_that_stops_coming_for_so_long_that_nothing_more_is_asked(silent_script: Script) -> None:
    store = impatient(silent_script, answer_within=1.25, read_timeout=1)
    silent_script.says(replace(content(BODY), cut=7, silent=True))
    with pytest.raises(Unavailable, match="does not answer"):
        store.get("a")
    assert len(silent_script.requests) == 1


def test_patience_follows_progress() -> None:
    """A slow link is not a silent server; a body that is sent again and again is."""
    now = [0.0]
    patience = Patience("host", limit=10, clock=lambda: now[0])

    def slow(watch: Watch) -> str:
        body = WatchedBody(bytes(3 << 20), watch)
        body.read()
        assert watch.moved == 0, "hashing is no progress"
        for attempt in range(4):
            body.begin_attempt()
            body.seek(0)
            now[0] += 6
            body.read()
            assert watch.moved == min(now[0], 12), attempt
        now[0] = watch.moved
        return "answer"

    assert patience.within(slow, subject="x") == "answer"
    now[0] += 100

    def fails(_: Watch) -> None:
        raise InvalidInput("its own error")

    with pytest.raises(InvalidInput, match="own"):
        patience.within(fails, subject="x")


# ---- addresses


def test_a_bucket_of_another_tenant_reaches_the_server(script: Script) -> None:
    store = open_store("s3://tenant:bucket/x", endpoint=script.endpoint)
    script.says(stored(BODY))
    store.put("a", BODY)
    assert script.requests[0].path == "/tenant%3Abucket/x/a"
    assert store.url == "s3://tenant:bucket/x"
    store.close()


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("S3://bucket/Some/x/", "/bucket/Some/x/a"),
        ("s3://bucket", "/bucket/a"),
        ("s3://bucket/", "/bucket/a"),
        ("s3://bucket/a%20b", "/bucket/a%2520b/a"),
        ("s3://bucket/a b+c", "/bucket/a%20b%2Bc/a"),
        ("s3://bucket//a//b//", "/bucket/a//b/a"),
    ],
)
def test_prefixes_are_taken_as_they_are_written(script: Script, url: str, path: str) -> None:
    store = open_store(url, endpoint=script.endpoint)
    script.says(stored(BODY))
    store.put("a", BODY)
    assert script.requests[0].path == path
    key = path.removeprefix("/bucket/").replace("%25", "%").replace("%2B", "+").replace("a%20b+", "a b+")
    script.says(page([key]))
    assert [info.name for info in store.list("")] == ["a"]
    store.close()


@pytest.mark.parametrize(
    "url", ["s3:bucket/x", "s3:/bucket/x", "s3://bucket/../x", "s3://bucket/a?b", "s3://bucket/a\nb"]
)
def test_addresses_that_would_lead_elsewhere(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        open_store(url)
    assert caught.value.subject in (url, ascii(url))


# ---- errors


def test_passing_errors_are_outlasted(store: S3Store, script: Script) -> None:
    script.says(BUSY, DROP, BUSY, stored(BODY))
    store.put("a", BODY)
    assert len(script.requests) == 4


def test_a_server_that_stays_busy_is_unavailable(store: S3Store, script: Script) -> None:
    script.says(BUSY)
    calls: list[Callable[[], object]] = [
        lambda: store.put("a", BODY),
        lambda: list(store.list("")),
        lambda: store.delete("a"),
        lambda: store.get("a"),
    ]
    for call in calls:
        script.requests.clear()
        with pytest.raises(Unavailable, match="SlowDown: said the server") as caught:
            call()
        assert len(script.requests) == ATTEMPTS
        assert caught.value.hint


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_code_of_the_table(store: S3Store, script: Script, code: str) -> None:
    meaning = CODES[code]
    status = 503 if meaning.error is Unavailable else 400
    script.says(error(status, code))
    for call in (lambda: store.put("a", b""), lambda: list(store.list("")), lambda: list(store.list_dirs(""))):
        with pytest.raises(meaning.error, match=f"{code}: said the server") as caught:
            call()
        assert type(caught.value) is meaning.error
        assert str(caught.value).startswith("s3://bucket/some/prefix/")


@pytest.mark.parametrize("status", [400, 418, *sorted(STATUSES), 500, 502, 599])
def test_every_status_without_a_code(store: S3Store, script: Script, status: int) -> None:
    script.says(Reply(status))
    if status == 404:
        assert store.size("a") is None
        return
    expected = STATUSES[status].error if status in STATUSES else Unavailable if status >= 500 else Unsupported
    with pytest.raises(expected, match=r"^s3://bucket/some/prefix/a: ") as caught:
        store.size("a")
    assert type(caught.value) is expected


def test_a_key_service_that_refuses(store: S3Store, script: Script) -> None:
    script.says(error(400, "KMS.DisabledException"))
    with pytest.raises(Refused, match="key service"):
        store.put("a", b"")


@pytest.mark.parametrize("body", [b"<html>Welcome to nginx", b"<Error><Code>", b"\xff\xfe\x00"])
@pytest.mark.parametrize("status", [200, 404])
def test_what_is_no_s3_at_all(store: S3Store, script: Script, body: bytes, status: int) -> None:
    script.says(Reply(status, body))
    expected, words = (NotFound, "HTTP 404") if status == 404 else (Unavailable, "HTTP 500")
    with pytest.raises(expected, match=words):
        list(store.list(""))


def test_every_exception_of_botocore_is_meant() -> None:
    """The table names classes; a name that botocore does not have would never match."""
    import botocore.exceptions
    import botocore.parsers

    for name in EXCEPTIONS:
        assert hasattr(botocore.exceptions, name) or hasattr(botocore.parsers, name), name
    for name, cls in vars(botocore.exceptions).items():
        if isinstance(cls, type) and issubclass(cls, botocore.exceptions.BotoCoreError):
            assert isinstance(from_s3_error(cls.__new__(cls), "s3://b"), SnapchainError), name


# ---- the way to the server


def test_nobody_listens() -> None:
    store = open_store("s3://bucket/x", endpoint=f"http://127.0.0.1:{free_port()}")
    for call in (lambda: store.get("a"), lambda: store.put("a", b""), lambda: list(store.list(""))):
        with pytest.raises(Unavailable, match="does not answer") as caught:
            call()
        assert caught.value.hint
    store.properties = replace(store.properties, conditional_put=True)
    with pytest.raises(Unavailable, match="does not answer"):
        store.create("a", b"")
    store.close()


def test_no_tls_on_the_other_side(script: Script) -> None:
    store = open_store("s3://bucket", endpoint=script.endpoint.replace("http:", "https:"))
    with pytest.raises(Refused, match="TLS"):
        store.put("a", b"")
    store.close()


def test_no_credentials(monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = open_store("s3://bucket", endpoint=script.endpoint)
    store.properties = replace(store.properties, conditional_put=True)
    for write in (store.put, store.create):
        with pytest.raises(Refused, match="no usable credentials") as caught:
            write("a", b"")
        assert "AWS_ACCESS_KEY_ID" in (caught.value.hint or "")
    store.close()


def test_half_credentials(monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(Refused, match="no usable credentials"):
        open_store("s3://bucket", endpoint=script.endpoint).put("a", b"")


def test_configuration_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ["nonsense", "ftp//x", ""]:
        with pytest.raises(InvalidInput, match="Invalid endpoint") as caught:
            open_store("s3://bucket", endpoint=endpoint)
        assert caught.value.hint
    with pytest.raises(InvalidInput, match="no bucket is named"):
        open_store("s3://")
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(InvalidInput, match="no-such-profile"):
        open_store("s3://bucket")
    monkeypatch.delenv("AWS_PROFILE")
    store = open_store("s3://Not A Bucket", endpoint="http://127.0.0.1:1")
    with pytest.raises(InvalidInput, match="does not take"):
        store.put("a", b"")
    store.close()


def test_a_way_without_tls_is_said() -> None:
    assert warnings_about("https://minio.example:9000") == ()
    for loopback in ["http://127.0.0.1:9000", "http://localhost", "http://[::1]:80", "http://127.9.9.9"]:
        assert warnings_about(loopback) == ()
    for plain in ["http://minio.example:9000", "http://10.0.0.1", "http://[fe80::1]:80"]:
        (warning,) = warnings_about(plain)
        assert "without TLS" in warning
    store = open_store("s3://bucket", endpoint="http://minio.example:9000")
    assert store.warnings == warnings_about("http://minio.example:9000")
    store.close()


def test_addresses_are_path_style_except_at_amazon() -> None:
    for endpoint, style in [(None, "auto"), ("http://127.0.0.1:9000", "path"), ("https://minio.example", "path")]:
        client = new_client(endpoint)
        settings: dict[str, str] = getattr(client.meta.config, "s3", {})
        assert settings["addressing_style"] == style
        client.close()


def test_the_endpoint_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://10.1.2.3:9000")
    store = open_store("s3://bucket/x")
    assert "http://10.1.2.3:9000" in store.properties.description
    assert store.warnings
    store.close()


# ---- real servers


@pytest.mark.parametrize("kind", ["moto", "rclone"])
def test_a_missing_bucket(kind: str, request: pytest.FixtureRequest) -> None:
    server: S3Server = request.getfixturevalue(kind)
    store = open_store("s3://no-such-bucket/x", endpoint=server.endpoint)
    for call in (lambda: store.get("a"), lambda: store.put("a", b""), lambda: list(store.list(""))):
        with pytest.raises(NotFound, match="no such bucket") as caught:
            call()
        assert caught.value.hint
    store.close()


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_wrong_key(name: str, rclone: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "something-else")
    store = open_store(f"s3://{rclone.new_bucket()}", endpoint=rclone.endpoint)
    calls = (
        lambda: store.get("a"),
        lambda: store.put("a", b""),
        lambda: store.size("a"),
        lambda: list(store.list("")),
        lambda: store.delete("a"),
    )
    for call in calls:
        with pytest.raises(Refused, match=r"does not accept the access key|access denied") as caught:
            call()
        assert caught.value.hint
    store.close()
