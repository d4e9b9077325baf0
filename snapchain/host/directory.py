"""A directory that is pinned by a descriptor, and the rights with which its names are used.

Root uses another user's directory with that user's rights, from where path_resolution.py says.  In a directory that
this user owns, root makes, renames and removes names itself: the user could do the same, and a file that the user may
not read stays unreadable for them.  Root opens a file that the user could not open only if it is a regular file
without a name elsewhere: then it cannot be a link to a file outside.

A user other than root uses the same descriptors, with no other rights.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from snapchain.errors import Conflict, InvalidInput, SnapchainError
from snapchain.host.path_resolution import LOOK, entered, resolve, walk
from snapchain.host.rights import EVERYBODY, DeniedToOther, Rights, acting_as
from snapchain.host.writers import is_root, is_shared_by_sticky, writer_of

_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_QUIETLY = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_REMOVED = " (deleted)"
"""At the end of a descriptor's name in /proc, once that name was removed."""
_STEP, _COARSE_STEP = 20_000_000, 1_000_000_000
"""Nanoseconds: the kernel stamps files by a clock that steps every 1 to 10 ms, some file systems by whole seconds."""
MOST_MODE = 0o666
"""No file of ours gets more: no execute bit, no set-id bit."""
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISLNK, "a symbolic link"),
)


