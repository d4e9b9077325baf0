"""Starting a guest that was taken over: a domain of libvirt, or the script with QEMU's command line."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from snapchain.errors import ToolFailed
from snapchain.host.detached import start_program
from snapchain.host.files import read_small
from snapchain.host.openers import OpenFiles
from snapchain.host.virsh import Virsh

_SECONDS = 60.0
_POLL_SECONDS = 0.05
_SHELL = "/bin/sh"


def start_domain(name: str, *, connect: str | None) -> None:
    """Start a domain unless it runs. Raises ToolFailed with libvirt's words."""
    virsh = Virsh(connect)
    if name not in virsh.names("list", "--name"):
        virsh.text("start", "--domain", name)


def is_running(images: Sequence[Path]) -> bool:
    """Whether a program has one of the images open for writing: nobody else may than the guest."""
    return len(_unopened(images)) < len(images)


def _unopened(images: Sequence[Path]) -> list[Path]:
    """The images that no program has open for writing. No lock is taken: a QEMU that starts now would fail by it."""
    there = OpenFiles()
    return [image for image in images if not any(opener.writing for opener in there.openers(image.stat()))]


def start_script(script: Path, images: Sequence[Path]) -> int:
    """Start QEMU by its script, and wait until it has opened all images; its pid.

    It goes on when snapchain ends. Raises ToolFailed with QEMU's words where it ends before that.
    """
    log = script.with_suffix(".log")
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    pid = start_program([_SHELL, str(script)], log=log, environment={**environment, "LC_ALL": "C"})
    until = time.monotonic() + _SECONDS
    waiting = list(images)
    while waiting:
        waiting = _unopened(waiting)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None:
            os.waitpid(pid, 0)
            said = read_small(log, cap=1 << 20).decode(errors="replace").strip().splitlines()
            raise ToolFailed(
                f"QEMU did not start: {' '.join(said[-3:]) or 'it said nothing'}",
                argv=[_SHELL, str(script)],
                status=ended.si_status,
                stderr="\n".join(said[-20:]),
                subject=script,
                hint=f"change the command line in {script}, then run it; the guest is this host's",
            )
        if waiting and time.monotonic() > until:
            raise ToolFailed(
                f"QEMU has not opened its disks within {_SECONDS:.0f} seconds",
                argv=[_SHELL, str(script)],
                status=0,
                stderr="",
                subject=script,
                hint=f"see {log}",
            )
        time.sleep(_POLL_SECONDS)
    return pid
