"""What S3's error codes and botocore's exceptions mean: which class of our tree, and what to do.

Sources: Amazon S3 API Reference "Error responses" (codes), botocore.exceptions (what never reached the server).
Nothing of botocore leaves snapchain.objects.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.objects.store import Archived, Refused


class Meaning(NamedTuple):
    """The error to raise, in which words, and its hint."""

    error: type[SnapchainError]
    message: str
    hint: str | None = None


_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_BUSY = Meaning(Unavailable, "the server is overloaded or has a fault", "run the command again later")
_KEY_WRONG = Meaning(Refused, "the server does not accept the access key", _KEYS)
_EXPIRED = Meaning(Refused, "the credentials have expired", "get new ones, then run the command again")
_DENIED = Meaning(
    Refused, "access denied", "the access key needs s3:GetObject, PutObject, DeleteObject and ListBucket here"
)
_ELSEWHERE = Meaning(InvalidInput, "the bucket is in another region", "set AWS_DEFAULT_REGION to the bucket's region")
_REDIRECTED = Meaning(
    InvalidInput, "the endpoint redirects to another address", "set AWS_ENDPOINT_URL_S3 to the address of the S3 server"
)
_NO_BUCKET = Meaning(NotFound, "there is no such bucket", "create the bucket first; snapchain never does")
_DAMAGED = Meaning(Unavailable, "the bytes were damaged on their way to the server", "run the command again")
_FULL = Meaning(Refused, "the server has no room", "free space or raise the quota, then run the command again")
_ARCHIVED = Meaning(Archived, "the object is in an archive tier; it is not damaged")
_NO_LOCK = Meaning(
    InvalidInput, "the bucket has no Object Lock", "enable it for the bucket, or unset SNAPCHAIN_S3_LOCK_MODE"
)
_NOT_THERE = Meaning(NotFound, "no such object")
_CHANGED = Meaning(Conflict, "a condition of the request did not hold")
_NOT_DONE = Meaning(Unsupported, "the server does not implement this request")
_SMALLER = "raise its limit (of nginx: client_max_body_size), or make objects smaller with --pack-size 1M"
_LARGE = 1 << 20
"""Bytes. Smaller objects are seldom refused for their size."""
_TOO_LARGE = Meaning(Unsupported, "the request is larger than the server, or a proxy before it, accepts", _SMALLER)
_NO_CONTINUE = Meaning(
    Unsupported, "a proxy refuses the header Expect: 100-continue", "let the proxy pass it on, or bypass the proxy"
)
_PROXY_KEYS = Meaning(
    Refused, "the HTTP proxy asks for credentials", "give them in HTTPS_PROXY, or list the server in NO_PROXY"
)
_A_PAGE = Meaning(
    Unsupported,
    "the response is a web page, not one of S3",
    "check the endpoint (host, port, path), and the proxies and portals before it",
)

CODES: dict[str, Meaning] = {
    "NoSuchKey": _NOT_THERE,
    "NoSuchBucket": _NO_BUCKET,
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "AccountProblem": _DENIED,
    "InvalidAccessKeyId": _KEY_WRONG,
    "SignatureDoesNotMatch": _KEY_WRONG,
    "InvalidToken": _KEY_WRONG,
    "InvalidSecurity": _KEY_WRONG,
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestExpired": _EXPIRED,
    "RequestTimeTooSkewed": Meaning(Refused, "this machine's clock differs from the server's", "set the clock (NTP)"),
    "PermanentRedirect": _ELSEWHERE,
    "AuthorizationHeaderMalformed": _ELSEWHERE,
    "IllegalLocationConstraintException": _ELSEWHERE,
    "InvalidBucketName": Meaning(InvalidInput, "not a bucket name"),
    "InvalidRange": Meaning(Corrupt, "the object is shorter than it should be"),
    "BadDigest": _DAMAGED,
    "InvalidDigest": _DAMAGED,
    "XAmzContentSHA256Mismatch": _DAMAGED,
    "XAmzContentChecksumMismatch": _DAMAGED,
    "IncompleteBody": _DAMAGED,
    "EntityTooLarge": _TOO_LARGE,
    "PreconditionFailed": _CHANGED,
    "ConditionalRequestConflict": _CHANGED,
    "OperationAborted": _CHANGED,
    "NotImplemented": _NOT_DONE,
    "QuotaExceeded": _FULL,
    "XMinioStorageFull": _FULL,
    "XMinioAdminBucketQuotaExceeded": _FULL,
    "InvalidObjectState": _ARCHIVED,
    "InvalidStorageClass": Meaning(InvalidInput, "the server has no such storage class", "SNAPCHAIN_S3_STORAGE_CLASS"),
    "SlowDown": _BUSY,
    "ServiceUnavailable": _BUSY,
    "InternalError": _BUSY,
    "RequestTimeout": _BUSY,
    "Throttling": _BUSY,
    "TooManyRequests": _BUSY,
}
STATUSES: dict[int, Meaning] = {
    301: _ELSEWHERE,
    302: _REDIRECTED,
    303: _REDIRECTED,
    307: _ELSEWHERE,
    308: _REDIRECTED,
    401: _KEY_WRONG,
    403: _DENIED,
    404: _NOT_THERE,
    405: _NOT_DONE,
    407: _PROXY_KEYS,
    408: _BUSY,
    409: _CHANGED,
    412: _CHANGED,
    413: _TOO_LARGE,
    416: CODES["InvalidRange"],
    417: _NO_CONTINUE,
    429: _BUSY,
    501: _NOT_DONE,
    507: _FULL,
}
"""For a code that is not in CODES, and for HEAD, whose replies have no body and so no code."""

_CREDENTIALS = Meaning(Refused, "no usable credentials for S3 were found", _KEYS)
_CONFIGURATION = Meaning(InvalidInput, "the AWS configuration cannot be used", "look at ~/.aws and the AWS_ variables")
_REQUEST = Meaning(InvalidInput, "S3 does not take this request")
_NO_ANSWER = Meaning(Unavailable, "the server does not answer", "look at the endpoint, the network and the firewall")
_BROKEN_OFF = Meaning(Unavailable, "the connection broke off", "run the command again")
_TLS = Meaning(Refused, "TLS failed", "https or http? For a private authority set AWS_CA_BUNDLE")
_REGION = re.compile(r"[a-z0-9][a-z0-9-]{0,40}", re.ASCII)
_ADDRESS = re.compile(r"https?://(?:[A-Za-z0-9.-]{1,253}|\[[0-9a-fA-F:.]{2,45}\])(?::[0-9]{1,5})?(?=[/?#]|$)", re.ASCII)
_STRANGE = Meaning(Unsupported, "the server does not speak S3", "look at the endpoint: host, port, http or https")

PERMISSIONS = {
    "PutObject": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
    "GetObject": "s3:GetObject, and s3:ListBucket: without it S3 denies access to missing objects",
    "HeadObject": "s3:GetObject, and s3:ListBucket: without it S3 denies access to missing objects",
}
"""Operation -> what the access key needs for it."""

EXCEPTIONS: dict[str, Meaning] = {
    "NoCredentialsError": _CREDENTIALS,
    "PartialCredentialsError": _CREDENTIALS,
    "CredentialRetrievalError": _CREDENTIALS,
    "TokenRetrievalError": _CREDENTIALS,
    "NoAuthTokenError": _CREDENTIALS,
    "MetadataRetrievalError": _CREDENTIALS,
    "UnknownCredentialError": _CREDENTIALS,
    "SSOError": _CREDENTIALS,
    "LoginError": _CREDENTIALS,
    "ProfileNotFound": _CONFIGURATION,
    "ConfigNotFound": _CONFIGURATION,
    "ConfigParseError": _CONFIGURATION,
    "InvalidConfigError": _CONFIGURATION,
    "BaseEndpointResolverError": _CONFIGURATION,
    "EndpointProviderError": _CONFIGURATION,
    "ValidationError": _CONFIGURATION,
    "ParamValidationError": _REQUEST,
    "SSLError": _TLS,
    "ConnectTimeoutError": _NO_ANSWER,
    "EndpointConnectionError": _NO_ANSWER,
    "ProxyConnectionError": _NO_ANSWER,
    "ReadTimeoutError": _NO_ANSWER,
    "ConnectionError": _NO_ANSWER,
    "ConnectionClosedError": _BROKEN_OFF,
    "IncompleteReadError": _BROKEN_OFF,
    "ResponseStreamingError": _BROKEN_OFF,
    "HTTPClientError": _BROKEN_OFF,
    "ChecksumError": _BROKEN_OFF,
    "ResponseParserError": _STRANGE,
    "UnauthorizedSSOTokenError": _EXPIRED,
}
"""By class name along the method resolution order; BotoCoreErrors that are not here are taken for configuration."""


@contextmanager
def s3_errors(subject: str, *, sent: int | None = None) -> Iterator[None]:
    """Raise our errors for botocore's.

    subject: names the object or the bucket
    sent: bytes of the body that the request carried
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (ClientError, BotoCoreError, ResponseParserError, HTTPError) as error:
        raise from_s3_error(error, subject, sent=sent) from error


