"""Whether a file still holds the bytes that were read from it, told without reading them again.

Equal inode, size and mtime mean equal content: writers move the mtime.  Two cases lie, and both are covered:

- a whole-second mtime (a coarse clock, or a time that a copy or a restore has set): ctime must be equal too;
- a write in the same tick of the clock as the stat: `settle` waits until the mtime is older than a tick.

ctime alone would be too strict: libvirt chowns backing files at every start.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

_SECOND = 1_000_000_000
_TICK = 20_000_000
"""The kernel stamps files by a clock that steps every 1 to 10 ms."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """inode, size in bytes (as stat says; 0 for block devices), mtime and ctime in nanoseconds."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @staticmethod
    def of(status: os.stat_result) -> Fingerprint:
        """From a stat of the open file."""
        return Fingerprint(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def coarse(self) -> bool:
        """The mtime is a whole second, so it says less."""
        return self.mtime_ns % _SECOND == 0

    def same_content_as(self, other: Fingerprint) -> bool:
        """No write happened between the two stats of one file."""
        same = (self.inode, self.size, self.mtime_ns) == (other.inode, other.size, other.mtime_ns)
        return same and (not self.coarse or self.ctime_ns == other.ctime_ns)


def settle(fd: int) -> Fingerprint:
    """The fingerprint of an open file, once no write can hide behind its mtime; sleeps at most a second."""
    found = Fingerprint.of(os.fstat(fd))
    window = _SECOND if found.coarse else _TICK
    age = time.time_ns() - found.mtime_ns
    # An mtime well in the future needs no wait: a write would set it back to now.
    if -_TICK < age < window:
        time.sleep((window - max(age, 0)) / _SECOND)
        found = Fingerprint.of(os.fstat(fd))
    return found
