"""A new file that appears under its name only when it is whole.

It grows as `.NAME.snapchain-part` beside its place, locked, so that a second run waits for nobody's leftovers:
what a killed run left behind is overwritten by the next one.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from snapchain.errors import Busy, Conflict
from snapchain.host.files import fsync_dir
from snapchain.host.os_errors import os_errors


class OutputFile:
    """A context manager; without `publish` the file is gone on leaving."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.snapchain-part")
        self.fd = -1

    @property
    def growing(self) -> Path:
        """Its name until it is published."""
        return self._temporary

    def __enter__(self) -> Self:
        with os_errors(self._temporary):
            while not self._took():
                # Another run gave the file its final name, or removed it, between our open and our lock: what we
                # have locked is no longer ours to overwrite.
                os.close(self.fd)
                self.fd = -1
        return self

    def _took(self) -> bool:
        """Open, lock and empty the file of the temporary name; False when that is another file by now."""
        self.fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_named():
                return False
            os.ftruncate(self.fd, 0)
        except BlockingIOError as error:
            os.close(self.fd)
            self.fd = -1
            raise Busy("another snapchain is writing it", subject=self.path, hint="wait for it") from error
        except OSError:
            os.close(self.fd)
            self.fd = -1
            raise
        return True

    def _is_named(self) -> bool:
        mine = os.fstat(self.fd)
        try:
            named = self._temporary.lstat()
        except FileNotFoundError:
            return False
        return (mine.st_dev, mine.st_ino) == (named.st_dev, named.st_ino)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.fd >= 0:
            with suppress(FileNotFoundError):
                self._temporary.unlink()
            os.close(self.fd)
            self.fd = -1

    def publish(self, *, replace: bool) -> None:
        """Give the finished, synced file its name. Raises Conflict when that is taken and `replace` is not given."""
        with os_errors(self.path):
            if replace:
                self._temporary.replace(self.path)
            else:
                try:
                    os.link(self._temporary, self.path)
                except FileExistsError as error:
                    raise exists(self.path) from error
                self._temporary.unlink()
        fsync_dir(self.path.parent)
        os.close(self.fd)
        self.fd = -1


def exists(path: Path) -> Conflict:
    """The error for an output that is there already."""
    return Conflict("it exists already", subject=path, hint="choose another name, or say --force to replace it")
