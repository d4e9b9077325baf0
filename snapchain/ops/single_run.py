"""One run at a time: a lock on a file that is never replaced, gone with its holder."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from snapchain.errors import Busy
from snapchain.host.files import open_or_make
from snapchain.host.os_errors import os_errors

_POLL_SECONDS = 0.5


@contextmanager
def only_run(path: Path, *, wait: float, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Held for the length of the block. wait: seconds to wait for another run, then Busy.

    The file keeps who holds it, for people; what counts is the lock, which the kernel drops with the process.
    """
    fd = open_or_make(path)
    try:
        _take(fd, path, wait=wait, on_wait=on_wait)
        with suppress(OSError):  # for people only: a full disk must not end the run before it has begun
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {os.getpid()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC".encode(), 0)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # closing would not do while a child forked just now has a copy
        os.close(fd)


def _take(fd: int, path: Path, *, wait: float, on_wait: Callable[[str], None]) -> None:
    deadline = time.monotonic() + wait
    told = False
    while True:
        try:
            with os_errors(path):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except Exception as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
        else:
            return
        who = os.pread(fd, 200, 0).decode("utf-8", "replace")
        left = deadline - time.monotonic()
        if left <= 0:
            raise Busy(
                f"another run is at work ({who})", subject=path.parent, hint="let it end, or wait for it with --wait 2h"
            )
        if not told:
            on_wait(f"waiting for another run ({who})")
            told = True
        time.sleep(min(_POLL_SECONDS, left))
