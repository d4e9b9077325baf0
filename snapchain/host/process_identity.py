"""Processes that a later run can tell from others: a pid is given again, a pid with its start time is not."""

from __future__ import annotations

import os
from pathlib import Path

Identity = tuple[int, int]
"""(pid, start time in clock ticks since the boot, as in /proc/PID/stat)"""


def boot_id() -> str:
    """Changes with each boot of this host; '' where the kernel does not tell it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def identity(pid: int) -> Identity | None:
    """Of a process that runs; None for one that ended, also while its parent has not collected it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else (pid, int(fields[18]))


def own_identity() -> Identity:
    """Of this process."""
    found = identity(os.getpid())
    assert found is not None
    return found


def still_runs(process: Identity, *, boot: str) -> bool:
    """Whether a process that was noted in this or an earlier boot still runs."""
    return boot == boot_id() and identity(process[0]) == process
