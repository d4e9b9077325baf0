"""A store that remembers what it was asked, and how many bytes went each way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from snapchain.objects.store import Data, ObjectInfo, ObjectStore, StoreWrapper, joined


@dataclass(frozen=True)
class Asked:
    """One call. size: bytes of the object part that went over the wire."""

    operation: str
    name: str
    size: int = 0


class CountingStore(StoreWrapper):
    """Thread-safe."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.asked: list[Asked] = []
        self._lock = threading.Lock()

    def of(self, operation: str, prefix: str = "") -> list[Asked]:
        """The calls of one operation on names with this prefix."""
        return [each for each in self.asked if each.operation == operation and each.name.startswith(prefix)]

    def bytes_of(self, operation: str, prefix: str = "") -> int:
        return sum(each.size for each in self.of(operation, prefix))

    def put(self, name: str, data: Data) -> None:
        self._note("put", name, len(joined(data)))
        super().put(name, data)

    def create(self, name: str, data: Data) -> bool:
        self._note("create", name, len(joined(data)))
        return super().create(name, data)

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        body = super().get(name, offset=offset, length=length)
        self._note("get", name, len(body))
        return body

    def size(self, name: str) -> int | None:
        self._note("size", name)
        return super().size(name)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._note("list", prefix)
        return super().list(prefix)

    def list_dirs(self, prefix: str) -> Iterator[str]:
        self._note("list_dirs", prefix)
        return super().list_dirs(prefix)

    def delete(self, name: str) -> None:
        self._note("delete", name)
        super().delete(name)

    def _note(self, operation: str, name: str, size: int = 0) -> None:
        with self._lock:
            self.asked.append(Asked(operation, name, size))
