"""Which running kernel this is, and whether a process of it is the one that once was."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def machine() -> str:
    """Names this boot of this kernel and the process numbers seen from here; "" where the kernel does not tell.

    A host name would not do: two containers may share it, and each has its own process 7.
    """
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def started(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 when there is none of this number. See proc(5), stat 22."""
    with suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return int(text.rpartition(")")[2].split()[19])
    return 0
