"""A clock that jumps: who sleeps an hour wakes at once, and an hour has passed. Nothing here really waits.

To be installed before snapchain is imported, since some of its functions have `time.sleep` as a default.
"""

from __future__ import annotations

import time

_sleep, _monotonic, _gettime = time.sleep, time.monotonic, time.clock_gettime
LONGEST = 0.002
"""Seconds that a sleep takes at most, so that other threads get on."""

_passed = 0.0


def install() -> None:
    """Replace the functions of `time` that snapchain uses to wait."""
    time.sleep = sleep  # type: ignore[assignment]
    time.monotonic = monotonic
    time.clock_gettime = clock_gettime


def sleep(seconds: float) -> None:
    global _passed  # noqa: PLW0603 -- it is the clock of this process
    really = min(max(0.0, seconds), LONGEST)
    _sleep(really)
    _passed += max(0.0, seconds - really)


def monotonic() -> float:
    return _monotonic() + _passed


def clock_gettime(clock: int) -> float:
    jumped = clock in (time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME)
    return _gettime(clock) + (_passed if jumped else 0.0)
