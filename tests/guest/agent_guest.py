"""The small guest with an agent (.ci/agent-guest): a Linux that mounts its ext4 disks, in three seconds.

    with AgentGuest(tmp_path, disks={"vda": formatted(tmp_path / "vda.qcow2")}) as guest:
        guest.sh("echo one >/mnt/vda/file && sync")
        guest.agent                                  the agent's socket, which has one client at a time

Disks come as /dev/vda, /dev/vdb, ... in the order in which they are given, mounted at /mnt/vda, ...
"""

from __future__ import annotations

import re
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.guest.machine import Machine
from tests.waiting import HANG, wait_until

ROOT = Path(__file__).resolve().parents[2]
MADE = ROOT / ".cache" / "agent-guest"


def parts() -> tuple[Path, Path]:
    """(kernel, initrd), made first where they are not there."""
    subprocess.run([ROOT / ".ci" / "agent-guest"], check=True, stdout=subprocess.DEVNULL)
    return MADE / "kernel", MADE / "initrd"


def boot_arguments(words: str = "") -> list[str]:
    """QEMU's arguments that boot it. words: for the kernel's command line: no-agent, hook=fail, hook=hang."""
    kernel, initrd = parts()
    return ["-kernel", str(kernel), "-initrd", str(initrd), "-append", f"console=ttyS0 quiet panic=-1 {words}"]


def formatted(path: Path, *, size: str = "64M", files: Path | None = None) -> Path:
    """A qcow2 image with an ext4 in it. files: a directory whose content it has; empty otherwise"""
    raw = path.with_suffix(".mkfs")
    subprocess.run(["truncate", "-s", size, raw], check=True)
    content = [] if files is None else ["-d", str(files)]
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0", *content, str(raw)], check=True)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    raw.unlink()
    return path


class Console:
    """The shell on a guest's serial port, at a Unix socket on which QEMU listens."""

    def __init__(self) -> None:
        self._said = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(HANG)
        self._number = 0

    def connect(self, path: Path) -> None:
        """As soon as QEMU listens."""

        def connected() -> bool:
            try:
                self._socket.connect(str(path))
            except OSError:
                return False
            return True

        wait_until(connected)

    def read_until(self, words: bytes) -> bytes:
        """What comes before these words."""
        while words not in self._said:
            try:
                piece = self._socket.recv(1 << 16)
            except TimeoutError as error:
                raise AssertionError(f"the guest says no more: {bytes(self._said[-2000:])!r}") from error
            assert piece, f"the guest ended: {bytes(self._said[-2000:])!r}"
            self._said += piece
        before, _, after = bytes(self._said).partition(words)
        self._said = bytearray(after)
        return before

    def sh(self, command: str) -> str:
        """Run a command in the guest's shell; what it printed. A failure of it is the test's."""
        self.begin(command)
        return self.ended()

    def begin(self, command: str) -> None:
        """As `sh`, without waiting for its end."""
        self._number += 1
        line = f"{command}; echo ended-$((0 + {self._number}))-$?-\n"
        self._socket.sendall(line.encode())

    def ended(self) -> str:
        """Wait for the end of what was begun; its output, with the echo of the command."""
        said = self.read_until(f"ended-{self._number}-".encode())
        status = self.read_until(b"-")
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", said.decode(errors="replace")).replace("\r\n", "\n")
        assert status == b"0", text
        return text

    def close(self) -> None:
        self._socket.close()


class AgentGuest(Machine):
    """words: as `boot_arguments` takes them. Returns when the guest is ready for commands."""

    def __init__(
        self,
        folder: Path,
        *,
        disks: Mapping[str, Path] | None = None,
        blockdevs: Mapping[str, Sequence[str]] | None = None,
        argv: Sequence[str] = (),
        name: str | None = "web1",
        words: str = "",
        memory: int = 128,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.agent = folder / "agent"
        console = folder / "console"
        for stale in (self.agent, console):
            stale.unlink(missing_ok=True)
        more = [
            *boot_arguments(words),
            "-chardev", f"socket,id=console,path={console},server=on,wait=on", "-serial", "chardev:console",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,path={self.agent},server=on,wait=off",
            "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
        ]  # fmt: skip
        self.console = Console()
        # QEMU waits for the console's client before it starts, so none of the guest's words are lost.
        listener = threading.Thread(target=self.console.connect, args=(console,))
        listener.start()
        try:
            super().__init__(folder, disks=disks, blockdevs=blockdevs, argv=[*more, *argv], name=name, memory=memory)
        finally:
            listener.join()
        self.console.read_until(b"AGENT GUEST READY")
        self.console.read_until(b"# ")

    def sh(self, command: str) -> str:
        """See `Console`."""
        return self.console.sh(command)

    def begin(self, command: str) -> None:
        """See `Console`."""
        self.console.begin(command)

    def ended(self) -> str:
        """See `Console`."""
        return self.console.ended()

    def kill(self) -> None:
        """As Machine; the console goes, too."""
        self.console.close()
        super().kill()
