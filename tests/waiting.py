"""Waiting for an event that is certain to come, however busy the machine is."""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

HANG = 120.0
"""Seconds after which a wait has failed; nothing takes a tenth of it on an idle machine.

A program that a test must see killed sleeps much longer.
"""


def wait_until(condition: Callable[[], object], *, alive: Callable[[], object] | None = None) -> bool:
    """Return True when `condition` holds.

    alive: what must hold until then, such as that a child runs; a condition that comes true last still counts

    Raises: AssertionError after HANG seconds, or when `alive` no longer holds
    """
    end = time.monotonic() + HANG
    while True:
        living = alive is None or alive()
        if condition():
            return True
        assert living, "the event can no longer happen"
        assert time.monotonic() < end, "the event did not happen"
        time.sleep(0.005)


def taken(root: Path) -> list[int]:
    """The bytes that each file below takes on its disk, while others make files there and remove them."""
    found = []
    for path in root.rglob("*"):
        with suppress(FileNotFoundError):  # between its name and its size
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                found.append(status.st_blocks * 512)
    return found


def started_with(mark: Path) -> list[Path]:
    """The living processes that were given this path in an environment variable."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            if f"={mark}".encode() in (process / "environ").read_bytes():
                found.append(process)
    return found


def stuck(*threads: threading.Thread) -> bool:
    """Whether each was at the same instruction for 20 looks, as a thread is that waits for another one."""

    def places() -> list[tuple[int, int] | None]:
        frames = [sys._current_frames().get(thread.ident or 0) for thread in threads]
        return [(id(frame), frame.f_lasti) if frame else None for frame in frames]

    first = places()
    for _ in range(20):
        if places() != first:
            return False
        time.sleep(0.005)
    return True


def kill_process(pid: int) -> None:
    """Kill a process that may have ended by itself since it was seen, and wait until it has closed its files."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    assert _ended(pid, HANG), f"process {pid} does not end"


def gone(pid: int) -> bool:
    """Whether there is no such process, or only its zombie."""
    return _ended(pid, 0)


def _ended(pid: int, seconds: float) -> bool:
    """Whether no thread of a process is left within so many seconds.

    /proc tells it too early: the command line is empty while files are still open, and where the first thread is a
    zombie others may live.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        ended = select.poll()
        ended.register(fd, select.POLLIN)
        return bool(ended.poll(seconds * 1000))
    finally:
        os.close(fd)
