"""The processes that have a file open, from /proc.

Locks bind only programs that take them.  A process that has the file open for writing without a lock
(`file.locking=off`, `dd`) shows up only here.  Processes of other users are visible to root only, other
hosts not at all.  A loop device has its file open in the kernel, where no process shows it; sysfs does.

A scan costs a stat for each descriptor of each process: to check many files, use one `OpenFiles`. It takes what the
kernel has in memory, and asks no file system: another program's file on a FUSE mount whose daemon hangs must not hang
ours, and a daemon of our own would wait for itself.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PROC = Path("/proc")
_BLOCK = Path("/sys/block")
_DONT_SYNC = 0x4000
_TYPE_AND_NUMBER = 0x101
_STATX = struct.Struct("=28xH2xQ88xIIII112x")
"""Of linux/stat.h: mode, inode number, device number (major, minor), device of the file system (major, minor)."""
_File = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Opener:
    """A process, or a loop device (pid None), that has a file open. writing: with a writable descriptor."""

    pid: int | None
    command: str
    writing: bool

    def __str__(self) -> str:
        return self.command if self.pid is None else f"{self.command} (pid {self.pid})"


class OpenFiles:
    """All files that other processes have open, at the time of construction."""

    def __init__(self) -> None:
        self._descriptors: dict[_File, list[tuple[int, str]]] = {}
        own = str(os.getpid())
        for name in (entry.name for entry in _PROC.iterdir()):
            if name.isdigit() and name != own:
                # A process may exit, or hide its descriptors, at any moment.
                with suppress(OSError):
                    self._note(name)

    def openers(self, file: os.stat_result) -> list[Opener]:
        """The openers of a file, matched by device and inode (a block device by its number)."""
        return self._openers(_identity(file))

    def device_openers(self, number: int) -> list[Opener]:
        """The openers of the block device with this number (st_rdev)."""
        return self._openers((1, number, 0))

    def _openers(self, identity: _File) -> list[Opener]:
        writing: dict[int, bool] = {}
        for pid, descriptor in self._descriptors.get(identity, ()):
            writing[pid] = writing.get(pid, False) or _can_write(pid, descriptor)
        processes = [Opener(pid, _command(pid), can_write) for pid, can_write in writing.items()]
        return processes + list(_loops(identity))

    def _note(self, pid: str) -> None:
        directory = os.open(_PROC / pid / "fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with os.scandir(directory) as descriptors:
                for name in (each.name for each in descriptors):
                    with suppress(OSError):
                        identity = _identity_in_memory(directory, name)
                        if identity is not None:
                            self._descriptors.setdefault(identity, []).append((int(pid), name))
        finally:
            os.close(directory)


def _loops(identity: _File) -> Iterator[Opener]:
    """The loop devices on a file."""
    for device in _BLOCK.glob("loop*"):
        # It may be detached at any moment, and its file may be outside this mount namespace.
        with suppress(OSError):
            behind = (device / "loop" / "backing_file").read_text().removesuffix("\n")
            if _identity(Path(behind).stat()) == identity:
                yield Opener(None, f"/dev/{device.name}", (device / "ro").read_text().strip() != "1")


def _identity(status: os.stat_result) -> _File:
    if stat.S_ISBLK(status.st_mode):
        return (1, status.st_rdev, 0)
    return (0, status.st_dev, status.st_ino)


def _identity_in_memory(directory: int, name: str) -> _File | None:
    """As `_identity`; None for what is neither a regular file nor a block device. Raises OSError."""
    found = ctypes.create_string_buffer(_STATX.size)
    if _libc().statx(directory, name.encode(), _DONT_SYNC, _TYPE_AND_NUMBER, found) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    mode, inode, major, minor, device_major, device_minor = _STATX.unpack(found)
    if stat.S_ISBLK(mode):
        return (1, os.makedev(major, minor), 0)
    return (0, os.makedev(device_major, device_minor), inode) if stat.S_ISREG(mode) else None


@cache
def _libc() -> ctypes.CDLL:
    """The C library: Python has statx from version 3.15."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
    libc.statx.restype = ctypes.c_int
    return libc


def _can_write(pid: int, descriptor: str) -> bool:
    with suppress(OSError):
        for line in (_PROC / str(pid) / "fdinfo" / descriptor).read_text().splitlines():
            if line.startswith("flags:"):
                return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def _command(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return "a process"
