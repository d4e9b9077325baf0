"""Directories and files below one root, reached step by step from its descriptor.

Every step opens with O_NOFOLLOW, so no symbolic link below the root leads out of it; and because the root's descriptor
stays open, an unmount in the middle of a job fails loudly where a path would quietly name the empty mount point.
Directories are synced into their parents before anything is put into them.  They and all files are private, unless the
root is shared with a group, as git's core.sharedRepository has it: it is setgid, and its group may write to it.  Then
what is made belongs to that group, which may do what the owner may, whatever the umask; others never may.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from snapchain.errors import InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.host.links import follow, others_may_write
from snapchain.host.os_errors import REMEDIES, translated
from snapchain.objects.store import TEMPORARY, Refused, is_segment

Found = TypeVar("Found")
DIRECTORY_MODE = 0o700
"""Backups are secrets, encrypted or not."""
FILE_MODE = 0o600
_GROUP_DIRECTORY = stat.S_ISGID | 0o070
_GROUP_FILE = 0o060

_IMAGE = "a repository is a directory; of an image, `snapchain inspect` shows the chain"


def _hint_of_missing(root: str | Path) -> str:
    above, mark, disk = str(root).partition("::")
    if mark:
        return f"this command takes a whole destination: {above}, without ::{disk}"
    return "check the path; `snapchain init` makes a repository"


_WRITE_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_WAY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_MOST_LINKS = 40
"""As many as Linux follows in one name."""


class Rooted:
    """One root directory, kept open.  Methods raise OSError as it comes, unless they say otherwise."""

    def __init__(self, root: Path, *, make: bool) -> None:
        """`make` creates the directory and its parents.  Raises NotFound when it is not there, and our other errors.

        is_shared: whether what is made is the group's as well
        """
        self.root = root
        self._lock = threading.Lock()
        self._synced: set[str] = set()  # directories whose entry in their parent is known to be on disk
        self._tmp: int | None = None
        self._fd: int | None = None
        try:
            # The path that the user named may be or hold a link; what lies below must not.
            self._fd = _opened(root, make=make)
            found = os.fstat(self._fd)
            self.is_shared, self._group = _is_shared(found.st_mode), found.st_gid
        except (FileNotFoundError, NotADirectoryError) as error:
            if root.exists():
                raise NotFound("this is a file, not a directory", subject=root, hint=_IMAGE) from error
            raise NotFound("there is no such directory", subject=root, hint=_hint_of_missing(root)) from error
        except OSError as error:
            raise from_os_error(error, root) from error

    def path(self, name: str) -> str:
        """For messages only."""
        return f"{self.root}/{name}"

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            held = [fd for fd in (self._tmp, self._fd) if fd is not None]
            self._tmp = self._fd = None
        for fd in held:
            os.close(fd)

    def __del__(self) -> None:
        """A command may open the destinations of many guests, and does not end in between."""
        self.close()

    @contextmanager
    def folder(self, name: str, *, make: bool) -> Iterator[tuple[int, str]]:
        """(descriptor of the directory that holds `name`, last segment).  With `make` it exists, durably."""
        *folders, leaf = name.split("/")
        with ExitStack() as opened:
            fd = self.descriptor()
            for depth, folder in enumerate(folders, 1):
                fd = self._step(fd, folder, "/".join(folders[:depth]), make=make)
                opened.callback(os.close, fd)
            yield fd, leaf

    def entries(self, folder: str) -> list[tuple[str, bool]]:
        """(segment, is a directory) of what may be ours in `folder`, in the order of full names.

        That is S3's order: `a-b` comes before `a/b`, since '-' < '/'.  Raises our errors; nothing there is empty.
        """
        found = self._scanned(folder, "", lambda entry: entry.is_dir(follow_symlinks=False))
        return sorted(found, key=lambda row: f"{row[0]}/" if row[1] else row[0])

    def listing(self, folder: str, start: str) -> list[tuple[str, os.stat_result | None]]:
        """As `entries`, of names that begin with `start`: (segment, status of the file, None of a directory)."""

        def status(entry: os.DirEntry[str]) -> os.stat_result | None:
            return None if entry.is_dir(follow_symlinks=False) else entry.stat(follow_symlinks=False)

        return sorted(self._scanned(folder, start, status), key=lambda row: f"{row[0]}/" if row[1] is None else row[0])

    def _scanned(self, folder: str, start: str, look: Callable[[os.DirEntry[str]], Found]) -> list[tuple[str, Found]]:
        """What `look` says of each entry of `folder` that may be ours, without those that go meanwhile."""
        rows = []
        try:
            with self.folder(f"{folder}/x" if folder else "x", make=False) as (fd, _), os.scandir(fd) as found:
                for entry in found:
                    name = entry.name
                    if name.startswith(start) and is_segment(name) and (folder or name != TEMPORARY):
                        with suppress(FileNotFoundError):
                            rows.append((name, look(entry)))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise from_os_error(error, self.path(folder)) from error
        return rows

    def all_names(self) -> list[str]:
        """What is in the root, whatever it is and may be called. Raises our errors."""
        try:
            with os.scandir(self.descriptor()) as found:
                return sorted(entry.name for entry in found)
        except OSError as error:
            raise from_os_error(error, self.root) from error

    def temporary(self, older_than: float) -> int:
        """Descriptor of the directory of unfinished files; swept of old ones when this process first asks."""
        with self._lock:
            if self._tmp is None:
                self._tmp = self._step(self.descriptor(), TEMPORARY, TEMPORARY, make=True)
                sweep(self._tmp, older_than)
            return self._tmp

    def sweep_temporary(self, older_than: float) -> int:
        """Delete unfinished files untouched for `older_than` seconds; gives how many.  Makes no directory."""
        try:
            with self.folder(f"{TEMPORARY}/x", make=False) as (fd, _):
                return sweep(fd, older_than)
        except FileNotFoundError:
            return 0

    def descriptor(self) -> int:
        """Of the root. Raises InvalidInput once it was closed."""
        if self._fd is None:
            raise InvalidInput("the store was closed", subject=self.root)
        return self._fd

    def _step(self, parent: int, folder: str, path: str, *, make: bool) -> int:
        """Open one directory below `parent`."""
        if make and path not in self._synced:
            self._make(parent, folder, path)
        try:
            return os.open(folder, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        except FileNotFoundError:
            if not make:
                raise
            self._make(parent, folder, path)  # somebody removed an empty directory that we knew
            return os.open(folder, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        except NotADirectoryError as error:
            if stat.S_ISLNK(os.stat(folder, dir_fd=parent, follow_symlinks=False).st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error
            if make:
                raise InvalidInput("an object stands where a directory is needed", subject=self.path(path)) from error
            raise

    def _make(self, parent: int, folder: str, path: str) -> None:
        _make_private(parent, folder)
        if self.is_shared:
            self._share(parent, folder)
        # Synced also when another writer made it: they may not have come to their own sync yet.
        os.fsync(parent)
        self._synced.add(path)

    def new_file(self, name: str, *, folder: int) -> int:
        """A descriptor, to write to, of a file that must not exist yet."""
        fd = os.open(name, _WRITE_NEW, FILE_MODE, dir_fd=folder)
        os.fchmod(fd, FILE_MODE | _GROUP_FILE if self.is_shared else FILE_MODE)
        return fd

    def _share(self, parent: int, folder: str) -> None:
        """Open a directory of ours to the group; one that another made is theirs to open."""
        try:
            fd = os.open(folder, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        except NotADirectoryError:  # what opens it next says so
            return
        try:
            found = os.fstat(fd)
            if found.st_uid == os.geteuid() and (found.st_gid != self._group or not _is_shared(found.st_mode)):
                with suppress(PermissionError):  # one's own, though not of that group: the directory serves oneself
                    os.fchown(fd, -1, self._group)
                    os.fchmod(fd, stat.S_IMODE(found.st_mode) | _GROUP_DIRECTORY)
        finally:
            os.close(fd)


def _is_shared(mode: int) -> bool:
    return mode & _GROUP_DIRECTORY == _GROUP_DIRECTORY


def _opened(path: Path, *, make: bool) -> int:
    """A descriptor of a directory; with `make` it and those above it are made, durably.

    Symbolic links are followed once, one by one, and then none is any more. Root follows none that others could have
    put there: they would choose where root makes and removes files.  Raises Unsupported for such a link; OSError.
    """
    with suppress(InvalidInput):  # no directory, or a loop of links: opening it says so
        follow(path)
    fd = os.open("/", _WAY)
    links = 0
    try:
        rest = list(reversed(path.absolute().parts[1:]))
        while rest:
            name = rest.pop()
            target = _link(fd, name, path)
            if target is not None:
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                rest.extend(reversed([part for part in target.split("/") if part not in ("", ".")]))
                above, fd = fd, os.open("/", _WAY) if target.startswith("/") else os.dup(fd)
            else:
                above, fd = fd, _entered(fd, name, make=make)
            os.close(above)
        return os.open(".", _DIRECTORY, dir_fd=fd)
    finally:
        os.close(fd)


def _link(parent: int, name: str, path: Path) -> str | None:
    """Where a symbolic link leads, None for what is none. Raises Unsupported for one that others could have made."""
    try:
        target = os.readlink(name, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return None
        raise
    # Judged by the very directory that was read, whatever has its name by now.
    if os.geteuid() == 0 and others_may_write(os.fstat(parent)):
        raise Unsupported(
            "another user could have made a symbolic link on the way to this directory",
            subject=path,
            hint=f"if {os.path.realpath(path)} is the directory that you mean, name that",
        )
    return target


def _entered(parent: int, name: str, *, make: bool) -> int:
    """A descriptor, for use as dir_fd only, of a directory below `parent`; what is made is private.

    In a shared directory it is shared as well, where the umask allows that.
    """
    try:
        return os.open(name, _WAY | os.O_NOFOLLOW, dir_fd=parent)
    except FileNotFoundError:
        if not make:
            raise
    is_new = _make_private(parent, name)
    fd = os.open(name, _WAY | os.O_NOFOLLOW, dir_fd=parent)
    if is_new and _is_shared(os.fstat(parent).st_mode) and not _umask() & 0o070:
        _allow(fd, _GROUP_DIRECTORY)
    _sync(parent)
    return fd


def _make_private(parent: int, name: str) -> bool:
    """Make a directory, 0700 whatever the umask; False when it is there. What was put in its place is not touched."""
    try:
        os.mkdir(name, DIRECTORY_MODE, dir_fd=parent)
    except FileExistsError:
        return False
    with suppress(NotADirectoryError):
        fd = os.open(name, _WAY | os.O_NOFOLLOW, dir_fd=parent)
        try:
            _allow(fd, DIRECTORY_MODE)
        finally:
            os.close(fd)
    return True


def _allow(folder: int, mode: int) -> None:
    """Add to the mode of a directory of ours. folder: an O_PATH descriptor, since its mode may forbid another one."""
    found = os.fstat(folder)
    if found.st_uid == os.geteuid() and found.st_mode & mode != mode:
        os.chmod(f"/proc/self/fd/{folder}", stat.S_IMODE(found.st_mode) | mode)  # noqa: PTH101


def _sync(folder: int) -> None:
    fd = os.open(".", _DIRECTORY, dir_fd=folder)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _umask() -> int:
    """This process's. (Setting it, which is the other way to learn it, would show in other threads.)"""
    for line in Path("/proc/self/status").read_bytes().splitlines():
        if line.startswith(b"Umask:"):
            return int(line.split()[1], 8)
    return 0o077


