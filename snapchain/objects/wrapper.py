"""A store around a store, which changes nothing: retry, throttle and faults override what they are about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from snapchain.objects.store import Data, ObjectInfo, ObjectStore, Properties


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


def innermost(store: ObjectStore) -> ObjectStore:
    """The store at the bottom of all wrappers."""
    while isinstance(store, StoreWrapper):
        store = store.inner
    return store
