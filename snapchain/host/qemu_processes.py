"""The QEMU processes of this host: which guest each of them is, and how it is reached.

All is read from /proc/PID/cmdline, which anybody may read; which files a process has open, only its user and root.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from snapchain.host.process_identity import identity
from snapchain.host.qemu_options import fields, split
from snapchain.host.terminal import shell_word

_PROC = Path("/proc")
_LIBVIRT_SECRETS = "/master-key.aes"
_AGENT = "org.qemu.guest_agent.0"


@dataclass(frozen=True, slots=True)
class QemuArguments:
    """What a command line of QEMU tells about its guest.

    name, uuid: of the guest, None where it has none; is_libvirt: libvirt started it
    qmp: paths of QMP sockets that QEMU listens on; agent: of the guest agent's
    """

    name: str | None = None
    uuid: str | None = None
    is_libvirt: bool = False
    qmp: tuple[str, ...] = ()
    agent: str | None = None


@dataclass(frozen=True, slots=True)
class QemuProcess:
    """A QEMU that runs. started: as in /proc/PID/stat; directory: from which it was started"""

    pid: int
    started: int
    argv: tuple[str, ...]
    arguments: QemuArguments
    directory: Path | None

    @property
    def qmp(self) -> tuple[Path, ...]:
        """Its QMP sockets as absolute paths."""
        return tuple(self._absolute(each) for each in self.arguments.qmp)

    @property
    def agent(self) -> Path | None:
        """The guest agent's socket as an absolute path."""
        return None if self.arguments.agent is None else self._absolute(self.arguments.agent)

    def _absolute(self, path: str) -> Path:
        return (self.directory or Path("/")) / path

    @property
    def description(self) -> str:
        """Such as `the guest web1 (libvirt)`."""
        name = self.arguments.name
        if self.arguments.is_libvirt and name is not None:
            return f"the guest {name} (libvirt)"
        return f"QEMU (pid {self.pid})" + (f", the guest {name}" if name else "")

    @property
    def option(self) -> str | None:
        """What names it on the command line; None where it has no QMP socket."""
        if self.arguments.is_libvirt and self.arguments.name is not None:
            return f"--domain {shell_word(self.arguments.name)}"
        return f"--qmp {shell_word(self.qmp[0])}" if self.qmp else None


def is_qemu(argv: Sequence[str]) -> bool:
    """Whether a command line is one of QEMU's system emulator."""
    program = Path(argv[0]).name if argv else ""
    return program.startswith(("qemu-system-", "qemu-kvm")) or program == "kvm"


def parse(argv: Sequence[str]) -> QemuArguments:
    """Read a command line. Options that are unknown, or lack their value, are passed over."""
    chardevs: dict[str, str] = {}
    name = uuid = None
    is_libvirt = False
    sockets: list[str] = []
    monitors: list[str] = []
    agent_device: str | None = None
    for option, value in _options(argv):
        if option == "name":
            name = _name(value)
        elif option == "uuid":
            uuid = value.lower()
        elif option == "chardev":
            chardevs |= _listening(value)
        elif option in {"qmp", "qmp-pretty"}:
            if value.startswith("chardev:"):
                monitors.append(value.removeprefix("chardev:"))
            elif value.startswith("unix:") and _listens(value):
                sockets.append(split(value.removeprefix("unix:"))[0])
        elif option == "mon":
            head, known = fields(value)
            if known.get("mode") == "control":
                monitors.append(known.get("chardev", head))
        elif option == "device" and _AGENT in value:
            agent_device = _device_chardev(value)
        elif option == "object" and _LIBVIRT_SECRETS in value:
            is_libvirt = True
    sockets += [chardevs[each] for each in monitors if each in chardevs]
    return QemuArguments(name, uuid, is_libvirt, tuple(dict.fromkeys(sockets)), chardevs.get(agent_device or ""))


def _options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    for at, word in enumerate(argv[1:-1], start=1):
        if word.startswith("-"):
            yield word.lstrip("-"), argv[at + 1]


def _name(value: str) -> str | None:
    head, known = fields(value)
    return known.get("guest", head) or None


def _listens(value: str) -> bool:
    words = split(value)[1:]
    return any(word in {"server", "server=on"} for word in words)


def _listening(value: str) -> dict[str, str]:
    """{id: path} of a character device that listens on a unix socket."""
    head, known = fields(value)
    path, ident = known.get("path"), known.get("id")
    if head != "socket" or not path or not ident or not _listens(value):
        return {}
    return {ident: path}


def _device_chardev(value: str) -> str | None:
    return fields(value)[1].get("chardev")


# --- the processes


def qemu_processes() -> list[QemuProcess]:
    """All that this user can see, in the order of their pids."""
    pids = sorted(int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())
    return [found for pid in pids if (found := qemu_process(pid)) is not None]


def qemu_process(pid: int) -> QemuProcess | None:
    """The QEMU of this pid; None where it is another program, or gone."""
    try:
        data = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return None
    argv = tuple(os.fsdecode(word) for word in data.removesuffix(b"\0").split(b"\0"))
    found = identity(pid) if is_qemu(argv) else None
    if found is None:
        return None
    directory: Path | None = None
    with suppress(OSError):
        directory = (_PROC / str(pid) / "cwd").readlink()
    return QemuProcess(pid, found[1], argv, parse(argv), directory)


def open_images(pid: int) -> dict[tuple[int, int], bool] | None:
    """(device, inode) of each file that a process has open -> whether it may write to it.

    None where this user may not look, or the process is gone.
    """
    found: dict[tuple[int, int], bool] = {}
    try:
        with os.scandir(_PROC / str(pid) / "fd") as descriptors:
            for descriptor in descriptors:
                with suppress(OSError):
                    status = descriptor.stat()
                    flags = (_PROC / str(pid) / "fdinfo" / descriptor.name).read_text()
                    mode = next(int(line.split()[1], 8) for line in flags.splitlines() if line.startswith("flags:"))
                    key = (status.st_dev, status.st_ino)
                    found[key] = found.get(key, False) or mode & os.O_ACCMODE != os.O_RDONLY
    except OSError:
        return None
    return found
