"""Keeps small immutable objects of a remote store on this machine.

Every ship needs the whole index, which grows with the repository; with a cache it fetches what is new.  Objects are
kept as they are stored (sealed), each behind its own hash, so a damaged cache is a slow one and never a wrong one.
The hash is no proof against people: a directory in which others could put files is not used, nor is a file of theirs.
A cache that cannot be written is no error: the store is asked instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from snapchain.errors import SnapchainError
from snapchain.host.private import PrivateDirectory
from snapchain.objects.store import ObjectInfo, ObjectStore, StoreWrapper, largest

_HASH = 32


class CachedStore(StoreWrapper):
    """A store whose objects under `prefix` (such as `index/`) are read from `directory` where they are there.

    Names under the prefix must never be used twice for different bytes.
    """

    def __init__(self, inner: ObjectStore, directory: Path, *, prefix: str) -> None:
        super().__init__(inner)
        self._directory = directory
        self._prefix = prefix

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if not name.startswith(self._prefix) or offset or length is not None:
            return self.inner.get(name, offset=offset, length=length)
        kept = self._kept(name)
        if kept is not None:
            return kept
        data = self.inner.get(name)
        with suppress(SnapchainError, OSError), PrivateDirectory(self._directory, make=True) as directory:
            directory.write(self._file(name), _digest(data) + data)
        return data

    def _kept(self, name: str) -> bytes | None:
        with suppress(SnapchainError, OSError), PrivateDirectory(self._directory) as directory:
            kept = directory.read(self._file(name), cap=largest(name) + _HASH)
            if _digest(memoryview(kept)[_HASH:]) == kept[:_HASH]:
                return kept[_HASH:]
        return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """A complete listing of the prefix also forgets what the store no longer has."""
        if prefix != self._prefix:
            yield from self.inner.list(prefix)
            return
        there = set[str]()
        for info in self.inner.list(prefix):
            there.add(self._file(info.name))
            yield info
        with suppress(SnapchainError, OSError), PrivateDirectory(self._directory) as directory:
            for name in directory.names():
                if name not in there:
                    directory.remove(name)

    def _file(self, name: str) -> str:
        return name.removeprefix(self._prefix).replace("/", "_")


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()
