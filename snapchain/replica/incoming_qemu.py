"""The QEMU that awaits a guest on this host: the command that starts it, its monitor, its log, and its end."""

from __future__ import annotations

import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from snapchain.errors import Conflict, NotFound, SnapchainError, Unavailable
from snapchain.guest.qmp import Monitor
from snapchain.host import files
from snapchain.host.process_identity import Identity, boot_id, still_runs

_START_SECONDS = 60.0
_END_SECONDS = 30.0
_POLL_SECONDS = 0.02
LOG, NBD, RAM = "qemu.log", "snapchain.nbd", "snapchain.ram"
_LOG_SHOWN = 2000


def program_of(argv: tuple[str, ...], directory: str | None) -> list[str]:
    """The command with whole paths. directory: where it is started, if that is a directory here."""
    program = argv[0] if argv[0].startswith("/") and Path(argv[0]).exists() else shutil.which(Path(argv[0]).name)
    env = shutil.which("env")
    if program is None or env is None:
        raise NotFound("there is no such program on this host", subject=argv[0], hint="install it, or name another one")
    place = directory if directory is not None and Path(directory).is_dir() else "/"
    return [env, "-C", place, program, *argv[1:]]


def wait_for_monitor(qmp: Path, process: Identity | None, *, log: Path) -> Monitor:
    """Connect to a QEMU that was just started. Raises Conflict where it has ended, and as `Monitor` after a minute."""
    until = time.monotonic() + _START_SECONDS
    while True:
        try:
            return Monitor(qmp)
        except (NotFound, Unavailable) as error:
            if process is not None and not is_alive(process):
                said = _end_of(log)
                raise Conflict(
                    f"the QEMU for the guest ended at its start: {said}",
                    subject=qmp,
                    hint="this host must have the same machine types, CPUs and files that the command line names",
                ) from error
            if time.monotonic() >= until:
                raise
        time.sleep(_POLL_SECONDS)


def is_alive(process: Identity | None, *, boot: str | None = None) -> bool:
    """Whether it runs still. boot: of the host when it was started, if not this one"""
    if process is None:
        return False
    with suppress(ChildProcessError, OSError):  # a child of ours that has ended
        os.waitpid(process[0], os.WNOHANG)
    return still_runs(process, boot=boot_id() if boot is None else boot)


def kill(process: Identity | None) -> None:
    """End it, and wait until it has ended. Raises Unavailable."""
    if process is None or not is_alive(process):
        return
    with suppress(ProcessLookupError):
        os.kill(process[0], signal.SIGKILL)
    until = time.monotonic() + _END_SECONDS
    while is_alive(process):
        if time.monotonic() >= until:
            raise Unavailable("the QEMU of the guest does not end", subject=f"process {process[0]}")
        time.sleep(_POLL_SECONDS)


def _end_of(log: Path) -> str:
    with suppress(SnapchainError):
        lines = files.read_small(log, cap=1 << 24).decode(errors="replace").split("\n")
        return " ".join(line.strip() for line in lines[-5:] if line.strip())[-_LOG_SHOWN:] or "it said nothing"
    return "it said nothing"


def cpu_digest() -> str:
    """Of the processor's model and features: equal on two hosts that a guest with the host's CPU can move between."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        wanted = sorted({line for line in text.splitlines() if line.startswith(("model name", "flags", "Features"))})
        return blake3("\n".join(wanted).encode()).hexdigest()[:32]
    return ""
