"""A boto3 client as snapchain needs it, and what to say about the way it goes.

Endpoint, region and credentials come from where boto3 looks (AWS_* variables, ~/.aws, instance roles).  Checksums are
only those that S3 demands: servers that are not Amazon's have refused botocore's default trailers, or stored them
inside the object.  We send Content-MD5 instead, which even old servers check.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar
from urllib.parse import urlsplit

from snapchain.errors import InvalidInput, Unavailable
from snapchain.objects.meter import Meter
from snapchain.objects.s3_errors import is_region, is_slow_down, malformed, s3_errors

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

CONNECT_TIMEOUT = 5.0
READ_TIMEOUT = 18.0
"""Seconds. A server that is silent for longer is asked once more, within ANSWER_WITHIN."""
TOTAL_ATTEMPTS = 5
LARGEST_ANSWER = 4 * 1024 * 1024
"""Bytes of a response that is no object. A page of 1000 keys of 1024 bytes, each of them escaped, has 3.5 MB."""
LARGEST_ERROR = 256 * 1024
CONNECTIONS = 16
"""Requests in flight at once; more threads than this wait for their turn (pace.py)."""


def new_client(
    endpoint: str | None,
    *,
    profile: str | None = None,
    connections: int = CONNECTIONS,
    connect_timeout: float = CONNECT_TIMEOUT,
    read_timeout: float = READ_TIMEOUT,
    attempts: int = TOTAL_ATTEMPTS,
) -> S3Client:
    """A client; no request is sent yet.  Path-style addresses wherever the endpoint is not Amazon's own.

    profile: of ~/.aws, whose credentials are taken instead of those of the environment
    Raises InvalidInput for an unusable endpoint, profile or region.
    """
    import boto3
    from botocore.config import Config

    def client(style: Literal["auto", "path"]) -> S3Client:
        config = Config(
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
            max_pool_connections=connections,
            retries={"mode": "standard", "total_max_attempts": attempts},
            user_agent_extra="snapchain",
            s3={"addressing_style": style},
        )
        region = session.region_name or "us-east-1"
        return session.client("s3", endpoint_url=endpoint, region_name=region, config=config)

    where = endpoint or "s3"
    with s3_errors(where):
        try:
            session = boto3.session.Session(profile_name=profile)
            made = client("path")
            # Only a client knows the endpoint that the environment or a profile gives.
            if is_amazon(made.meta.endpoint_url):
                made = client("auto")
            else:
                _accept_tenants(made)
        except ValueError as error:
            raise InvalidInput(str(error), subject=where, hint="give http://host:port or https://host") from error
    endpoint_of: Any = made
    endpoint_of._endpoint.http_session = _BoundedSession(endpoint_of._endpoint.http_session)  # noqa: SLF001
    made.meta.events.register("before-send.s3", _begin_attempt)
    made.meta.events.register_first("needs-retry.s3", _judge)
    return made


def expect_no_continue(client: S3Client) -> None:
    """From here on no request waits for `100 Continue`: some proxy answered that it cannot meet the expectation."""
    client.meta.events.register_last("before-call.s3", _without_expect)


def _without_expect(params: dict[str, Any], **_: object) -> None:
    params["headers"].pop("Expect", None)


def _begin_attempt(request: Any, event_name: str = "", **_: object) -> None:
    watch: Watch | None = getattr(_THIS_THREAD, "watch", None)
    if watch is not None and watch.given_up:
        raise Silent("the request was given up, and is not repeated", subject=urlsplit(request.url).netloc)
    if isinstance(request.body, WatchedBody):
        request.body.begin_attempt()
    if watch is not None:
        watch.meter.sent(event_name.rpartition(".")[2], int(request.headers.get("Content-Length") or 0))


def _judge(response: tuple[Any, dict[str, Any]] | None, operation: Any, attempts: int, **_: object) -> None:
    """Count one response, or the lack of one, and raise those of which botocore must not repeat the request."""
    watch: Watch | None = getattr(_THIS_THREAD, "watch", None)
    if watch is not None:
        if attempts > 1:
            watch.meter.repeated()
        if response is not None and operation.name != "GetObject":  # whose body is read later, and counted there
            watch.meter.received(len(response[0].content))
    if response is not None:
        _refuse_redirect(response, operation)
        _refuse_slow_down(response, operation, attempts)


def _refuse_slow_down(response: tuple[Any, dict[str, Any]], operation: Any, attempts: int) -> None:
    """Raise what says that the server wants fewer requests: here it would be repeated at the same pace (pace.py)."""
    from botocore.exceptions import ClientError

    answer = response[1]
    if is_slow_down(answer):
        answer.setdefault("ResponseMetadata", {})["RetryAttempts"] = attempts - 1
        raise ClientError(answer, operation.name)  # type: ignore[arg-type]


def _refuse_redirect(response: tuple[Any, dict[str, Any]], operation: Any) -> None:
    """Raise what redirects, but for AWS that names another region of its own.

    Elsewhere botocore would send the request to an address that the server has chosen, or ask for the bucket's region
    until its stack ends.
    """
    from botocore.exceptions import ClientError

    if response[0].status_code not in {301, 302, 303, 307, 308}:
        return
    answer = response[1]
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = headers.get("x-amz-bucket-region") or answer.get("Error", {}).get("Region")
    if not is_region(str(region or "")) or not is_amazon(response[0].url):
        raise ClientError(answer, operation.name)  # type: ignore[arg-type]


class _NoRedirects:
    """Mixed into urllib3's pools of connections: a redirect is a response like others."""

    def urlopen(self, *args: Any, **more: Any) -> Any:
        return super().urlopen(*args, **(more | {"redirect": False}))  # type: ignore[misc]


