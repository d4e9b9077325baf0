"""Wait until a descriptor can be read: of a pipe, a socket, or a process that has ended.

By poll(2): select(2) takes no descriptor from 1024 on, and a command with many destinations has that many.
"""

from __future__ import annotations

import select
from typing import Protocol


class HasFileno(Protocol):
    """Such as a socket."""

    def fileno(self) -> int:
        """Its descriptor."""
        ...


def is_readable(what: int | HasFileno, seconds: float | None) -> bool:
    """Whether it can be read, or has ended, within so many seconds; None waits as long as it takes."""
    waiting = select.poll()
    waiting.register(what, select.POLLIN)
    return bool(waiting.poll(None if seconds is None else seconds * 1000))
