"""Keeps small immutable objects of a remote store on this machine.

Every ship needs the whole index, which grows with the repository; with a cache it fetches what is new.  Objects are
kept as they are stored (sealed), each behind its own hash, so a damaged cache is a slow one and never a wrong one.
A cache that cannot be written is no error: the store is asked instead.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from snapchain.errors import SnapchainError
from snapchain.host.files import read_small, write_atomically
from snapchain.host.places import make_directory
from snapchain.objects.store import ObjectInfo, ObjectStore
from snapchain.objects.wrapper import StoreWrapper

_HASH = 32
LARGEST = 256 * 1024 * 1024


class CachedStore(StoreWrapper):
    """A store whose objects under `prefix` (such as `index/`) are read from `directory` where they are there.

    Names under the prefix must never be used twice for different bytes.
    """

    def __init__(self, inner: ObjectStore, directory: Path, *, prefix: str) -> None:
        super().__init__(inner)
        self._directory = directory
        self._prefix = prefix
        with suppress(OSError):
            make_directory(directory)

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if not name.startswith(self._prefix) or offset or length is not None:
            return self.inner.get(name, offset=offset, length=length)
        path = self._path(name)
        with suppress(SnapchainError):
            kept = read_small(path, cap=LARGEST)
            if _digest(kept[_HASH:]) == kept[:_HASH]:
                return kept[_HASH:]
        data = self.inner.get(name)
        with suppress(SnapchainError, OSError):
            write_atomically(path, _digest(data) + data)
        return data

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """A complete listing of the prefix also forgets what the store no longer has."""
        if prefix != self._prefix:
            yield from self.inner.list(prefix)
            return
        there = set[str]()
        for info in self.inner.list(prefix):
            there.add(self._path(info.name).name)
            yield info
        with suppress(OSError):
            for entry in os.scandir(self._directory):
                if entry.name not in there:
                    Path(entry.path).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._directory / name.removeprefix(self._prefix).replace("/", "_")


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
