"""Object storage behind one small protocol: a directory, an S3 bucket, or this process's memory.

`open_store` is the only place that knows the kinds; everything above speaks ObjectStore.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
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


def open_store(url: str, *, make: bool = False, endpoint: str | None = None, profile: str | None = None) -> ObjectStore:
    """The store at `/path`, `file:///path`, `s3://bucket/prefix`, `memory:` or `memory:NAME`.

    make: create a directory that is not there (a bucket is never created)
    endpoint: of S3, e.g. `https://minio.example:9000`; otherwise as boto3 finds it (AWS_ENDPOINT_URL_S3, ~/.aws/config)
    profile: of ~/.aws, with the credentials for S3 and perhaps the endpoint

    The scheme may be in capitals. Bucket and prefix are taken as they are written, as other tools for S3 do: `%20` is
    three characters. Nothing is sent to S3 yet.
    Raises InvalidInput for other URLs, NotFound for a directory that is not there.
    """
    scheme, colon, rest = url.partition(":")
    scheme = scheme.lower() if colon else ""
    if endpoint is not None and scheme != "s3":
        raise InvalidInput("only s3:// has an endpoint", subject=url)
    if profile is not None and scheme != "s3":
        raise InvalidInput("only s3:// has a profile", subject=url)
    if url.startswith("/"):
        return _directory(url, make=make)
    opener = SCHEMES.get(scheme)
    if opener is None:
        raise _no_place(url)
    return opener(_Wanted(url, rest, make, endpoint, profile))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The arguments of `open_store`. rest: what follows the colon of the URL's scheme."""

    url: str
    rest: str
    make: bool
    endpoint: str | None
    profile: str | None


def _no_place(url: str) -> InvalidInput:
    return InvalidInput(
        "not the address of a destination",
        subject=repr(url),
        hint="a repository is at /path, file:///path or s3://bucket/prefix; a replica at ssh://host/path or dir:/path",
    )


def _directory(path: str, *, make: bool) -> ObjectStore:
    from snapchain.objects.local import LocalStore

    return LocalStore(path, make=make)


def _file(wanted: _Wanted) -> ObjectStore:
    url, parts = wanted.url, urlsplit(wanted.url)
    if not wanted.rest.startswith("//"):
        raise _no_place(url)
    if parts.query or parts.fragment:
        raise InvalidInput("a destination has no '?' or '#'", subject=url)
    if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/"):
        raise _no_place(url)
    return _directory(unquote(parts.path), make=wanted.make)


def _memory(wanted: _Wanted) -> ObjectStore:
    from snapchain.objects.memory import shared_store

    return shared_store(wanted.rest)


def _s3(wanted: _Wanted) -> ObjectStore:
    """A bucket and a prefix. Raises InvalidInput for a prefix that clients of S3 would change."""
    from snapchain.objects.s3 import S3Store
    from snapchain.objects.s3_settings import settings_of

    url, text = wanted.url, wanted.rest[2:]
    if not wanted.rest.startswith("//"):
        raise _no_place(url)
    bucket, _, prefix = text.partition("/")
    prefix = prefix.strip("/")
    if any(mark in text for mark in "?#"):
        raise InvalidInput("a destination has no '?' or '#'", subject=url)
    if not text.isprintable():
        raise InvalidInput("a destination has no control characters", subject=repr(url))
    if {".", ".."} & set(prefix.split("/")):
        raise InvalidInput("a prefix cannot have '.' or '..' as a segment: S3 clients drop them", subject=url)
    settings = settings_of(os.environ)
    return S3Store(bucket, prefix, endpoint=wanted.endpoint, profile=wanted.profile, settings=settings)


SCHEMES: dict[str, Callable[[_Wanted], ObjectStore]] = {"file": _file, "memory": _memory, "s3": _s3}
"""URL scheme -> what opens it. A new kind of store is a module and a line here."""