def from_s3_error(error: Exception, subject: str, *, sent: int | None = None) -> SnapchainError:
    """The error of our tree for one of botocore's or urllib3's; subject, sent: as in `s3_errors`."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        meaning, words = _answer_means(response, str(getattr(error, "operation_name", "")))
    else:
        names = [cls.__name__ for cls in type(error).__mro__]
        fallback = _CONFIGURATION if "BotoCoreError" in names else _BROKEN_OFF
        meaning = next((EXCEPTIONS[name] for name in names if name in EXCEPTIONS), fallback)
        words = " ".join(str(error).split())
    message = meaning.message
    if meaning is _ARCHIVED:
        meaning = meaning._replace(hint=_how_to_restore(subject))
    if sent is not None and meaning is _TOO_LARGE:
        message = f"an object of {sent} bytes: {message}"
    elif sent is not None and sent > _LARGE and meaning is _BROKEN_OFF:
        meaning = meaning._replace(hint=f"run it again; if only large objects fail, a proxy limits them: {_SMALLER}")
    message = f"{message} ({words[:300]})" if words else message
    return meaning.error(message, subject=subject, hint=meaning.hint)


def _how_to_restore(subject: str) -> str:
    bucket, _, key = subject.removeprefix("s3://").partition("/")
    words = shlex.join(["aws", "s3api", "restore-object", "--bucket", bucket, "--key", key])
    return (
        "let no lifecycle rule archive this bucket; restore this object and others of that tier, wait until they are "
        f"there, and run the command again: {words} --restore-request Days=14"
    )


def malformed(subject: str, words: str) -> SnapchainError:
    """The error for a response that has the form of S3 and makes no sense."""
    return Unsupported(
        f"the server's response is malformed ({' '.join(words.split())[:300]})", subject=subject, hint=_STRANGE.hint
    )


def page_error(subject: str) -> SnapchainError:
    """The error for a web page where S3 was asked."""
    return _A_PAGE.error(_A_PAGE.message, subject=subject, hint=_A_PAGE.hint)


def status_of(error: Exception) -> int:
    """The HTTP status that a ClientError reports; 0 when nothing was answered."""
    response = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def was_retried(error: Exception) -> bool:
    """Whether botocore sent the request more than once, so that an earlier one may have had its effect."""
    response = getattr(error, "response", None) or {}
    return bool(response.get("ResponseMetadata", {}).get("RetryAttempts", 0))


_SLOW_DOWN = frozenset({"SlowDown", "ServiceUnavailable", "Throttling", "ThrottlingException", "TooManyRequests"})


def is_slow_down(answer: dict[str, Any]) -> bool:
    """Whether a parsed response says that the server wants fewer requests. The one to a HEAD has no code."""
    code = str(answer.get("Error", {}).get("Code", ""))
    return code in _SLOW_DOWN or int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) in {429, 503}


def refuses_pace(error: BaseException | None) -> bool:
    """As `is_slow_down`, of an error."""
    response = getattr(error, "response", None)
    return isinstance(response, dict) and is_slow_down(response)


def note_retries(error: Exception, retries: int) -> None:
    """Add to the retries that `was_retried` looks for."""
    response = getattr(error, "response", None)
    if retries and isinstance(response, dict):
        metadata = response.setdefault("ResponseMetadata", {})
        metadata["RetryAttempts"] = metadata.get("RetryAttempts", 0) + retries


def _answer_means(response: dict[str, dict[str, Any]], operation: str) -> tuple[Meaning, str]:
    error, metadata = response.get("Error", {}), response.get("ResponseMetadata", {})
    headers: dict[str, str] = metadata.get("HTTPHeaders") or {}
    code, status = str(error.get("Code", "")), int(str(metadata.get("HTTPStatusCode", 0)))
    # An answer without S3's own code comes from something else, or has no body.
    is_s3 = bool(code) and not code.isdigit()
    words = ": ".join(part for part in (code if is_s3 else f"HTTP {status}", error.get("Message")) if part)
    meaning = CODES.get(code) or STATUSES.get(status)
    if code == "InvalidRequest" and "objectlock" in str(error.get("Message", "")).replace(" ", "").lower():
        meaning = _NO_LOCK
    if meaning is None and code.startswith("KMS."):
        meaning = Meaning(Refused, "the server's key service refuses", "look at the bucket's KMS key and its policy")
    if meaning is None:
        meaning = _BUSY if status >= 500 else Meaning(Unsupported, "the server refuses the request")
    if meaning in {_ELSEWHERE, _REDIRECTED}:
        return _redirected(error, headers, is_s3=is_s3), words
    if not is_s3 and _is_page(headers, operation) and meaning in {_DENIED, _NOT_THERE, _KEY_WRONG, _NOT_DONE}:
        meaning = _A_PAGE
    if meaning is _DENIED and operation in PERMISSIONS:
        meaning = meaning._replace(hint=f"the access key needs {PERMISSIONS[operation]}")
    return meaning, words


def _redirected(error: dict[str, Any], headers: dict[str, str], *, is_s3: bool) -> Meaning:
    """Where the server wants the request to go: another region of its own, or another address."""
    region = str(headers.get("x-amz-bucket-region") or error.get("Region") or "")
    if is_region(region):
        return _ELSEWHERE._replace(hint=f"set AWS_DEFAULT_REGION to the bucket's region: {region}")
    location = headers.get("location", "")
    if location and not is_s3:
        found = _ADDRESS.match(location)
        if found is None:  # what a server says is no part of a command
            return _REDIRECTED
        return _REDIRECTED._replace(
            message=f"the endpoint redirects to {found[0]}",
            hint=f"if that is the S3 server, set AWS_ENDPOINT_URL_S3={found[0]}",
        )
    return _ELSEWHERE if is_s3 else _REDIRECTED


def is_region(text: str) -> bool:
    """Whether `text` may be the name of a region."""
    return _REGION.fullmatch(text) is not None


def _is_page(headers: dict[str, str], operation: str) -> bool:
    """Whether an error without a code of S3 came with a web page. Answers to HEAD have no body, and tell nothing."""
    return operation != "HeadObject" and headers.get("content-type", "").startswith("text/html")