class Directory:
    """A context manager. path: as given; fd: a descriptor for use as dir_fd only; rights: see the module.

    Unless documented otherwise, methods take single names, follow no link and raise OSError.
    """

    def __init__(self, path: Path, fd: int, rights: Rights | None, chosen_by: Rights | None = None) -> None:
        """Owns `fd`. Callers use `open`."""
        self.path, self.fd, self.rights = path, fd, rights
        self._listed = -1
        status = os.fstat(fd)
        self._is_sticky = is_root() and is_shared_by_sticky(status)
        own = rights is not None and writer_of(status, fd) == rights
        # The rights for making and removing names here.
        self._naming = None if own else rights
        # A user whose link leads here sees only names that they may list themselves.
        self._listing = chosen_by or self._naming

    @property
    def is_shared(self) -> bool:
        """Whether users other than root may make names here; False where this process is not root."""
        return self.rights is not None or self._is_sticky

    @classmethod
    def open(cls, path: Path, *, follow: bool = True, chosen_by: Rights | None = None) -> Self:
        """Open the directory of a path. follow: False where the path should hold no symbolic links.

        chosen_by: of the `Resolved` that gave the path; its names are listed with these rights
        Raises OSError; Unsupported where two users could use root against each other.
        """
        walked = walk(path, follow=follow)
        if walked.missing or not stat.S_ISDIR(os.fstat(walked.fd).st_mode):
            os.close(walked.fd)
            number = errno.ENOENT if walked.missing else errno.ENOTDIR
            raise OSError(number, os.strerror(number), str(path))
        return cls(path, walked.fd, walked.rights, chosen_by)

    def create(self, name: str, *, mode: int = 0o600) -> int:
        """Create a file; a descriptor for reading and writing. Raises FileExistsError, also for a dangling link."""
        with acting_as(self._naming):
            return os.open(_single(name), _NEW, mode & MOST_MODE, dir_fd=self.fd)

    def make_directory(self, name: str, *, mode: int = 0o700, whatever_the_umask: bool = False) -> None:
        """Make a directory that belongs to the user of this one, so that they may enter it too."""
        with acting_as(self.rights):
            os.mkdir(_single(name), mode & 0o777, dir_fd=self.fd)
            if whatever_the_umask:
                with self.open_directory(name) as made:
                    made.set_own_mode(mode)

    def open_directory(self, name: str) -> Self:
        """Open a directory in this one; a link is refused."""
        with ExitStack() as acting:
            acting.enter_context(acting_as(self.rights))
            fd = os.open(_single(name), LOOK | os.O_DIRECTORY, dir_fd=self.fd)
            try:
                return type(self)(self.path / name, fd, entered(fd, self.path / name, self.rights, acting))
            except BaseException:
                os.close(fd)
                raise

    def set_own_mode(self, mode: int) -> None:
        """Set the mode of this directory itself."""
        with acting_as(self._naming):
            os.chmod(f"/proc/self/fd/{self.fd}", mode & 0o777)  # noqa: PTH101 - fchmod refuses an O_PATH descriptor

    def create_unnamed(self) -> int:
        """Create a file without a name; a descriptor for reading and writing."""
        with acting_as(self._naming):
            return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self.fd)

    def open_file(
        self,
        name: str,
        *,
        writing: bool = False,
        exclusive: bool = False,
        subject: object = None,
        refusal: type[SnapchainError] = InvalidInput,
        check: Callable[[int], None] | None = None,
    ) -> int:
        """A descriptor of a regular file or a block device. Raises `refusal` for anything else, without opening it.

        exclusive: refuse a block device that another program claims or has mounted
        subject: named by errors instead of the path
        check: gets an O_PATH descriptor, and raises for a file that must not be opened
        """
        with acting_as(self._naming):
            place = os.open(_single(name), LOOK, dir_fd=self.fd)
        try:
            status = os.fstat(place)
            check_kind(status, subject or self.path / name, refusal)
            if check is not None:
                check(place)
            flags = (os.O_RDWR if writing else os.O_RDONLY) | (os.O_EXCL if exclusive else 0) | _QUIETLY
            return self._open_judged(place, status, flags)
        finally:
            os.close(place)

    def _open_judged(self, place: int, status: os.stat_result, flags: int) -> int:
        try:
            return _reopened(place, flags, self.rights_of_file(status))
        except DeniedToOther:
            if not self._is_safe_for_root(place):
                raise
            return _reopened(place, flags, None)

    def rights_of_file(self, status: os.stat_result) -> Rights | None:
        """The rights with which an existing file of this directory is opened. status: from fstat."""
        if self._is_sticky:
            if status.st_uid != 0:
                return Rights.of_user(status.st_uid)
            # Any user may have linked a file of root's into this directory.
            return EVERYBODY if stat.S_ISREG(status.st_mode) and status.st_nlink > 1 else None
        return self.rights

    def _is_safe_for_root(self, fd: int) -> bool:
        """Whether a file that its directory's user may not open is certainly a file of this directory alone."""
        own = self.rights is not None and self._naming is None
        return own and stat.S_ISREG(os.fstat(fd).st_mode) and self._is_only_here(fd)

    def _is_only_here(self, fd: int) -> bool:
        """Whether a file has no name elsewhere. fd: its descriptor, opened or created here.

        The user may make and remove links between any two calls.
        """
        status = os.fstat(fd)
        if status.st_nlink <= 1:
            # The kernel never restores a removed name of a descriptor. A name that exists now existed a moment ago,
            # when there was only one: it is that one.
            return status.st_nlink == 0 or not str(Path(f"/proc/self/fd/{fd}").readlink()).endswith(_REMOVED)
        # Making or removing a link moves the ctime, once that is older than a step of the clock.
        step = _COARSE_STEP if status.st_ctime_ns % _COARSE_STEP == 0 else _STEP
        age = time.time_ns() - status.st_ctime_ns
        if -step < age < step:
            time.sleep((step - age) / 1e9)
        names = sum(self._is_name_of(name, status) for name in self.names())
        now = os.fstat(fd)
        return names == now.st_nlink and now.st_ctime_ns == status.st_ctime_ns

    def _is_name_of(self, name: str, status: os.stat_result) -> bool:
        try:
            return same_file(self.status(name), status)
        except FileNotFoundError:
            return False

    @contextmanager
    def changing(self, fd: int) -> Iterator[None]:
        """A block that may change owner, mode and attributes of an existing, opened file of this directory."""
        with acting_as(None if self._is_safe_for_root(fd) else self.rights_of_file(os.fstat(fd))):
            yield

    def status(self, name: str) -> os.stat_result:
        """The status of the entry itself, also of a link."""
        with acting_as(self._naming):
            return os.stat(_single(name), dir_fd=self.fd, follow_symlinks=False)

    def has(self, name: str) -> bool:
        """Whether the name exists, also as a dangling link."""
        try:
            self.status(name)
        except FileNotFoundError:
            return False
        return True

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(os.listdir(self.opened()))  # noqa: PTH208 - by descriptor

    def opened(self) -> int:
        """A descriptor for listing, locking and syncing; the object keeps and closes it."""
        if self._listed < 0:
            with acting_as(self._listing):
                self._listed = os.open(".", _LIST, dir_fd=self.fd)
        return self._listed

    def give(self, name: str, uid: int) -> None:
        """Give a file of this directory to another user; of a link, the link itself."""
        os.chown(name, uid, -1, dir_fd=self.opened(), follow_symlinks=False)

    def rename(self, old: str, new: str) -> None:
        """Rename; an existing file of the new name is replaced."""
        with acting_as(self._naming):
            os.rename(_single(old), _single(new), src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def link(self, old: str, new: str) -> None:
        """Give a file a second name; of a symbolic link, the link itself."""
        with acting_as(self._naming):
            os.link(_single(old), _single(new), src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)

    def link_into(self, old: str, other: Directory, new: str) -> None:
        """Give a file of this directory a name in another one."""
        with acting_as(other._naming):
            os.link(_single(old), _single(new), src_dir_fd=self.fd, dst_dir_fd=other.fd, follow_symlinks=False)

    def make_symlink(self, name: str, target: str) -> None:
        """Make a symbolic link, which may lead anywhere."""
        with acting_as(self._naming):
            os.symlink(target, _single(name), dir_fd=self.fd)

    def set_owner(self, name: str, owner: tuple[int, int]) -> None:
        """Set the user and the group of an entry itself, also of a link."""
        with acting_as(self._naming):
            os.chown(_single(name), *owner, dir_fd=self.fd, follow_symlinks=False)

    def set_times(self, name: str, times: tuple[int, int]) -> None:
        """Set the (atime, mtime) of an entry itself, in nanoseconds, also of a link."""
        with acting_as(self._naming):
            os.utime(_single(name), ns=times, dir_fd=self.fd, follow_symlinks=False)

    def remove(self, name: str, *, only: os.stat_result | None = None) -> bool:
        """Remove a name; whether it was there. only: remove it only if it still is that file."""
        with acting_as(self._naming):
            try:
                if only is not None and not same_file(self.status(name), only):
                    return False
                os.unlink(_single(name), dir_fd=self.fd)
            except FileNotFoundError:
                return False
        return True

    def remove_directory(self, name: str) -> bool:
        """Remove an empty directory; whether it was there. Raises OSError where it holds something."""
        with acting_as(self._naming):
            try:
                os.rmdir(_single(name), dir_fd=self.fd)
            except FileNotFoundError:
                return False
        return True

    def mark_used(self, name: str) -> None:
        """Give a file the time of now."""
        with acting_as(self._naming):
            os.utime(_single(name), dir_fd=self.fd, follow_symlinks=False)

    def give_name(self, fd: int, old: str, new: str, *, replacing: os.stat_result | None) -> None:
        """Rename a file from its temporary name to its final one, durably.

        replacing: the file that has the final name and loses it; None where the name is free
        Raises Conflict where another file has, or takes meanwhile, either name; FileExistsError where the name should
        be free and is not.
        """
        ours = os.fstat(fd)
        self.check_is(old, ours)
        if replacing is None:
            self.link(old, new)
        else:
            self.check_is(new, replacing)
            self.rename(old, new)
        # A user with write access here can swap the names between a check and a change.
        self.check_is(new, ours)
        if replacing is None:
            self.remove(old, only=ours)
        self.sync()

    def check_is(self, name: str, status: os.stat_result) -> None:
        """Raises Conflict unless the name belongs to the file with this status."""
        try:
            if same_file(self.status(name), status):
                return
        except FileNotFoundError:
            pass
        raise Conflict("another file took its name meanwhile", subject=self.path / name, hint="run it again")

    def sync(self) -> None:
        """Flush its names to the disk."""
        os.fsync(self.opened())

    def close(self) -> None:
        """Idempotent."""
        for fd in (self.fd, self._listed):
            if fd >= 0:
                os.close(fd)
        self.fd = self._listed = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_behind(path: Path, *, writing: bool = False, exclusive: bool = False, subject: object = None) -> int:
    """A descriptor of the regular file or block device behind all links of a path. Errors as `Directory.open_file`.

    subject: what errors name, else the file behind the links
    Whoever has chosen the file by a link must be able to read it.
    """
    resolved = resolve(path)
    with Directory.open(resolved.real.parent, follow=False) as directory:
        check = None
        if resolved.chosen_by is not None and resolved.chosen_by != directory.rights:
            check = partial(check_readable, resolved.real, rights=resolved.chosen_by)
        return directory.open_file(
            resolved.real.name, writing=writing, exclusive=exclusive, subject=subject, check=check
        )


def check_readable(path: Path | None, fd: int, *, rights: Rights | None) -> None:
    """Raises DeniedToOther unless somebody else could open a file for reading themselves. fd: of it, for any use.

    path: by which they would; None where it does not matter whether they can come to it
    """
    if path is None:
        os.close(_reopened(fd, os.O_RDONLY | _QUIETLY, rights))
        return
    with acting_as(rights):
        place = os.open(path, LOOK)
        try:
            if not same_file(os.fstat(place), os.fstat(fd)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            os.close(_reopened(place, os.O_RDONLY | _QUIETLY, None))
        finally:
            os.close(place)


def _reopened(place: int, flags: int, rights: Rights | None) -> int:
    """The very file that an O_PATH descriptor is of, whatever has its name by now."""
    with acting_as(rights):
        return os.open(f"/proc/self/fd/{place}", flags)


def check_kind(status: os.stat_result, subject: object, refusal: type[SnapchainError] = InvalidInput) -> None:
    """Raises `refusal` unless the status is of a regular file or a block device."""
    if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
        return
    kind = next((name for test, name in _KINDS if test(status.st_mode)), "something unknown")
    raise refusal(f"{kind}, not a regular file or block device", subject=subject)


def same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether both statuses are of one file."""
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def _single(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise InvalidInput("not the name of a file in a directory", subject=repr(name))
    return name