class _BoundedSession:
    """botocore's HTTP session, whose responses are not read further than a response of S3 reaches.

    botocore reads every body but that of an object as a whole, however long it is.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        # Also of proxies, which the session makes later. urllib3 looks at redirects even where it must not follow any.
        known = inner._pool_classes_by_scheme  # noqa: SLF001
        pools = {scheme: type("Pool", (_NoRedirects, pool), {}) for scheme, pool in known.items()}
        inner._pool_classes_by_scheme = inner._manager.pool_classes_by_scheme = pools  # noqa: SLF001

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def send(self, request: Any) -> Any:
        """As URLLib3Session.send. Raises Unsupported for a response that is too long."""
        is_object = request.stream_output
        request.stream_output = True  # so that the session leaves the body to us
        response = self._inner.send(request)
        if is_object and response.status_code < 300:
            return response
        with _transport_errors(request):
            body = _bounded(response.raw, subject=urlsplit(request.url).netloc, is_error=response.status_code >= 300)
        response.raw = io.BytesIO()
        response._content = body  # noqa: SLF001 -- what its property `content` returns
        return response


def _bounded(raw: Any, *, subject: str, is_error: bool) -> bytes:
    """The body of a response; of an error that is too long, nothing: its status says what matters."""
    limit = LARGEST_ERROR if is_error else LARGEST_ANSWER
    body = io.BytesIO()
    for part in raw.stream(64 * 1024):
        body.write(part)
        if body.tell() > limit:
            raw.close()
            if is_error:
                return b""
            raise malformed(subject, f"it has more than {limit} bytes")
    raw.release_conn()
    return body.getvalue()


@contextmanager
def _transport_errors(request: Any) -> Iterator[None]:
    """Raise what botocore's session raises, and botocore retries, for a body that breaks off."""
    from botocore.exceptions import ConnectionClosedError, HTTPClientError, ReadTimeoutError
    from urllib3.exceptions import HTTPError, ProtocolError, ReadTimeoutError as Timeout

    try:
        yield
    except Timeout as error:
        raise ReadTimeoutError(endpoint_url=request.url, error=error) from error
    except ProtocolError as error:
        raise ConnectionClosedError(error=error, request=request, endpoint_url=request.url) from error
    except HTTPError as error:
        raise HTTPClientError(error=error) from error


def _accept_tenants(client: S3Client) -> None:
    """Let names such as `tenant:bucket` go to the server: so Ceph writes a bucket of another tenant."""
    from botocore.handlers import validate_bucket_name

    def validate(params: dict[str, Any], **_: object) -> None:
        validate_bucket_name({"Bucket": params.get("Bucket", "").rpartition(":")[2]})

    client.meta.events.unregister("before-parameter-build.s3", validate_bucket_name)
    client.meta.events.register("before-parameter-build.s3", validate)


def is_amazon(endpoint: str) -> bool:
    """Whether an endpoint URL is one of AWS itself."""
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def canonical(endpoint: str) -> str:
    """One spelling for all of an endpoint: capitals, the scheme's own port and a slash at the end do not matter.

    All of AWS is one place, since the names of its buckets are unique.
    """
    if is_amazon(endpoint):
        return "aws"
    parts = urlsplit(endpoint)
    host = (parts.hostname or "").rstrip(".")
    default = {"http": 80, "https": 443}.get(parts.scheme)
    port = f":{parts.port}" if parts.port not in {None, default} else ""
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def warnings_about(endpoint: str) -> tuple[str, ...]:
    """What an operator should know about the way to an endpoint."""
    parts = urlsplit(endpoint)
    if parts.scheme == "https" or _is_loopback(parts.hostname or ""):
        return ()
    return (f"{parts.scheme}://{parts.netloc} is reached without TLS: whoever is on the way can read and change all",)


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


