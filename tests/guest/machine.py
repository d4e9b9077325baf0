"""A real QEMU without an operating system, in a third of a second: its monitor's `qemu-io` is the guest that writes.

    with Machine(tmp_path, disks={"vda": chain}) as machine:
        machine.write("vda", 0, 65536, 7)          as the guest would
        machine.qmp                                 the socket that is snapchain's

The test has a monitor of its own (`machine.ask`), so it never shares snapchain's.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.servers import DIE_WITH_PARENT
from tests.waiting import HANG, wait_until

QEMU = tuple(os.environ.get("TEST_QEMU", "qemu-system-x86_64").split())
"""`make soak` runs these tests once more with QEMU 10 (.ci/qemu10)."""


class Monitor:
    """A QMP connection, of the test. patience: seconds for an answer; a short one raises OSError for no QEMU, too"""

    def __init__(self, path: Path, *, patience: float = 120) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(patience)
        self._lines = self._socket.makefile("rb")
        self.events: list[dict[str, Any]] = []
        try:
            if patience < HANG:
                self._socket.connect(str(path))
            else:
                wait_until(lambda: self._connected(path))
            json.loads(self._lines.readline())
            self.ask("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def _connected(self, path: Path) -> bool:
        """QEMU makes the name of a socket first, and listens a moment later."""
        try:
            self._socket.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True

    def ask(self, command: str, **arguments: object) -> Any:
        """The return value of a command; an AssertionError with QEMU's words when it is refused."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            line = self._lines.readline()
            assert line, f"QEMU went away at {command}"
            answer = json.loads(line)
            if "event" in answer:
                self.events.append(answer)
                continue
            assert "error" not in answer, f"{command}: {answer['error']['desc']}"
            return answer["return"]

    def quit(self) -> None:
        """End QEMU as an operator does, until it has gone, and close this."""
        self._socket.sendall(b'{"execute": "quit"}\n')
        with suppress(ConnectionResetError):
            while self._lines.readline():
                pass
        self.close()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Machine:
    """disks: device id -> top of its qcow2 chain; blockdevs: whole -blockdev options instead, by device id

    argv: further arguments; drives: `-drive` options as they are (with a device of their own)
    """

    def __init__(
        self,
        folder: Path,
        *,
        disks: Mapping[str, Path] | None = None,
        blockdevs: Mapping[str, Sequence[str]] | None = None,
        argv: Sequence[str] = (),
        name: str | None = "web1",
        qemu: Sequence[str] = QEMU,
        memory: int = 32,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.qmp, self._own = folder, folder / "qmp", folder / "test.qmp"
        for stale in (self.qmp, self._own):
            stale.unlink(missing_ok=True)
        opened = {
            each: [f"driver=qcow2,node-name={each}-top,discard=unmap,file.driver=file,file.filename={path}"]
            for each, path in (disks or {}).items()
        }
        opened.update({each: list(options) for each, options in (blockdevs or {}).items()})
        words = [
            *DIE_WITH_PARENT, *qemu, "-accel", "tcg", "-M", "q35", "-m", str(memory), "-nodefaults", "-display", "none",
            *(["-name", f"guest={name}"] if name else []),
            "-qmp", f"unix:{self.qmp},server=on,wait=off", "-qmp", f"unix:{self._own},server=on,wait=off",
        ]  # fmt: skip
        for each, options in opened.items():
            for option in options:
                words += ["-blockdev", option]
            node = re.search(r"node-name=([^,]+)", options[-1])
            assert node is not None
            words += ["-device", f"virtio-blk-pci,drive={node[1]},id={each}"]
        self.argv = [*words, *argv]
        self._log = (folder / "qemu.log").open("ab")
        self.process = subprocess.Popen(self.argv, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        wait_until(self._listens, alive=lambda: self.process.poll() is None)
        self.monitor = Monitor(self._own)

    def _listens(self) -> bool:
        for path in (self.qmp, self._own):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(str(path))
                except OSError:
                    return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def log(self) -> str:
        """What QEMU said on stderr."""
        return (self.folder / "qemu.log").read_text(errors="replace")

    def ask(self, command: str, **arguments: object) -> Any:
        """A command by the test's own monitor."""
        return self.monitor.ask(command, **arguments)

    def io(self, disk: str, command: str) -> str:
        """A qemu-io command on the device of a disk, as its guest would do it."""
        said = self._command(disk, command)
        assert "failed" not in said.lower(), said
        assert "error" not in said.lower(), said
        return said

    def _command(self, disk: str, command: str) -> str:
        """What qemu-io says. It writes to QEMU's own standard output, and not into the answer."""
        before = (self.folder / "qemu.log").stat().st_size
        line = f'qemu-io -d /machine/peripheral/{disk}/virtio-backend "{command}"'
        answer: str = self.ask("human-monitor-command", **{"command-line": line})
        with (self.folder / "qemu.log").open("rb") as log:
            log.seek(before)
            return answer + log.read().decode(errors="replace")

    def write(self, disk: str, offset: int, length: int, pattern: int) -> None:
        """Bytes of one value, as the guest writes them."""
        self.io(disk, f"write -P {pattern} {offset} {length}")

    def reads(self, disk: str, offset: int, length: int, pattern: int) -> bool:
        """Whether the guest reads that value there."""
        said = self._command(disk, f"read -P {pattern} {offset} {length}")
        assert f"read {length}/{length} bytes" in said, said
        return "Pattern verification failed" not in said

    def status(self) -> str:
        """running, paused, io-error, ..."""
        found: str = self.ask("query-status")["status"]
        return found

    def quit(self) -> None:
        """As an operator ends it: images are closed and flushed."""
        if self.process.poll() is None:
            self.monitor._socket.sendall(b'{"execute": "quit"}\n')
            self.process.wait(HANG)

    def kill(self) -> None:
        """As a crash of QEMU; what it had not flushed is in the kernel's cache all the same."""
        self.monitor.close()
        self.process.kill()
        self.process.wait()
        self._log.close()
