"""What S3's error codes and botocore's exceptions mean: which class of our tree, and what to do.

Sources: Amazon S3 API Reference "Error responses" (codes), botocore.exceptions (what never reached the server).
Nothing of botocore leaves snapchain.objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.objects.store import Refused


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
_NO_BUCKET = Meaning(NotFound, "there is no such bucket", "create the bucket first; snapchain never does")
_DAMAGED = Meaning(Unavailable, "the bytes were damaged on their way to the server", "run the command again")
_FULL = Meaning(Refused, "the server has no room", "free space or raise the quota, then run the command again")
_ARCHIVED = Meaning(Refused, "the object is in an archive tier", "restore it from the archive tier first")
_NOT_THERE = Meaning(NotFound, "no such object")
_CHANGED = Meaning(Conflict, "a condition of the request did not hold")
_NOT_DONE = Meaning(Unsupported, "the server does not implement this request")

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
    "EntityTooLarge": Meaning(Unsupported, "the server takes no object of this size in one request"),
    "PreconditionFailed": _CHANGED,
    "ConditionalRequestConflict": _CHANGED,
    "OperationAborted": _CHANGED,
    "NotImplemented": _NOT_DONE,
    "QuotaExceeded": _FULL,
    "XMinioStorageFull": _FULL,
    "XMinioAdminBucketQuotaExceeded": _FULL,
    "InvalidObjectState": _ARCHIVED,
    "SlowDown": _BUSY,
    "ServiceUnavailable": _BUSY,
    "InternalError": _BUSY,
    "RequestTimeout": _BUSY,
    "Throttling": _BUSY,
    "TooManyRequests": _BUSY,
}
STATUSES: dict[int, Meaning] = {
    301: _ELSEWHERE,
    307: _ELSEWHERE,
    401: _KEY_WRONG,
    403: _DENIED,
    404: _NOT_THERE,
    408: _BUSY,
    409: _CHANGED,
    412: _CHANGED,
    416: CODES["InvalidRange"],
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
_STRANGE = Meaning(Unsupported, "the server does not speak S3", "look at the endpoint: host, port, http or https")

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
    "RecursionError": _ELSEWHERE,  # botocore follows a redirect that leads to itself until the stack ends
}
"""By class name along the method resolution order; BotoCoreErrors that are not here are taken for configuration."""


@contextmanager
def s3_errors(subject: str) -> Iterator[None]:
    """Raise our errors for botocore's; `subject` names the object or the bucket."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (ClientError, BotoCoreError, ResponseParserError, HTTPError, RecursionError) as error:
        raise from_s3_error(error, subject) from error


def from_s3_error(error: Exception, subject: str) -> SnapchainError:
    """The error of our tree for one of botocore's or urllib3's."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        meaning, words = _answer_means(response)
    else:
        names = [cls.__name__ for cls in type(error).__mro__]
        fallback = _CONFIGURATION if "BotoCoreError" in names else _BROKEN_OFF
        meaning = next((EXCEPTIONS[name] for name in names if name in EXCEPTIONS), fallback)
        words = " ".join(str(error).split())
    message = f"{meaning.message} ({words[:300]})" if words else meaning.message
    return meaning.error(message, subject=subject, hint=meaning.hint)


def status_of(error: Exception) -> int:
    """The HTTP status that a ClientError reports; 0 when nothing was answered."""
    response = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def was_retried(error: Exception) -> bool:
    """Whether botocore sent the request more than once, so that an earlier one may have had its effect."""
    response = getattr(error, "response", None) or {}
    return bool(response.get("ResponseMetadata", {}).get("RetryAttempts", 0))


def _answer_means(response: dict[str, dict[str, object]]) -> tuple[Meaning, str]:
    error, metadata = response.get("Error", {}), response.get("ResponseMetadata", {})
    code, status = str(error.get("Code", "")), int(str(metadata.get("HTTPStatusCode", 0)))
    meaning = CODES.get(code) or STATUSES.get(status)
    if meaning is None and code.startswith("KMS."):
        meaning = Meaning(Refused, "the server's key service refuses", "look at the bucket's KMS key and its policy")
    if meaning is None:
        meaning = _BUSY if status >= 500 else Meaning(Unsupported, "the server refuses the request")
    said = str(error.get("Message") or "")
    return meaning, ": ".join(part for part in (code if not code.isdigit() else f"HTTP {code}", said) if part)
