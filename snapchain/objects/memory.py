"""Objects in a dictionary: the reference that says what every other store must do.

It has a lock around each call, so `create` is atomic, and a clock for `modified` that tests may replace.
`memory:` is a new store each time, `memory:NAME` the same store all over this process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from snapchain.errors import Corrupt, InvalidInput, NotFound
from snapchain.objects.store import (
    Data,
    ObjectInfo,
    Properties,
    check_size,
    directory_prefix,
    joined,
    valid_name,
    valid_prefix,
    valid_range,
)

_shared: dict[str, MemoryStore] = {}
_sharing = threading.Lock()


class MemoryStore:
    """An ObjectStore that ends with the process."""

    def __init__(self, label: str = "", *, clock: Callable[[], float] = time.time) -> None:
        self.url = f"memory:{label}"
        self.properties = Properties(conditional_put=True, description="this process's memory")
        self.warnings: tuple[str, ...] = ()
        self._clock = clock
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, float]] = {}
        self._folders: set[str] = set()

    def put(self, name: str, data: Data) -> None:
        valid_name(name)
        body = joined(data)
        with self._lock:
            self._store(name, body)

    def create(self, name: str, data: Data) -> bool:
        valid_name(name)
        body = joined(data)
        with self._lock:
            if name in self._objects:
                return False
            self._store(name, body)
            return True

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        valid_name(name)
        valid_range(name, offset, length)
        with self._lock:
            entry = self._objects.get(name)
        if entry is None:
            raise NotFound("no such object", subject=f"{self.url}/{name}")
        body = entry[0]
        stop = len(body) if length is None else offset + length
        check_size(name, stop - offset, subject=f"{self.url}/{name}")
        if offset > len(body) or stop > len(body):
            raise Corrupt(
                f"object has {len(body)} bytes, bytes {offset} to {stop} were asked for", subject=f"{self.url}/{name}"
            )
        return body[offset:stop]

    def size(self, name: str) -> int | None:
        valid_name(name)
        with self._lock:
            entry = self._objects.get(name)
        return None if entry is None else len(entry[0])

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        valid_prefix(prefix)
        with self._lock:
            found = [
                ObjectInfo(name, len(body), modified)
                for name, (body, modified) in self._objects.items()
                if name.startswith(prefix)
            ]
        return iter(sorted(found, key=lambda info: info.name))

    def list_dirs(self, prefix: str) -> Iterator[str]:
        folder = directory_prefix(prefix)
        below = (info.name[len(folder) :] for info in self.list(folder))
        return iter(sorted({rest.partition("/")[0] for rest in below if "/" in rest}))

    def delete(self, name: str) -> None:
        valid_name(name)
        with self._lock:
            self._objects.pop(name, None)

    def close(self) -> None:
        """Nothing to give back; a shared store keeps its objects."""

    def _store(self, name: str, body: bytes) -> None:
        """Like a file system, refuse an object where a directory is, and a directory where an object is."""
        parts = name.split("/")
        folders = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
        if name in self._folders:
            raise InvalidInput("a directory of that name is there", subject=f"{self.url}/{name}")
        if any(folder in self._objects for folder in folders):
            raise InvalidInput("an object stands where a directory is needed", subject=f"{self.url}/{name}")
        self._folders.update(folders)
        self._objects[name] = (body, self._clock())


def shared_store(label: str) -> MemoryStore:
    """The store of that label in this process; an empty label is a new store each time."""
    if not label:
        return MemoryStore()
    with _sharing:
        return _shared.setdefault(label, MemoryStore(label))
