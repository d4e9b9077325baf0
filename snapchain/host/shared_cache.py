"""A directory of small blobs that processes share: what one has fetched, the others need not fetch again.

    DIR/snapchain-blobs/NAME      the bytes of one blob, mode 0600
    DIR/snapchain-blobs/total     bytes of all blobs, or more; 8 bytes, changed under a lock on the directory
    DIR/snapchain-blobs/claims    empty; the byte that a name hashes to is locked by the process that fetches it

Nothing in it is trusted: who takes a blob proves it, and drops one that is unsound.  So it may be killed, filled up,
altered or removed at any moment.  Files are not synced.  A process counts a blob before it writes it; what was counted
and not written is found out when the directory is full, by a look at all files, and the least recently used ones go.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Self

from snapchain.errors import SnapchainError, Unavailable
from snapchain.host.private import PrivateDirectory

FOLDER = "snapchain-blobs"
_TOTAL, _CLAIMS = "total", "claims"
_COUNT = struct.Struct("<Q")
_LOCK = struct.Struct("hhqqi4x")
"""struct flock: type, whence, start, length, pid, which is 0 for locks of an open file."""
_STAYS = 7 / 8
_USED_AGAIN = 60.0
"""Seconds: a blob that was used this long ago is marked as used when it is taken."""
_AFTER_FAILURE = 60.0
"""Seconds for which nothing is kept after a write has failed: the disk is full."""
_PATIENCE, _PAUSE = 3.0, 0.01
"""Seconds that a process waits for another one that fetches the same blob: its store may hang."""
_LEFT_OVER = 600.0


class SharedCache:
    """A context manager. Thread-safe. Nothing but opening it raises.

    limit: bytes of all blobs together; another process may have a few on their way beside them
    """

    def __init__(self, path: Path, limit: int) -> None:
        """Open it, and make it where it is missing.

        Raises InvalidInput where another user may change it, and as making a file.
        """
        self.limit = limit
        self._directory = PrivateDirectory(path / FOLDER, make=True)
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._users, self._closed = 0, False
        self._keeps_from = 0.0
        try:
            self._total = self._directory.open_beside(_TOTAL)
            self._claims = self._directory.open_beside(_CLAIMS)
        except BaseException:
            self._directory.__exit__(None, None, None)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._users)
        os.close(self._total)
        os.close(self._claims)
        self._directory.__exit__(kind, error, trace)

    @contextmanager
    def _used(self) -> Iterator[None]:
        """A block that uses the descriptors: a thread whose store hangs may come back after the end."""
        with self._changed:
            if self._closed:
                raise Unavailable("the cache is closed")
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def take(self, name: str, *, size: int) -> bytes | None:
        """The bytes that are kept under a name, if there are that many; not proven."""
        with suppress(SnapchainError), self._used():
            data = self._directory.read(name, cap=size)
            if time.time() - self._directory.status(name).st_mtime > _USED_AGAIN:
                self._directory.mark_used(name)
            return data if len(data) == size else None
        return None

    def keep(self, name: str, data: bytes | memoryview) -> None:
        """Keep the bytes under a name; make room for them first. Where that cannot be done, they are not kept."""
        if len(data) > self.limit or time.monotonic() < self._keeps_from:
            return
        try:
            with self._used():
                with self._lock, self._directory.locked():
                    total = self._counted() + len(data)
                    if total > self.limit:
                        total = self._evict(max(0, int(self.limit * _STAYS) - len(data))) + len(data)
                    os.pwrite(self._total, _COUNT.pack(total), 0)
                self._directory.write_unsynced(name, data)
        except (SnapchainError, OSError):
            self._keeps_from = time.monotonic() + _AFTER_FAILURE

    def drop(self, name: str) -> None:
        """Remove what is kept under a name: it was not sound."""
        with suppress(SnapchainError), self._used():
            self._directory.remove(name)

    @contextmanager
    def claimed(self, names: Collection[str]) -> Iterator[set[str]]:
        """A block that fetches those of the names that no other process is fetching now: these."""
        ours = {name for name in names if self._locks(name, fcntl.F_WRLCK)}
        try:
            yield ours
        finally:
            for name in ours:
                self._locks(name, fcntl.F_UNLCK)

    def wait(self, name: str) -> None:
        """Until no other process is fetching it, or for some seconds."""
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            with self.claimed([name]) as ours:
                if ours:
                    return
            time.sleep(_PAUSE)

    def _locks(self, name: str, kind: int) -> bool:
        place = int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "big")
        with suppress(SnapchainError, OSError), self._used():  # without locks whoever wants it fetches it
            try:
                fcntl.fcntl(self._claims, fcntl.F_OFD_SETLK, _LOCK.pack(kind, os.SEEK_SET, place, 1, 0))
            except (BlockingIOError, PermissionError):
                return False
        return True

    def _counted(self) -> int:
        data = os.pread(self._total, _COUNT.size, 0)
        return int(_COUNT.unpack(data)[0]) if len(data) == _COUNT.size else 0

    def _evict(self, most: int) -> int:
        """Remove the least recently used blobs, and what killed processes have left; the bytes that stay."""
        now = time.time()
        found = []
        for name in self._directory.names():
            if name in (_TOTAL, _CLAIMS):
                continue
            with suppress(SnapchainError):
                status = self._directory.status(name)
                if name.startswith(".") and now - status.st_mtime > _LEFT_OVER:
                    self._directory.remove(name)
                    continue
                found.append((status.st_mtime, status.st_size, name))
        total = sum(size for _, size, _ in found)
        for _, size, name in sorted(found):
            if total <= most:
                break
            self._directory.remove(name)
            total -= size
        return total
