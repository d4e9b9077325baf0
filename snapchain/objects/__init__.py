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

    Nothing is sent to S3 yet.  Raises InvalidInput for other URLs, NotFound for a directory that is not there.
    """
    scheme, colon, rest = url.partition(":")
    if endpoint is not None and scheme != "s3":
        raise InvalidInput("only s3:// has an endpoint", subject=url)
    if url.startswith("/"):
        return _local(url, make=make)
    if colon and scheme == "memory":
        from snapchain.objects.memory import shared_store

        return shared_store(rest)
    if colon and scheme in {"file", "s3"} and rest.startswith("//"):
        parts = urlsplit(url)
        if parts.query or parts.fragment:
            raise InvalidInput("a destination has no '?' or '#'", subject=url)
        if scheme == "s3":
            from snapchain.objects.s3 import S3Store

            return S3Store(parts.netloc, parts.path.strip("/"), endpoint=endpoint)
        if parts.netloc in {"", "localhost"} and parts.path.startswith("/"):
            return _local(unquote(parts.path), make=make)
    raise InvalidInput(
        "not a place for objects", subject=repr(url), hint="give /path, file:///path or s3://bucket/prefix"
    )


def _local(path: str, *, make: bool) -> ObjectStore:
    from snapchain.objects.local import LocalStore

    return LocalStore(path, make=make)
