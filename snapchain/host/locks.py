"""Image locks that are compatible with QEMU's, in both directions.

QEMU uses shared "open file description" locks on single bytes of the file (block/file-posix.c): a process that
uses permission p locks byte 100+p, a process that does not share p locks byte 200+p.  A process that opens an
image first locks its bytes. Then it tests that no other process has locked 200+p for a permission that it uses,
or 100+p for a permission that it does not share.

    READ   uses consistent-read, shares neither write nor resize: others may read, no VM can start on it
    WRITE  uses all, shares nothing: fails while the image is open anywhere, and no process can open it

The locks belong to the file, not to its name, survive a rename, and vanish with the process.  They are
advisory and local to a host: NFS before version 4 and some FUSE filesystems have none (`enforced`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Self

from snapchain.errors import Busy, Conflict
from snapchain.host.directory import open_behind
from snapchain.host.openers import Opener, OpenFiles
from snapchain.host.os_errors import os_errors
from snapchain.host.qemu_processes import QemuProcess, qemu_process

PERMISSION_BASE = 100
UNSHARED_BASE = 200
CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)
_NAMES = {CONSISTENT_READ: "reading", WRITE: "writing", WRITE_UNCHANGED: "writing", RESIZE: "resizing"}

_OFFSETS = frozenset(base + p for base in (PERMISSION_BASE, UNSHARED_BASE) for p in range(4))

# struct flock: l_type, l_whence, l_start, l_len, l_pid (0, as the kernel demands of OFD locks).
_FLOCK = struct.Struct("hhqqi4x")
_NO_LOCKS_HERE = {errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}


class LockMode(Enum):
    """(permissions used, permissions not shared)."""

    READ = ((CONSISTENT_READ,), (WRITE, RESIZE))
    WRITE = ((CONSISTENT_READ, WRITE, RESIZE), (CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE))

    def held(self) -> frozenset[int]:
        """The bytes that this mode locks."""
        used, unshared = self.value
        return frozenset([PERMISSION_BASE + p for p in used] + [UNSHARED_BASE + p for p in unshared])

    def conflicting(self) -> dict[int, str]:
        """The bytes that no other process may have locked, each with what its holder does."""
        used, unshared = self.value
        theirs = {PERMISSION_BASE + p: _NAMES[p] for p in reversed(unshared)}
        return theirs | {UNSHARED_BASE + p: f"and does not share {_NAMES[p]}" for p in used}


class ImageLock:
    """A lock on one image file, until `release` or the end of the `with` block.

    enforced: False where the filesystem has no such locks; then only /proc was checked.
    """

    def __init__(self, path: Path, mode: LockMode, *, open_files: OpenFiles | None = None) -> None:
        """Lock without waiting. Raises Busy; Conflict when another file took the name meanwhile.

        Symbolic links are followed, as in QEMU: the lock is on the file behind the name.
        open_files: a fresh scan of /proc, to share among many locks; made here by default
        """
        self.path = path
        self.mode: LockMode | None = None
        self.enforced = True
        with os_errors(path):
            self._fd = open_behind(path, subject=path)
        try:
            self._file = os.fstat(self._fd)
            self.change(mode, open_files=open_files)
            self._check_name()
        except BaseException:
            self.release()
            raise

    def change(self, mode: LockMode, *, open_files: OpenFiles | None = None) -> None:
        """Change a READ lock to a WRITE lock or back, without a gap. Raises Busy, and then keeps the old mode."""
        had = self.mode.held() if self.mode else frozenset[int]()
        wanted = mode.held()
        try:
            self._set(wanted - had, fcntl.F_RDLCK)
            self._test(mode, open_files)
        except BaseException:
            self._set(wanted - had, fcntl.F_UNLCK)
            raise
        self._set(had - wanted, fcntl.F_UNLCK)
        self.mode = mode

    def release(self) -> None:
        """Unlock. Idempotent."""
        if self._fd >= 0:
            # Unlock explicitly: a child that another thread has just forked may still have a copy of the descriptor,
            # and would keep the lock until its exec.
            with suppress(OSError):
                self._set(_OFFSETS, fcntl.F_UNLCK)
            os.close(self._fd)
            self._fd = -1

    @property
    def fd(self) -> int:
        """A descriptor of the locked file, open for reading."""
        return self._fd

    def same_file(self, path: Path) -> bool:
        """Whether `path` is still the file that is locked here."""
        try:
            now = path.stat()
        except OSError:  # the file, or a directory of its path, is gone
            return False
        return (now.st_dev, now.st_ino) == (self._file.st_dev, self._file.st_ino)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def _check_name(self) -> None:
        if not self.same_file(self.path):
            raise Conflict("another file took its name while it was being locked", subject=self.path)

    def _set(self, offsets: frozenset[int], kind: int) -> None:
        for offset in sorted(offsets):
            try:
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0))
            except OSError as error:
                if error.errno in _NO_LOCKS_HERE:
                    self.enforced = False
                    return
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise self._busy("has it locked") from error
                raise

    def _test(self, mode: LockMode, open_files: OpenFiles | None) -> None:
        for offset, doing in mode.conflicting().items() if self.enforced else ():
            answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
            if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                raise self._busy(f"has it open for {doing}" if offset < UNSHARED_BASE else f"has it open {doing}")
        grows = self.mode is not LockMode.WRITE and mode is LockMode.WRITE
        if grows or not self.enforced:
            # Without locks every opener counts; with them only one that can write and has not locked.
            for opener in (open_files or OpenFiles()).openers(self._file):
                if opener.writing or (mode is LockMode.WRITE and not self.enforced):
                    raise self._busy("has it open", opener)

    def _busy(self, doing: str, who: Opener | None = None) -> Busy:
        known = [who] if who else OpenFiles().openers(self._file)
        guests = [guest for each in known if each.pid is not None and (guest := qemu_process(each.pid)) is not None]
        if guests:
            return _guest_has_it(guests[0], self.path)
        names = ", ".join(map(str, known)) or "somebody (another user's process, or one in this program)"
        return Busy(f"{names} {doing}", subject=self.path, hint="stop it, or shut the guest down, then run it again")


def _guest_has_it(guest: QemuProcess, path: Path) -> Busy:
    remedy = "or shut the guest down, then run it again"
    if guest.option is None:
        hint = f"give its QEMU a QMP socket (-qmp unix:PATH,server=on,wait=off) for --qmp PATH, {remedy}"
    else:
        hint = f"say {guest.option} instead of the path, {remedy}"
    return Busy(f"a running guest has it open: {guest.description}", subject=path, hint=hint)
