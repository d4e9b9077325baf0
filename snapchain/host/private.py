"""Small private files of this user and their directories: modes 0600 and 0700, whatever the umask.

Stored state decides what a program trusts later.  So it counts only where no other user can have written it:

    PrivateDirectory    this user's state and cache: the directory belongs to this user, and is closed to others
    is_own, read_own    a file anywhere: it belongs to this user or root, and no other user can rename it

Both are built on directory.py: a root whose HOME belongs to another user trusts no file there.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from pydantic import BaseModel, ValidationError

from snapchain.errors import Busy, Corrupt, InvalidInput
from snapchain.host.directory import Directory
from snapchain.host.files import make_directories, read_in, write_in
from snapchain.host.os_errors import os_errors
from snapchain.host.path_resolution import resolve
from snapchain.host.rights import EVERYBODY, Rights
from snapchain.host.temporary_names import NEW, temporary_beside
from snapchain.host.writers import writer_of

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
_OTHERS_MAY_WRITE = 0o022
_OTHERS_MAY_USE = 0o077


def make_private(path: Path) -> None:
    """Like `mkdir -p`, but each new directory is 0700. An existing one keeps its mode."""
    make_directories(path, mode=DIRECTORY_MODE, whatever_the_umask=True)


def is_own(directory: Directory, status: os.stat_result) -> bool:
    """Whether a file belongs to this user or root, in a directory where no other user can rename it."""
    ours = (0, os.geteuid())
    if status.st_uid not in ours or status.st_mode & _OTHERS_MAY_WRITE or directory.rights_of_file(status) is not None:
        return False
    place = os.fstat(directory.fd)
    is_anybodys = place.st_mode & stat.S_IWOTH and not place.st_mode & stat.S_ISVTX
    return place.st_uid in ours and not is_anybodys


def read_own(path: Path, *, cap: int) -> bytes:
    """The bytes of a small file anywhere. cap: its largest size in bytes.

    Raises InvalidInput for a file that another user may have written and for a larger one, and as reading a file.
    """
    with os_errors(path), Directory.open(path.parent) as directory:
        return _read_own(directory, path.name, cap=cap)


class PrivateDirectory:
    """A context manager: one directory, pinned by a descriptor, so that swapping its path has no effect.

    Methods raise the errors of `os_errors`.
    """

    def __init__(self, path: Path, *, make: bool = False) -> None:
        """Open it, and close it to others. make: create it if missing.

        Raises InvalidInput for a link, and for a directory that another user may replace.
        """
        self.path = path
        with os_errors(path):
            if make:
                make_private(path)
            with Directory.open(path.parent) as above:
                if above.rights is not None:
                    raise _replaceable(path, above.rights)
                self._directory = above.open_directory(path.name)
        try:
            with os_errors(path):
                self._close_to_others()
        except BaseException:
            self._directory.close()
            raise

    def _close_to_others(self) -> None:
        found = os.fstat(self._directory.fd)
        if found.st_uid != os.geteuid():
            raise _replaceable(self.path, Rights.of_user(found.st_uid))
        if found.st_mode & _OTHERS_MAY_WRITE:
            self._directory.set_own_mode(DIRECTORY_MODE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._directory.close()

    def names(self) -> list[str]:
        """The names in it."""
        with os_errors(self.path):
            return self._directory.names()

    def read(self, name: str, *, cap: int, is_secret: bool = False) -> bytes:
        """The bytes of a small file. cap: its largest size in bytes; is_secret: refuse a file that others may read.

        Raises NotFound; InvalidInput for a larger file, and for anything but a regular file of this user alone.
        """
        with os_errors(self.path / name):
            return _read_own(self._directory, name, cap=cap, is_secret=is_secret)

    def write(self, name: str, data: bytes) -> None:
        """Replace a small file: a reader, or a crash, sees either the old or the new bytes."""
        with os_errors(self.path / name):
            write_in(self._directory, name, data, mode=FILE_MODE, whatever_the_umask=True)

    def write_once(self, name: str, data: bytes) -> None:
        """Write a small file unless it exists. Of several concurrent writers one wins."""
        temporary = temporary_beside(self.path / name, purpose=NEW).name
        with os_errors(self.path / name):
            fd = self._directory.create(temporary)
            try:
                with os.fdopen(fd, "wb") as file:
                    os.fchmod(fd, FILE_MODE)
                    file.write(data)
                    file.flush()
                    os.fsync(fd)
                with suppress(FileExistsError):
                    self._directory.link(temporary, name)
            finally:
                self._directory.remove(temporary)
            self._directory.sync()

    def write_unsynced(self, name: str, data: bytes | memoryview) -> None:
        """As `write`, for bytes that prove themselves: a crash of the machine may leave others under the name."""
        temporary = temporary_beside(self.path / name, purpose=NEW).name
        with os_errors(self.path / name):
            fd = self._directory.create(temporary)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                self._directory.rename(temporary, name)
            except BaseException:
                self._directory.remove(temporary)
                raise

    def open_beside(self, name: str) -> int:
        """A descriptor of a file that processes lock and count in; it is made if missing. Raises as `read`."""
        self.write_once(name, b"")
        with os_errors(self.path / name):
            return self._directory.open_file(name, writing=True)

    def status(self, name: str) -> os.stat_result:
        """The status of a file."""
        with os_errors(self.path / name):
            return self._directory.status(name)

    def mark_used(self, name: str) -> None:
        """Give a file the time of now."""
        with os_errors(self.path / name):
            self._directory.mark_used(name)

    def remove(self, name: str) -> None:
        """Idempotent."""
        with os_errors(self.path / name):
            self._directory.remove(name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A block with an exclusive lock on the directory; no lock where the filesystem has none."""
        fd = self._directory.opened()
        try:
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)

    @contextmanager
    def held(self, what: str) -> Iterator[None]:
        """As `locked`, without waiting. what: a sentence for the error. Raises Busy where another process has it."""
        fd = self._directory.opened()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(what, subject=self.path, hint="let it end, and run the command again") from error
        except OSError:  # a filesystem without locks
            yield
            return
        try:
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)