# --- A bound for requests to a server: one that makes no progress for long is given up.
#
# botocore bounds each wait for a byte, and then repeats the request; a server that accepts and never answers, or that
# sends one byte every ten seconds, would hold a command for minutes.  So each request runs in a thread of its own,
# which is given up after ANSWER_WITHIN seconds without progress, retries included.  Progress is what `Watch.progress`
# reports: a part of the body that was sent, or received.
#
# A server that was silent once is not asked again for COOLING seconds: the clean-up after the first error must not wait
# as long as the error itself.  Nor does botocore repeat a request that was given up: a PUT must not arrive when its
# caller has long been told of the error.

ANSWER_WITHIN = 32.0
COOLING = 30.0
"""Seconds."""
_SMALL = 1 << 20
"""Bytes of a body that is sent at once."""
_LONG = 0.6
"""The share of the limit after which a timeout that botocore reports counts as silence."""
REQUEST_THREAD = "s3 request"
_HINT = "check the server, the network and the firewall, then run the command again"

Result = TypeVar("Result")
_THIS_THREAD = threading.local()
"""watch: of the request that this thread makes."""


class Silent(Unavailable):
    """The server did not answer, and was given up."""


class Watch:
    """The time of a request's last progress. given_up: nobody waits for the response any more; meter: counts it."""

    def __init__(self, clock: Callable[[], float], meter: Meter) -> None:
        self._clock = clock
        self.meter = meter
        self.moved = clock()
        self.given_up = False

    def progress(self) -> None:
        """Something was sent or received: the wait begins anew."""
        self.moved = self._clock()


class Patience:
    """One server's. host: named in errors; limit: seconds without progress; meter: counts requests. Thread-safe."""

    def __init__(
        self,
        host: str,
        *,
        limit: float = ANSWER_WITHIN,
        clock: Callable[[], float] = time.monotonic,
        meter: Meter | None = None,
    ) -> None:
        self._host = host
        self._meter = meter or Meter()
        self._limit = limit
        self._clock = clock
        self._closed_until = -1.0

    def within(self, request: Callable[[Watch], Result], *, subject: str) -> Result:
        """What `request` returns or raises.

        Raises Silent when it makes no progress, or when another request found the server silent a moment ago.
        """
        if self.is_closed:
            raise self._silent("did not answer a moment ago, and is not asked again yet", subject)
        watch = Watch(self._clock, self._meter)
        running = _Running(request, watch)
        while not running.done.wait(max(0.0, watch.moved + self._limit - self._clock())):
            if self._clock() >= watch.moved + self._limit:
                watch.given_up = True
                self.give_up()
                raise self._silent(
                    f"accepts requests and does not answer: no progress for {self._limit:.0f} s", subject
                )
        if isinstance(running.error, Exception) and self._clock() - watch.moved > _LONG * self._limit:
            from botocore.exceptions import ConnectionError as Connection, HTTPClientError

            if isinstance(running.error, HTTPClientError | Connection):
                self.give_up()
        return running.outcome()

    @property
    def is_closed(self) -> bool:
        """Whether the server was silent a moment ago, so that nothing is asked."""
        return self._clock() < self._closed_until

    def give_up(self) -> None:
        """Ask nothing for COOLING seconds: the server was silent for long."""
        self._closed_until = self._clock() + COOLING

    def _silent(self, words: str, subject: str) -> Silent:
        return Silent(f"{self._host} {words}", subject=subject, hint=_HINT)


class _Running(Generic[Result]):
    """A request in a thread of its own. Daemonic: the process may end while the request still waits."""

    def __init__(self, request: Callable[[Watch], Result], watch: Watch) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None
        self._request, self._watch = request, watch
        self._result: list[Result] = []
        threading.Thread(target=self._run, name=REQUEST_THREAD, daemon=True).start()

    def _run(self) -> None:
        _THIS_THREAD.watch = self._watch
        try:
            self._result.append(self._request(self._watch))
        except BaseException as error:  # noqa: BLE001 -- handed to the thread that waits
            self.error = error
        finally:
            self.done.set()

    def outcome(self) -> Result:
        if self.error is not None:
            raise self.error
        return self._result[0]


class WatchedBody(io.BytesIO):
    """A request's body, which reports to its watch that more was sent.

    Not while it is hashed, before it is sent; and not from the third attempt on: a server that takes the body and
    never answers would else be waited for as often as the request is repeated.
    """

    def __init__(self, body: bytes, watch: Watch) -> None:
        super().__init__(body)
        self._watch = watch
        self._attempts = 0
        self._small = len(body) <= _SMALL

    def begin_attempt(self) -> None:
        """From here on it is read to be sent."""
        self._attempts += 1

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if data and 1 <= self._attempts <= (1 if self._small else 2):
            self._watch.progress()
        return data
