"""Directories and small files of this user alone, whatever the umask: 0700 and 0600, never through a planted link.

What a program remembers steers what it trusts later.  So a directory in which somebody else could put files is not
used, nor is a file that belongs to somebody else.  Nor does root use, or make, what another user could replace, as
where HOME is still that user's: they would choose where root writes.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from snapchain.errors import InvalidInput
from snapchain.host.directory import Directory
from snapchain.host.os_errors import os_errors

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS_MAY_WRITE = 0o022
_OWN_PLACES = "set HOME, XDG_STATE_HOME and XDG_CACHE_HOME to directories of your own"


def make_private(path: Path) -> None:
    """Like `mkdir -p`, but each directory that is made is 0700.

    Raises InvalidInput where root would make it in a directory of somebody else; OSError as it comes.
    """
    if path.is_dir():
        return
    make_private(path.parent)
    with Directory.open(path.parent) as above, suppress(FileExistsError):
        check_not_of_others(above, path)
        above.make_directory(path.name, mode=DIRECTORY_MODE)
        _give_mode(above, path.name)


def _give_mode(above: Directory, name: str) -> None:
    """A umask may have taken rights of ours away."""
    fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above.fd)
    try:
        if os.fstat(fd).st_uid == os.geteuid():
            os.chmod(f"/proc/self/fd/{fd}", DIRECTORY_MODE)  # noqa: PTH101 - of the descriptor, which cannot be changed
    finally:
        os.close(fd)


def check_not_of_others(above: Directory, path: Path) -> None:
    """Raises InvalidInput where somebody else could change what root comes to by a path. above: its directory."""
    if above.rights is not None:
        raise InvalidInput(f"{above.rights} can replace this directory", subject=path, hint=_OWN_PLACES)


class PrivateDirectory:
    """A context manager: one directory, held by a descriptor, below which names are used: its path may be swapped.

    Methods raise the errors of `os_errors`.
    """

    def __init__(self, path: Path, *, make: bool = False) -> None:
        """Raises InvalidInput for a link, and for a directory of somebody else, or one that root does not use because
        somebody else can replace it. One of ours is closed to others.
        """
        self.path = path
        with os_errors(path):
            if make:
                make_private(path)
            with Directory.open(path.parent) as above:
                check_not_of_others(above, path)
                self._fd = os.open(path.name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=above.fd)
        try:
            with os_errors(path):
                self._close_to_others()
        except BaseException:
            os.close(self._fd)
            raise

    def _close_to_others(self) -> None:
        found = os.fstat(self._fd)
        if found.st_uid != os.geteuid():
            raise InvalidInput(
                f"the directory belongs to another user, number {found.st_uid}",
                subject=self.path,
                hint=_OWN_PLACES,
            )
        if found.st_mode & _OTHERS_MAY_WRITE:
            os.fchmod(self._fd, DIRECTORY_MODE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def names(self) -> list[str]:
        """What is in it."""
        with os_errors(self.path):
            return os.listdir(self._fd)  # noqa: PTH208 - of a descriptor

    def read(self, name: str, *, cap: int) -> bytes | None:
        """The bytes of a small file, None when there is none.

        Raises InvalidInput for more than `cap` bytes, and for what is no regular file of this user.
        """
        path = self.path / name
        with os_errors(path):
            try:
                fd = os.open(name, _READ, dir_fd=self._fd)
            except FileNotFoundError:
                return None
            with os.fdopen(fd, "rb") as file:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                    raise InvalidInput("not a regular file of this user", subject=path)
                data = file.read(cap + 1)
        if len(data) > cap:
            raise InvalidInput(f"larger than the {cap} bytes that it may have", subject=path)
        return data

    def write(self, name: str, data: bytes) -> None:
        """Replace a small file: a reader, or a crash, sees the old bytes or the new ones."""
        temporary = f".{name[:200]}.new-{secrets.token_hex(4)}"
        with os_errors(self.path / name):
            fd = os.open(temporary, _WRITE_NEW, FILE_MODE, dir_fd=self._fd)
            try:
                with os.fdopen(fd, "wb") as file:
                    os.fchmod(fd, FILE_MODE)
                    file.write(data)
                    file.flush()
                    os.fsync(fd)
                os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=self._fd)
                raise
            os.fsync(self._fd)

    def remove(self, name: str) -> None:
        """Idempotent."""
        with os_errors(self.path / name), suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone with the directory, among all that come through here; not where the filesystem has no such locks."""
        fd = os.open(".", _DIRECTORY, dir_fd=self._fd)
        try:
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)