def _replaceable(path: Path, rights: Rights) -> InvalidInput:
    return InvalidInput(
        f"{rights} may replace it",
        subject=path,
        hint="set HOME, XDG_STATE_HOME and XDG_CACHE_HOME to directories of your own",
    )


def _read_own(directory: Directory, name: str, *, cap: int, is_secret: bool = False) -> bytes:
    def check(fd: int) -> None:
        status = os.fstat(fd)
        if is_secret and (status.st_uid not in (0, os.geteuid()) or status.st_mode & _OTHERS_MAY_USE):
            raise InvalidInput(
                "others may read or change it", subject=directory.path / name, hint="remove it: then a new one is made"
            )
        if not is_own(directory, status):
            raise InvalidInput(
                "another user may have written it",
                subject=directory.path / name,
                hint="keep it where only you may write, or remove it",
            )

    return read_in(directory, name, cap=cap, check=check)


# --- Records in this user's state directory: one pydantic model a file, in JSON.

M = TypeVar("M", bound=BaseModel)


def read_record(path: Path, shape: type[M], *, cap: int) -> M:
    """Read and validate a record. cap: its largest size in bytes.

    Raises NotFound where the file is missing, Corrupt where it is not valid, and as PrivateDirectory.
    """
    with PrivateDirectory(path.parent) as directory:
        text = directory.read(path.name, cap=cap)
    try:
        return shape.model_validate_json(text)
    except ValidationError as error:
        raise Corrupt(
            "this file is unsound", subject=path, hint="remove it: what it holds is found out again"
        ) from error


def write_record(path: Path, record: BaseModel) -> None:
    """Write or replace a record; its directory is created if missing."""
    with PrivateDirectory(path.parent, make=True) as directory:
        directory.write(path.name, record.model_dump_json().encode())


# --- Configuration files decide which programs run: they are read only where just this user and root can write.
#
# A user who can write a configuration runs programs as its reader, and chooses which files the reader overwrites.
# So the file's own mode counts, and the mode of each directory in which it could be replaced, as in sshd.

_REMEDY = "let only yourself or root own it, and write to it and its directory; whoever can write to it runs programs"


def read_trusted(path: Path, *, cap: int = 1 << 20) -> bytes:
    """The bytes of a configuration file; links are followed. cap: its largest size in bytes.

    Raises InvalidInput where another user can write or replace it and for a larger file, and as reading a file.
    """
    with os_errors(path):
        found = resolve(path, strict=True)
        with Directory.open(found.real.parent) as directory:
            fd = directory.open_file(found.real.name, subject=path)
            with os.fdopen(fd, "rb") as file:
                writer = found.chosen_by or _who_else(directory, fd)
                if writer is not None:
                    raise InvalidInput(f"{writer} can write or replace this file", subject=path, hint=_REMEDY)
                data = file.read(cap + 1)
    if len(data) > cap:
        raise InvalidInput(f"larger than the {cap} bytes that it may have", subject=path)
    return data


def _who_else(directory: Directory, fd: int) -> Rights | None:
    """The user or group, besides this user and root, that can write to an open file or replace it in its directory."""
    status, place = os.fstat(fd), os.fstat(directory.fd)
    if os.geteuid() == 0:
        return writer_of(status, fd) or directory.rights_of_file(status)
    for each in (status, place):
        if each.st_uid not in (0, os.geteuid()):
            return Rights.of_user(each.st_uid)
    is_protected = place.st_mode & stat.S_ISVTX
    if status.st_mode & stat.S_IWOTH or (place.st_mode & stat.S_IWOTH and not is_protected):
        return EVERYBODY
    return None
