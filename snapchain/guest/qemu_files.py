"""The process of a QEMU on this host, as /proc shows it: which files it has open, and how it was started.

QEMU gives the names of its files as it was told them.  A relative name counts from its own directory; a file may have
been moved, removed or replaced under its name since.  Only the open descriptors tell, by device and inode.
"""

from __future__ import annotations

import itertools
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from snapchain.host.process_identity import identity
from snapchain.host.qemu_options import fields

_REMOVED = " (deleted)"
_LONGEST_COMMAND_LINE = 4 << 20

FileId = tuple[int, int]
"""Device and inode."""


@dataclass(frozen=True, slots=True)
class Located:
    """Where a file that QEMU named is. identity: None where it is not there

    problem: why it cannot be used under this path, a sentence; None where it can
    """

    path: Path
    identity: FileId | None
    is_block_device: bool = False
    problem: str | None = None


class QemuFiles:
    """What one QEMU has open, and how it was started. Read once; make a new one to look again.

    pid: None where it is no process of this host
    """

    def __init__(self, pid: int | None) -> None:
        self.pid = pid

    @cached_property
    def started(self) -> int | None:
        """Start time in clock ticks, as in /proc/PID/stat; with the pid it tells a restart."""
        found = identity(self.pid) if self.pid is not None else None
        return None if found is None else found[1]

    @cached_property
    def argv(self) -> tuple[str, ...] | None:
        """Its command line; None where it cannot be read."""
        if self.pid is None:
            return None
        with suppress(OSError), Path(f"/proc/{self.pid}/cmdline").open("rb") as file:
            words = file.read(_LONGEST_COMMAND_LINE).removesuffix(b"\0").split(b"\0")
            return tuple(os.fsdecode(word) for word in words) if words != [b""] else None
        return None

    @cached_property
    def directory(self) -> Path | None:
        """Its working directory; None where it cannot be read."""
        if self.pid is not None:
            with suppress(OSError):
                return Path(f"/proc/{self.pid}/cwd").readlink()
        return None

    @cached_property
    def open_files(self) -> dict[FileId, str] | None:
        """The files and block devices that it has open, each with the kernel's name for it now.

        None where that cannot be read. A block device counts by its number, (0, number): nodes of it are many.
        """
        if self.pid is None:
            return None
        found: dict[FileId, str] = {}
        try:
            for each in Path(f"/proc/{self.pid}/fd").iterdir():
                with suppress(OSError):
                    status = each.stat()
                    if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
                        found[_identity(status)] = str(each.readlink())
        except OSError:
            return None
        return found

    def absolute(self, name: str) -> Path | None:
        """A name that QEMU was given, as an absolute path; None where its directory is not known."""
        path = Path(name)
        if path.is_absolute():
            return path
        return self.directory / path if self.directory is not None else None

    def locate(self, name: str) -> Located:
        """The file that QEMU has open under a name, if it is still there under it."""
        if name.startswith("/dev/fdset/"):
            return Located(Path(name), None, problem="QEMU got it as an open descriptor, without a path")
        path = self.absolute(name)
        if path is None:
            return Located(Path(name), None, problem="its path is relative, and QEMU's directory cannot be read")
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return Located(path, None, problem=self._where_it_went(path))
        except (OSError, ValueError) as error:
            words = (getattr(error, "strerror", None) or str(error)).lower()
            return Located(path, None, problem=f"it cannot be looked at: {words}")
        is_device, identity = stat.S_ISBLK(status.st_mode), (status.st_dev, status.st_ino)
        problem = None
        if self.open_files is not None and _identity(status) not in self.open_files:
            problem = "another file has this path now; QEMU has the one open that was there before"
        return Located(path, identity, is_device, problem)

    def _where_it_went(self, path: Path) -> str:
        """By the kernel's names of its descriptors: that of a removed file ends in (deleted)."""
        names = set((self.open_files or {}).values())
        if f"{path}{_REMOVED}" in names:
            return "it was deleted; QEMU still has it open"
        return "it is no longer at this path; QEMU still has it open: move it back"


def _identity(status: os.stat_result) -> FileId:
    return (0, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def with_thread(thread: int, *, peer: int | None) -> int | None:
    """The QEMU process with a virtual CPU in a thread: the one at the other end of its socket, if it has that thread.

    thread: its number, as QEMU itself sees it. Behind a proxy the peer is another process; then it is the one that
    the number names here, if the same user runs it.
    """
    if peer is None:
        return None
    if any(_number_inside(each) == thread for each in _threads(peer)):
        return peer
    owner = _status(Path(f"/proc/{thread}"))
    if owner is None or owner.get("Uid") != (_status(Path(f"/proc/{peer}")) or {}).get("Uid"):
        return None
    with suppress(ValueError, KeyError):
        return int(owner["Tgid"])
    return None


def _threads(pid: int) -> list[Path]:
    with suppress(OSError):
        return list(Path(f"/proc/{pid}/task").iterdir())
    return []


def _number_inside(thread: Path) -> int | None:
    """Its number in its own pid namespace."""
    with suppress(ValueError, KeyError):
        return int((_status(thread) or {})["NSpid"].split()[-1])
    return None


def _status(process: Path) -> dict[str, str] | None:
    with suppress(OSError):
        rows = (process / "status").read_text(encoding="utf-8", errors="replace").splitlines()
        return {name: value.strip() for name, _, value in (row.partition(":") for row in rows)}
    return None


def drive_options(argv: tuple[str, ...] | None, wanted: set[str]) -> dict[str, str]:
    """aio and discard of the `-drive` or `-blockdev` options that mention one of the node names or paths `wanted`.

    QMP does not tell them. "discard" is always there, as QEMU's default where an option was found; {} for none.
    """
    found: dict[str, str] = {}
    words = argv or ()
    for option, text in itertools.pairwise(words):
        if option.lstrip("-") not in {"drive", "blockdev"}:
            continue
        _, known = fields(text)
        if wanted.isdisjoint(known.values()):
            continue
        found.setdefault("discard", "ignore")
        for name, value in known.items():
            key = name.rpartition(".")[2]
            if (key == "aio" and value in {"threads", "native", "io_uring"}) or (key == "discard" and value != "off"):
                found[key] = "unmap" if key == "discard" and value in {"on", "unmap"} else value
    return found
