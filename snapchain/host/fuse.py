"""A tree of files that the kernel shows in a directory by FUSE, read-only, as long as this program runs.

    open, read of any program -> kernel -> a thread of libfuse -> Tree

libfuse has a thread of its own for its loop, so that this program's main thread gets its signals.  Whoever unmounts the
directory ends the loop; so does the end of the block, by a name in it that nobody else knows.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, Self

from snapchain.errors import Conflict, InvalidInput, NotFound, Unavailable, Unsupported
from snapchain.host.os_errors import os_errors

_DEVICE = Path("/dev/fuse")
_EXTRA = "pip install 'snapchain[mount]'"
_LIBRARY = "install libfuse: `apt-get install fuse3` on Debian and Ubuntu, `dnf install fuse3` on Fedora and RHEL"
_END_SECONDS = 10.0
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Status:
    """Of a name. kind: S_IFDIR, S_IFREG or S_IFLNK; size: bytes; modified: ns since 1970; stored: bytes it takes"""

    kind: int
    size: int = 0
    modified: int = 0
    stored: int = 0


class Tree(Protocol):
    """What is shown. Thread-safe. Paths begin with '/'. Each method raises OSError: its number is what programs get."""

    def status(self, path: str, /) -> Status: ...

    def names(self, path: str, /) -> Iterable[tuple[str, int]]:
        """The names in a directory, each with its kind."""
        ...

    def target(self, path: str, /) -> str:
        """Of a symbolic link."""
        ...

    def open(self, path: str, /) -> int:
        """A number for `read` and `close`."""
        ...

    def read(self, handle: int, offset: int, length: int, /) -> bytes:
        """All bytes of a range, up to the end of the file: the kernel takes a short answer for zeroes."""
        ...

    def close(self, handle: int, /) -> None: ...

    def end(self) -> None:
        """Reads that wait fail from now on."""
        ...


def check_mountable(directory: Path) -> None:
    """Raises Unsupported where FUSE cannot be used here, Conflict for a directory in use, NotFound, InvalidInput."""
    _library()
    if not _DEVICE.exists():
        raise Unsupported(
            "this host has no such device, so nothing can be mounted by FUSE",
            subject=_DEVICE,
            hint="load the kernel's module: modprobe fuse; give a container the device: --device /dev/fuse",
        )
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        raise Unsupported("this user may not use FUSE", subject=_DEVICE, hint="its mode tells who may; root may")
    if os.geteuid() != 0 and not (shutil.which("fusermount3") or shutil.which("fusermount")):
        raise Unsupported("fusermount3 is not installed, by which other users than root mount", hint=_LIBRARY)
    try:
        found = directory.stat()
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise Conflict(
                "a mount is left here whose program has ended",
                subject=directory,
                hint=f"unmount it first: {_unmount_command(directory)}",
            ) from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise NotFound("there is no such directory", subject=directory, hint="make it first") from error
        raise
    if not stat.S_ISDIR(found.st_mode):
        raise InvalidInput("this is no directory", subject=directory)
    with os_errors(directory):
        if any(directory.iterdir()):
            raise Conflict("the directory is not empty", subject=directory, hint="mount on an empty directory")


def _unmount_command(directory: Path) -> str:
    program = "fusermount3" if shutil.which("fusermount3") else "fusermount"
    return f"umount {directory}" if os.geteuid() == 0 else f"{program} -u {directory}"


class Mount:
    """A tree, shown in a directory. A context manager: it is mounted in the block, and unmounted at its end.

    for_others: all users of this host may read it, else only the user who mounts it
    """

    def __init__(self, tree: Tree, directory: Path, *, for_others: bool = False) -> None:
        """directory: absolute. Raises as `check_mountable`."""
        check_mountable(directory)
        self._fuse = _library()
        self._directory = directory
        self._is_mounted, self._has_ended = threading.Event(), threading.Event()
        self._tree = tree
        self._last_name = f".snapchain-{secrets.token_hex(16)}"
        self._options: dict[str, Any] = {
            "fsname": "snapchain",
            "subtype": "snapchain",
            "ro": True,
            "nosuid": True,
            "nodev": True,
            "noexec": True,
            "default_permissions": True,
            # The pages of a file stay for the next program that opens it, unless its size or time has changed.
            "auto_cache": True,
            "allow_other": for_others,
        }
        self._mode = 0o444 if for_others else 0o400

    def __enter__(self) -> Self:
        """Raises Unavailable where libfuse cannot mount; it says on stderr why."""
        thread = threading.Thread(target=self._run, name="fuse", daemon=True)
        thread.start()
        while not self._is_mounted.wait(0.05):
            if self._has_ended.is_set():
                raise Unavailable(
                    "libfuse could not mount here; its own message says why",
                    subject=self._directory,
                    hint="--allow-other needs user_allow_other in /etc/fuse.conf, unless root mounts",
                )
        self._thread = thread
        return self

    def __exit__(self, *_: object) -> None:
        self._tree.end()
        with suppress(OSError):
            os.lstat(self._directory / self._last_name)
        # Who has unmounted it lazily, and reads on, keeps it: the kernel ends that with this process.
        self._thread.join(_END_SECONDS)

    def wait(self) -> None:
        """Until somebody unmounts it."""
        while not self._has_ended.wait(_LOOK_SECONDS):  # a signal that another thread gets does not wake this one
            pass

    def _run(self) -> None:
        here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            operations = _Operations(self._tree, self._fuse, self._last_name, self._mode, here, self._is_mounted)
            with suppress(RuntimeError):  # with the status of libfuse, which has told why
                self._fuse.FUSE(operations, str(self._directory), foreground=True, **self._options)
        finally:
            os.close(here)
            self._has_ended.set()


class _Operations:
    """As mfusepy calls them. here: the working directory, which libfuse leaves"""

    use_ns = True

    def __init__(
        self, tree: Tree, fuse: ModuleType, last_name: str, mode: int, here: int, is_mounted: threading.Event
    ) -> None:
        self._tree, self._fuse, self._last = tree, fuse, f"/{last_name}"
        self._mode, self._here, self._is_mounted = mode, here, is_mounted
        self._owner = {"st_uid": os.geteuid(), "st_gid": os.getegid()}

    def init(self, _path: str) -> None:
        os.fchdir(self._here)
        self._is_mounted.set()

    def getattr(self, path: str, _handle: int | None = None) -> Mapping[str, int]:
        if path == self._last:
            self._fuse.fuse_exit()
            raise OSError(errno.ENOENT, path)
        found = self._tree.status(path)
        is_directory = found.kind == stat.S_IFDIR
        # Who may read a directory here may also enter it.
        mode = 0o777 if found.kind == stat.S_IFLNK else self._mode | (self._mode >> 2 if is_directory else 0)
        return {
            **self._owner,
            "st_mode": found.kind | mode,
            "st_nlink": 2 if is_directory else 1,
            "st_size": found.size,
            "st_blocks": -(-found.stored // 512),
            "st_atime": found.modified,
            "st_mtime": found.modified,
            "st_ctime": found.modified,
        }

    def readdir(self, path: str, _handle: int) -> Iterator[tuple[str, int, int]]:
        for name, kind in ((".", stat.S_IFDIR), ("..", stat.S_IFDIR), *self._tree.names(path)):
            yield name, kind, 0

    def readlink(self, path: str) -> str:
        return self._tree.target(path)

    def open(self, path: str, flags: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, path)
        return self._tree.open(path)

    def read(self, _path: str | None, length: int, offset: int, handle: int) -> bytes:
        return self._tree.read(handle, offset, length)

    def release(self, _path: str | None, handle: int) -> int:
        self._tree.close(handle)
        return 0


def _library() -> ModuleType:
    """The binding. Raises Unsupported where it, or libfuse itself, is missing."""
    try:
        import mfusepy
    except ImportError as error:
        raise Unsupported("the Python package mfusepy is not installed", hint=_EXTRA) from error
    except OSError as error:
        raise Unsupported("libfuse is not installed", hint=_LIBRARY) from error
    found: ModuleType = mfusepy
    return found
