"""The priority of what a paused guest waits for, and of what must live when memory runs out, where it is allowed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_URGENT = -15
"""A nice value: before all that does not ask for more, and no real-time priority."""
_SWITCH_SECONDS = 0.0005
"""After which one of our threads must let another one run: Python's 0.005 s add up where each answer of QEMU's comes
through another thread.
"""


@contextmanager
def urgent() -> Iterator[None]:
    """A block in which all threads of this process run before others; those that are started in it, too.

    Without the right to that, nothing changes. A program that is started in it inherits the priority.
    """
    before: dict[int, int] = {}
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(min(interval, _SWITCH_SECONDS))
        for thread in _threads():
            with suppress(OSError):  # it has ended, or this is not root
                found = os.getpriority(os.PRIO_PROCESS, thread)
                os.setpriority(os.PRIO_PROCESS, thread, _URGENT)
                before[thread] = found
        yield
    finally:
        sys.setswitchinterval(interval)
        usual = before.get(os.getpid())
        for thread in _threads() if usual is not None else ():
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread, before.get(thread, usual or 0))


def _threads() -> list[int]:
    """Linux has a nice value for each."""
    return [int(each.name) for each in Path("/proc/self/task").iterdir()]


def spare_from_memory_shortage() -> None:
    """Only root may: when memory runs out, the kernel ends others first."""
    with suppress(OSError):
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        try:
            os.write(fd, b"-900")
        finally:
            os.close(fd)
