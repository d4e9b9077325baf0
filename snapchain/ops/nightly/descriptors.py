"""Bounds the disks at work by file descriptors: a chain of 190 files takes 600 of them.

A disk waits until those before it have released enough.  One whose chain alone needs more than the limit runs when no
other disk does: that may suffice.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from snapchain.image.scan import MAX_DEPTH

_A_FILE = 3
"""Descriptors for a file of a chain: to read it, to lock it, and to look at it again."""
_A_DISK = 32
"""For what is written, the destinations, and programs that are started."""
_OURS = 64
"""For the run itself."""


def needed(chain_length: int | None) -> int:
    """Descriptors for the work on a disk. chain_length: as it was last seen; None for one that was never seen."""
    return _A_FILE * (MAX_DEPTH if chain_length is None else chain_length + 1) + _A_DISK


class Descriptors:
    """The descriptors that are left for disks; thread-safe."""

    def __init__(self, limit: int) -> None:
        """limit: of open files of this process."""
        self._left = limit - _OURS
        self._at_work = 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Wait until `count` are left, or no disk is at work; release them at the end."""
        with self._changed:
            self._changed.wait_for(lambda: count <= self._left or not self._at_work)
            self._left -= count
            self._at_work += 1
        try:
            yield
        finally:
            with self._changed:
                self._left += count
                self._at_work -= 1
                self._changed.notify_all()
