"""Who has a file open: what /proc tells.

Locks are a promise among programs that take them.  A process that has the file open for writing without a
lock (`file.locking=off`, `dd`, a loop device's owner) is seen here alone.  Processes of other users are
visible to root only, other hosts and other mount namespaces' files by device and inode alone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Opener:
    """A process that has the file open. writing: through a descriptor that can write."""

    pid: int
    command: str
    writing: bool

    def __str__(self) -> str:
        return f"{self.command} (pid {self.pid})"


def openers(file: os.stat_result) -> Iterator[Opener]:
    """Every other process with a descriptor of this file (told by device and inode, or by device number)."""
    for name in (entry.name for entry in _PROC.iterdir()):
        if name.isdigit() and int(name) != os.getpid():
            # A process may end, or hide its descriptors from us, at any moment.
            with suppress(OSError):
                yield from _of_process(int(name), file)


def _of_process(pid: int, file: os.stat_result) -> Iterator[Opener]:
    directory = _PROC / str(pid) / "fd"
    found = False
    writing = False
    with os.scandir(directory) as descriptors:
        for descriptor in descriptors:
            with suppress(OSError):
                if _same(descriptor.stat(), file):
                    found = True
                    writing = writing or _can_write(pid, descriptor.name)
    if found:
        yield Opener(pid, _command(pid), writing)


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    if stat.S_ISBLK(other.st_mode):
        return stat.S_ISBLK(one.st_mode) and one.st_rdev == other.st_rdev
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def _can_write(pid: int, descriptor: str) -> bool:
    for line in (_PROC / str(pid) / "fdinfo" / descriptor).read_text().splitlines():
        if line.startswith("flags:"):
            return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def _command(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return "a process"
