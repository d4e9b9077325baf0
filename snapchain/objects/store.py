"""The one small protocol behind which all object storage lies.

An object is a name and bytes, written whole or not at all; there is no append and no rename.  A name is a path
of lower-case segments, so that every store (a directory, S3, memory) can hold every object of every other.
`create` is the only arbiter between writers: where `properties.conditional_put` is true exactly one of many
concurrent creates of a name says True.  Everything else (throttle, cache, faults) wraps a store in a store.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeAlias, runtime_checkable

from snapchain.errors import Corrupt, InvalidInput, Unavailable, Unsupported

Buffer: TypeAlias = bytes | bytearray | memoryview
Data: TypeAlias = Buffer | Sequence[Buffer]

LONGEST_NAME = 512
"""Bytes.  S3 keys end at 1024, which leaves room for the prefix of the repository inside its bucket."""
LONGEST_SEGMENT = 200
"""Bytes.  File names end at 255 (NAME_MAX), or 143 under eCryptfs, which is not worth refusing the rest for."""
TEMPORARY = "tmp"
"""First segment that no object may have: the local store keeps unfinished files there."""

_SEGMENT = r"[a-z0-9_-][a-z0-9._-]*"
_ONE = re.compile(_SEGMENT, re.ASCII)
_NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*", re.ASCII)
_PREFIX = re.compile(rf"(?:{_SEGMENT}/)*(?:{_SEGMENT})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One line of a listing.

    name: full object name; size: bytes
    modified: seconds since 1970 by the *store's* clock. Every store must give it, since leases expire by it. An S3
        server that sends no time gives None: a lease that was left behind there does not expire by age.
    """

    name: str
    size: int
    modified: float | None = None


@dataclass(frozen=True, slots=True)
class Properties:
    """What a store was found to keep to.

    conditional_put: `create` is atomic; None until somebody looked (probe.probe), which callers must treat as False
    description: for people, e.g. `directory /backup`
    is_remote: reached over a network, so that what is read from it is worth a cache on this machine
    stale_through: the network file system by which another machine's changes are seen late, None where they are not
    """

    conditional_put: bool | None
    description: str
    is_remote: bool = False
    stale_through: str | None = None


class Refused(Unavailable):
    """The store answered, and said no: permission, space, credentials.  Useless to retry until somebody acts."""


class Archived(Refused):
    """The object is whole, and in a tier from which it has to be restored before it can be read: never damage."""


class NoConditions(Unsupported):
    """The store answered that it does no conditional writes; nothing was written."""


class ObjectStore(Protocol):
    """Object storage.  All methods may be called from many threads at once.

    Names and directories share one space, as in a file system: once `a/b` was written, `a` is a directory for good.
    (S3 alone would allow both; nothing may rely on it.)

    Errors: NotFound (`get`; anything, when the bucket or root directory is gone), Corrupt (`get` of a range that the
    object does not have, or bytes that did not survive the way), Unavailable (server, disk, network; its subclass
    Refused when retrying is no use; `hint` says what is), Unsupported, InvalidInput (names, ranges).
    """

    properties: Properties

    @property
    def url(self) -> str:
        """Where it is, as `open_store` takes it; holds no secret."""
        ...

    @property
    def warnings(self) -> Sequence[str]:
        """What the operator should be told about this store, e.g. that it is reached without TLS."""
        ...

    def put(self, name: str, data: Data) -> None:
        """Create or replace.  Whole or not there at any moment; durable on return."""
        ...

    def create(self, name: str, data: Data) -> bool:
        """Like `put` when `name` does not exist; False, with nothing changed, when it does.

        Atomic only where `properties.conditional_put` is true; see exclusive.create_exclusively for the others.
        """
        ...

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes [offset, offset+length), or to the end.  Never fewer: a shorter object is Corrupt.

        So is one that is larger than its kind may be (see LARGEST), of which no more than that is read.
        """
        ...

    def size(self, name: str) -> int | None:
        """Bytes of the object, None when there is none."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose name starts with `prefix` (a string prefix, as in S3), ascending by name.

        Objects that come or go meanwhile may or may not be listed.  A store that is not there yet is empty.
        """
        ...

    def list_dirs(self, prefix: str) -> Iterator[str]:
        """The next segments under directory `prefix` that have objects below them, ascending, without slashes.

        `list_dirs("disks/")` gives `a` for `disks/a/1`.  The last slash of the prefix may be left out.
        """
        ...

    def delete(self, name: str) -> None:
        """Make it not exist.  Idempotent."""
        ...

    def close(self) -> None:
        """Give back connections and descriptors.  Idempotent; the store is not used afterwards."""
        ...


@runtime_checkable
class Placed(Protocol):
    """A store whose address can be spelled in several ways. place: the one spelling by which it is known again."""

    place: str


def valid_name(name: str) -> str:
    """`name`, when it may name an object.

    Raises InvalidInput: not `[a-z0-9._-]+` segments joined by single slashes, a segment that begins with a dot, too
    long, or under `tmp/`.  Upper case is out because two names may then be one on a case-folding file system; a dot
    in front because `..` climbs, and because `.nfs0012`, `.ds_store` and the like are not ours.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            "not an object name: segments of [a-z0-9._-], none of which begins with a dot, joined by '/'",
            subject=repr(name),
        )
    _check_lengths(name)
    return name


def valid_prefix(prefix: str) -> str:
    """`prefix`, when it may be the beginning of an object name (or empty).  Raises InvalidInput."""
    if not _PREFIX.fullmatch(prefix):
        raise InvalidInput("not the beginning of an object name", subject=repr(prefix))
    _check_lengths(prefix)
    return prefix


