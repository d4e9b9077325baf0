"""Room kept for a full disk, so that commands that free room can begin.

A collection and a merge must write a little (a lease, a catalogue generation, an index) before they can delete
anything.  So a directory holds a file `.reserve` without information, whose name is no object's.  A command that is
`spending` removes it when the disk is full, and makes it again at the end, as large as the room allows.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from threading import Lock
from typing import Protocol, runtime_checkable

from snapchain.objects.store import ObjectStore, innermost

NAME = ".reserve"
LARGEST = 4 * 1024 * 1024
"""Bytes: the records of a merge of some GiB, or of a collection in a repository of a hundred disks."""
LEAST = 64 * 1024
SHARE = 8
"""The reserve takes one part in SHARE of the room that is left."""
_STEPS = (8, 7, 6, 5, 4, 3, 2, 1)
_MODE = 0o600
_SHARED_MODE = 0o660
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@runtime_checkable
class KeepsReserve(Protocol):
    """A store with a reserve."""

    def spending(self) -> AbstractContextManager[None]: ...

    def sweep_temporary(self, older_than: float) -> int: ...


def spending(store: ObjectStore) -> AbstractContextManager[None]:
    """During a `with` block the reserve is removed when the disk is full; afterwards it is made again, if possible."""
    bottom = innermost(store)
    return bottom.spending() if isinstance(bottom, KeepsReserve) else nullcontext()


def sweep_unfinished(store: ObjectStore, older_than: float) -> int:
    """Delete files that a killed program has not finished, untouched for so many seconds. Gives how many."""
    bottom = innermost(store)
    return bottom.sweep_temporary(older_than) if isinstance(bottom, KeepsReserve) else 0


def fill(store: ObjectStore) -> None:
    """Make the reserve, or enlarge it, where there is plenty of room."""
    bottom = innermost(store)
    if isinstance(bottom, KeepsReserve):
        with bottom.spending():
            pass


class Reserve:
    """The reserve of one directory. Thread-safe. A failure here is no error: the reserve is smaller then.

    shared: whether the group may use it as well (objects/rooted.py)
    """

    def __init__(self, *, shared: bool = False) -> None:
        self._mode = _SHARED_MODE if shared else _MODE
        self._lock = Lock()
        self._spenders = 0
        self._was_spent = False

    @contextmanager
    def spent(self, folder: int) -> Iterator[None]:
        """folder: descriptor of the directory."""
        with self._lock:
            self._spenders += 1
        try:
            yield
        finally:
            with self._lock:
                self._spenders -= 1
                if not self._spenders:
                    with suppress(OSError):
                        _fill(folder, self._mode, all_of_it=self._was_spent)
                    self._was_spent = False

    def give_up(self, folder: int, error: OSError) -> bool:
        """Remove the reserve. Returns whether that made room since `error`."""
        if error.errno not in FULL or not self._spenders:
            return False
        try:
            os.unlink(NAME, dir_fd=folder)
        except OSError:
            return False
        self._was_spent = True
        return True


def _fill(folder: int, mode: int, *, all_of_it: bool) -> None:
    """Make or enlarge the reserve. all_of_it: of all room that is left; else of a share of it."""
    room = os.fstatvfs(folder)
    free = room.f_bavail * room.f_frsize
    try:
        found = os.stat(NAME, dir_fd=folder, follow_symlinks=False)
        if not _is_ours(found):  # a link or a FIFO, or another name of somebody's file: not for us to write to
            return
        held: int | None = found.st_size
    except FileNotFoundError:
        held = None
    wanted = min(LARGEST, free if all_of_it else free // SHARE)
    if wanted < LEAST or (held is not None and (held >= LARGEST or wanted < 2 * held)):
        return
    how = os.O_CREAT | os.O_EXCL if held is None else 0
    fd = os.open(NAME, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | how, _MODE, dir_fd=folder)
    try:
        if not _is_ours(os.fstat(fd)):
            return
        if held is None:
            os.fchmod(fd, mode)
        _allocate(fd, wanted)
        if os.fstat(fd).st_size < LEAST:
            os.unlink(NAME, dir_fd=folder)
    finally:
        os.close(fd)


def _is_ours(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _allocate(fd: int, wanted: int) -> None:
    """Allocate `wanted` bytes, or as many as the room allows."""
    for step in _STEPS:
        size = wanted * step // _STEPS[0]
        try:
            os.posix_fallocate(fd, 0, max(size, 1))
        except OSError:
            os.ftruncate(fd, 0)
        else:
            return
