"""Directories and files below one root, reached step by step from its descriptor.

Every step opens with O_NOFOLLOW, so no symbolic link below the root leads out of it; and because the root's descriptor
stays open, an unmount in the middle of a job fails loudly where a path would quietly name the empty mount point.
Directories are made private and synced into their parents before anything is put into them.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from snapchain.errors import InvalidInput, NotFound
from snapchain.objects.disk_errors import from_os_error
from snapchain.objects.store import TEMPORARY, is_segment

DIRECTORY_MODE = 0o700
"""Backups are secrets, encrypted or not."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Rooted:
    """One root directory, kept open.  Methods raise OSError as it comes, unless they say otherwise."""

    def __init__(self, root: Path, *, make: bool) -> None:
        """`make` creates the directory and its parents.  Raises NotFound when it is not there, and our other errors."""
        self.root = root
        self._lock = threading.Lock()
        self._synced: set[str] = set()  # directories whose entry in their parent is known to be on disk
        self._tmp: int | None = None
        try:
            if make:
                make_directories(root)
            # The path that the user named may be or hold a link; what lies below must not.
            self._fd: int | None = os.open(root, _DIRECTORY)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound("there is no such directory", subject=root) from error
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

    @contextmanager
    def folder(self, name: str, *, make: bool) -> Iterator[tuple[int, str]]:
        """(descriptor of the directory that holds `name`, last segment).  With `make` it exists, durably."""
        *folders, leaf = name.split("/")
        with ExitStack() as opened:
            fd = self._descriptor()
            for depth, folder in enumerate(folders, 1):
                fd = self._step(fd, folder, "/".join(folders[:depth]), make=make)
                opened.callback(os.close, fd)
            yield fd, leaf

    def entries(self, folder: str) -> list[tuple[str, bool]]:
        """(segment, is a directory) of what may be ours in `folder`, in the order of full names.

        That is S3's order: `a-b` comes before `a/b`, since '-' < '/'.  Raises our errors; nothing there is empty.
        """
        try:
            with self.folder(f"{folder}/x" if folder else "x", make=False) as (fd, _), os.scandir(fd) as found:
                entries = [
                    (entry.name, entry.is_dir(follow_symlinks=False))
                    for entry in found
                    if is_segment(entry.name) and (folder or entry.name != TEMPORARY)
                ]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise from_os_error(error, self.path(folder)) from error
        return sorted(entries, key=lambda entry: f"{entry[0]}/" if entry[1] else entry[0])

    def all_names(self) -> list[str]:
        """What is in the root, whatever it is and may be called. Raises our errors."""
        try:
            with os.scandir(self._descriptor()) as found:
                return sorted(entry.name for entry in found)
        except OSError as error:
            raise from_os_error(error, self.root) from error

    def temporary(self, older_than: float) -> int:
        """Descriptor of the directory of unfinished files; swept of old ones when this process first asks."""
        with self._lock:
            if self._tmp is None:
                self._tmp = self._step(self._descriptor(), TEMPORARY, TEMPORARY, make=True)
                sweep(self._tmp, older_than)
            return self._tmp

    def sweep_temporary(self, older_than: float) -> int:
        """Delete unfinished files untouched for `older_than` seconds; gives how many.  Makes no directory."""
        try:
            with self.folder(f"{TEMPORARY}/x", make=False) as (fd, _):
                return sweep(fd, older_than)
        except FileNotFoundError:
            return 0

    def _descriptor(self) -> int:
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
        with suppress(FileExistsError):
            os.mkdir(folder, DIRECTORY_MODE, dir_fd=parent)
        # Synced also when another writer made it: they may not have come to their own sync yet.
        os.fsync(parent)
        self._synced.add(path)


def make_directories(path: Path) -> None:
    """Like `mkdir -p`, but private and durable."""
    if path.is_dir():
        return
    if path.parent != path:
        make_directories(path.parent)
    with suppress(FileExistsError):
        path.mkdir(mode=DIRECTORY_MODE)
    fd = os.open(path.parent, _DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sweep(folder: int, older_than: float) -> int:
    """Delete the regular files in `folder` that nobody touched for `older_than` seconds; gives how many."""
    swept = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # another sweeper
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(found.st_mode) and time.time() - found.st_mtime > older_than:
                    os.unlink(entry.name, dir_fd=folder)
                    swept += 1
    return swept