def sweep(folder: int, older_than: float) -> int:
    """Delete the regular files in `folder` that nobody touched for `older_than` seconds; gives how many."""
    swept = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError, PermissionError):  # another sweeper; of another user, in a sticky one
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(found.st_mode) and time.time() - found.st_mtime > older_than:
                    os.unlink(entry.name, dir_fd=folder)
                    swept += 1
    return swept


# --- What an OSError means below a repository's root, where every name is ours and none the user's.
#
# So it differs from host.os_errors: a refusal concerns the whole store (Refused: retrying is no use), not a wrong
# argument, and each says what an operator does about it.  What is not in the table means the same as there.


class Meaning(NamedTuple):
    """The error to raise for an errno, and its hint."""

    error: type[SnapchainError]
    hint: str


_PERMISSION = Meaning(
    Refused,
    "run as its owner, or share the repository with a group: chgrp -R and chmod -R g+rwX on all of it, and chmod g+s "
    "on its directories",
)
_DEVICE = Meaning(Unavailable, "look at the kernel log and the state of the mount, then run the command again")

MEANINGS: dict[int, Meaning] = {
    errno.ENOSPC: Meaning(Refused, REMEDIES[errno.ENOSPC]),
    errno.EDQUOT: Meaning(Refused, REMEDIES[errno.EDQUOT]),
    errno.EFBIG: Meaning(Refused, REMEDIES[errno.EFBIG]),
    errno.EROFS: Meaning(Refused, REMEDIES[errno.EROFS]),
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EIO: _DEVICE,
    errno.EREMOTEIO: _DEVICE,
    errno.ENODEV: _DEVICE,
    errno.ENXIO: _DEVICE,
    errno.ESTALE: _DEVICE,
    errno.ENOTCONN: _DEVICE,
    errno.ETIMEDOUT: _DEVICE,
    errno.EXDEV: Meaning(Unsupported, "tmp/ and all else of a repository must lie on one file system"),
    errno.ELOOP: Meaning(Unsupported, "a repository holds no symbolic links: use a bind mount to spread it over disks"),
}


def from_os_error(error: OSError, subject: object) -> SnapchainError:
    """The error of our tree for `error`, in the system's own words.

    A permission concerns what is there: a file, or the directory in which a new one has no place. So the subject is the
    nearest path that exists, and never the random name of an object to be.
    """
    meaning = MEANINGS.get(error.errno or 0)
    if meaning is None:
        return translated(error, subject)
    if meaning is _PERMISSION:
        subject = _nearest(str(subject))
    return meaning.error(os.strerror(error.errno or 0).lower(), subject=subject, hint=meaning.hint)


def _nearest(path: str) -> str:
    """The path, or the nearest directory above it that exists, as far as this user can see."""
    if not path.startswith("/"):
        return path
    return next(str(each) for each in (Path(path), *Path(path).parents) if os.path.lexists(each))
