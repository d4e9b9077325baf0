"""Who has a file open: what /proc tells.

Locks are a promise among programs that take them.  A process that has the file open for writing without a
lock (`file.locking=off`, `dd`, a loop device's owner) is seen here alone.  Processes of other users are
visible to root only, other hosts not at all.

One look costs a stat for each descriptor of each process: who asks about many files takes one `OpenFiles`.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_File = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Opener:
    """A process that has a file open. writing: through a descriptor that can write."""

    pid: int
    command: str
    writing: bool

    def __str__(self) -> str:
        return f"{self.command} (pid {self.pid})"


class OpenFiles:
    """All files that other processes have open, as of its making."""

    def __init__(self) -> None:
        self._descriptors: dict[_File, list[tuple[int, str]]] = {}
        own = str(os.getpid())
        for name in (entry.name for entry in _PROC.iterdir()):
            if name.isdigit() and name != own:
                # A process may end, or hide its descriptors from us, at any moment.
                with suppress(OSError):
                    self._note(name)

    def openers(self, file: os.stat_result) -> list[Opener]:
        """Who has this file open, told by device and inode (a block device by its number)."""
        writing: dict[int, bool] = {}
        for pid, descriptor in self._descriptors.get(_identity(file), ()):
            writing[pid] = writing.get(pid, False) or _can_write(pid, descriptor)
        return [Opener(pid, _command(pid), can_write) for pid, can_write in writing.items()]

    def _note(self, pid: str) -> None:
        with os.scandir(_PROC / pid / "fd") as descriptors:
            for descriptor in descriptors:
                with suppress(OSError):
                    status = descriptor.stat()
                    if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
                        self._descriptors.setdefault(_identity(status), []).append((int(pid), descriptor.name))


def _identity(status: os.stat_result) -> _File:
    if stat.S_ISBLK(status.st_mode):
        return (1, status.st_rdev, 0)
    return (0, status.st_dev, status.st_ino)


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
