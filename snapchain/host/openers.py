"""The processes that have a file open, from /proc.

Locks bind only programs that take them.  A process that has the file open for writing without a lock
(`file.locking=off`, `dd`) shows up only here.  Processes of other users are visible to root only, other
hosts not at all.  A loop device has its file open in the kernel, where no process shows it; sysfs does.

A scan costs a stat for each descriptor of each process: to check many files, use one `OpenFiles`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_BLOCK = Path("/sys/block")
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
        with os.scandir(_PROC / pid / "fd") as descriptors:
            for descriptor in descriptors:
                with suppress(OSError):
                    status = descriptor.stat()
                    if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
                        self._descriptors.setdefault(_identity(status), []).append((int(pid), descriptor.name))


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
