"""The fingerprint (model/fingerprint.py) of an open file, taken when no write can hide behind its mtime."""

from __future__ import annotations

import os
import time

from snapchain.model.fingerprint import SECOND_NS, Fingerprint

_TICK = 20_000_000
"""Nanoseconds. The kernel stamps files by a clock that steps every 1 to 10 ms."""


def fingerprint_of(status: os.stat_result) -> Fingerprint:
    """From a stat of the open file."""
    return Fingerprint(
        inode=status.st_ino, size=status.st_size, mtime_ns=status.st_mtime_ns, ctime_ns=status.st_ctime_ns
    )


def settle(fd: int) -> Fingerprint:
    """The fingerprint of an open file, once no write can hide behind its mtime; sleeps at most a second."""
    found = fingerprint_of(os.fstat(fd))
    window = SECOND_NS if found.is_coarse else _TICK
    age = time.time_ns() - found.mtime_ns
    # An mtime well in the future needs no wait: a write would set it back to now.
    if -_TICK < age < window:
        time.sleep((window - max(age, 0)) / SECOND_NS)
        found = fingerprint_of(os.fstat(fd))
    return found