def directory_prefix(prefix: str) -> str:
    """`prefix` as a directory: empty, or with exactly one slash at its end.  Raises InvalidInput."""
    return valid_prefix(prefix if not prefix or prefix.endswith("/") else f"{prefix}/")


def _check_lengths(name: str) -> None:
    segments = name.split("/")
    if segments[0] == TEMPORARY and len(segments) > 1:
        raise InvalidInput(f"the names under {TEMPORARY}/ are not for objects", subject=repr(name))
    if len(name) > LONGEST_NAME or max(map(len, segments)) > LONGEST_SEGMENT:
        raise InvalidInput(
            f"an object name is at most {LONGEST_NAME} bytes, {LONGEST_SEGMENT} a segment", subject=repr(name)
        )


def is_segment(text: str) -> bool:
    """Whether `text` may stand between two slashes of an object name."""
    return _ONE.fullmatch(text) is not None


def valid_range(name: str, offset: int, length: int | None) -> None:
    """Raises InvalidInput for a negative offset or length."""
    if offset < 0 or (length is not None and length < 0):
        raise InvalidInput(f"not a byte range: offset {offset}, length {length}", subject=name)


def buffers(data: Data) -> list[memoryview]:
    """`data` as flat byte views, none of them empty, without copying.  Raises InvalidInput for other types."""
    parts: Iterable[Buffer] = (data,) if isinstance(data, bytes | bytearray | memoryview) else data
    try:
        views = [memoryview(part).cast("B") for part in parts]
    except TypeError as error:
        raise InvalidInput(f"an object's data are bytes-like buffers: {error}") from error
    return [view for view in views if view.nbytes]


def joined(data: Data) -> bytes:
    """`data` as one bytes object; copies unless it is one already."""
    if isinstance(data, bytes):
        return data
    return b"".join(buffers(data))


# --- How large an object may be, by its kind: the one place where that is decided.
#
# Every store applies it to every read, counts while it reads, and never trusts a size that it was told.  Writers keep
# to it as well, so nothing is stored that could not be read again: see repository/envelope.py, which also bounds what a
# record unpacks to.

_KIB, _MIB = 1 << 10, 1 << 20

LARGEST_OBJECT = 257 * _MIB
"""Bytes. Of an object of no kind that is listed here."""
LARGEST: dict[str, int] = {
    "config": 64 * _KIB,
    "keys": 64 * _KIB,
    "slots": 16 * _MIB,
    "witness": 4 * _KIB,
    "leases": 16 * _MIB,
    "disks": 16 * _MIB,
    "index": 65 * _MIB,
    "layers": 64 * _MIB,
    "packs": 132 * _MIB,
    "verified": 16 * _MIB,
}
"""First segment of a name -> bytes. A pack has at most 128 MiB, or one blob of 4 MiB that found no room in another."""
MOST_LISTED: dict[str, int] = {
    "keys": 10_000,
    "slots": 100_000,
    "leases": 100_000,
    "disks": 1_000_000,
    "index": 100_000,
    "verified": 100_000,
}
"""First segment of a prefix -> names that a listing of it may have."""
LONGEST_LISTING = 2_000_000
"""Names that any other listing may have: it is held in memory. Packs of 16 MiB would be 30 TiB, of 128 MiB 240 TiB."""
LARGEST_LISTED_SIZE = 1 << 53
"""Bytes. A larger object cannot be, on any store."""


def largest(name: str) -> int:
    """Bytes that an object of this name may have."""
    return LARGEST.get(name.partition("/")[0], LARGEST_OBJECT)


def most_listed(prefix: str) -> int:
    """Names that the listing of a prefix may have."""
    return MOST_LISTED.get(prefix.partition("/")[0], LONGEST_LISTING)


def check_size(name: str, size: int, *, subject: str) -> int:
    """`size`, when so many bytes of this object may be held in memory. Raises Corrupt."""
    if size > largest(name):
        raise Corrupt(f"it has {size} bytes; at most {largest(name)} are plausible", subject=subject)
    return size


# --- A store around a store, which changes nothing: throttle, cache and faults override what they are about.


class StoreWrapper:
    """An ObjectStore that hands every call to `inner`."""

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def warnings(self) -> Sequence[str]:
        return self.inner.warnings

    @property
    def properties(self) -> Properties:
        return self.inner.properties

    @properties.setter
    def properties(self, properties: Properties) -> None:
        self.inner.properties = properties

    def put(self, name: str, data: Data) -> None:
        self.inner.put(name, data)

    def create(self, name: str, data: Data) -> bool:
        return self.inner.create(name, data)

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        return self.inner.get(name, offset=offset, length=length)

    def size(self, name: str) -> int | None:
        return self.inner.size(name)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self.inner.list(prefix)

    def list_dirs(self, prefix: str) -> Iterator[str]:
        return self.inner.list_dirs(prefix)

    def delete(self, name: str) -> None:
        self.inner.delete(name)

    def close(self) -> None:
        self.inner.close()


@runtime_checkable
class Settles(Protocol):
    """A store in which an object may be there and not yet durable."""

    def settle(self, name: str) -> None:
        """Make an object durable whose writer may have died before it did. No error when it is gone."""


def settle(store: ObjectStore, name: str) -> None:
    """Make sure that an object that somebody else wrote is durable."""
    bottom = innermost(store)
    if isinstance(bottom, Settles):
        bottom.settle(name)


@runtime_checkable
class Locks(Protocol):
    """A store that can keep objects from being deleted until a time."""

    def locked_until(self, name: str) -> datetime | None:
        """Until when the object cannot be deleted, in UTC; None when it can, or is not there.

        `datetime.max` where somebody has to release it first.
        """
        ...


def innermost(store: ObjectStore) -> ObjectStore:
    """The store at the bottom of all wrappers."""
    while isinstance(store, StoreWrapper):
        store = store.inner
    return store
