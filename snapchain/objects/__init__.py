"""Object storage behind one small protocol: a directory, an S3 bucket, or this process's memory.

`open_store` is the only place that knows the kinds; everything above speaks ObjectStore.
"""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from snapchain.errors import InvalidInput
from snapchain.objects.store import (
    Data,
    ObjectInfo,
    ObjectStore,
    Properties,
    Refused,
    directory_prefix,
    valid_name,
    valid_prefix,
)

__all__ = [
    "Data",
    "ObjectInfo",
    "ObjectStore",
    "Properties",
    "Refused",
    "directory_prefix",
    "open_store",
    "valid_name",
    "valid_prefix",
]


def open_store(url: str, *, make: bool = False, endpoint: str | None = None) -> ObjectStore:
    """The store at `/path`, `file:///path`, `s3://bucket/prefix`, `memory:` or `memory:NAME`.

    make: create a directory that is not there (a bucket never is created)
    endpoint: of S3, e.g. `https://minio.example:9000`; otherwise as boto3 finds it (AWS_ENDPOINT_URL_S3, ~/.aws/config)

    The scheme may be in capitals. Bucket and prefix are taken as they are written, as other tools for S3 do: `%20` is
    three characters. Nothing is sent to S3 yet.
    Raises InvalidInput for other URLs, NotFound for a directory that is not there.
    """
    scheme, colon, rest = url.partition(":")
    scheme = scheme.lower() if colon else ""
    if endpoint is not None and scheme != "s3":
        raise InvalidInput("only s3:// has an endpoint", subject=url)
    if url.startswith("/"):
        return _local(url, make=make)
    if scheme == "memory":
        from snapchain.objects.memory import shared_store

        return shared_store(rest)
    if scheme == "s3" and rest.startswith("//"):
        from snapchain.objects.s3 import S3Store

        bucket, prefix = _bucket_and_prefix(rest[2:], url)
        return S3Store(bucket, prefix, endpoint=endpoint)
    if scheme == "file" and rest.startswith("//"):
        parts = urlsplit(url)
        if parts.query or parts.fragment:
            raise InvalidInput("a destination has no '?' or '#'", subject=url)
        if parts.netloc in {"", "localhost"} and parts.path.startswith("/"):
            return _local(unquote(parts.path), make=make)
    raise InvalidInput(
        "not a place for objects", subject=repr(url), hint="give /path, file:///path or s3://bucket/prefix"
    )


def _bucket_and_prefix(text: str, url: str) -> tuple[str, str]:
    """Bucket and prefix of `bucket/prefix`. Raises InvalidInput for a prefix that clients of S3 would change."""
    bucket, _, prefix = text.partition("/")
    prefix = prefix.strip("/")
    if any(mark in text for mark in "?#"):
        raise InvalidInput("a destination has no '?' or '#'", subject=url)
    if not text.isprintable():
        raise InvalidInput("a destination has no control characters", subject=repr(url))
    if {".", ".."} & set(prefix.split("/")):
        raise InvalidInput("a prefix cannot have '.' or '..' as a segment: S3 clients drop them", subject=url)
    return bucket, prefix


def _local(path: str, *, make: bool) -> ObjectStore:
    from snapchain.objects.local import LocalStore

    return LocalStore(path, make=make)
