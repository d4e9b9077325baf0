"""How fast the block jobs of a live merge go: as fast as can be, at a fixed limit, or as the guest's latency allows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from snapchain.guest.jobs import OnLook
from snapchain.guest.protocol import Guest, Job, JobProgress
from snapchain.model.pacing import CEILING, FLOOR, Work, next_speed

BASELINE_SECONDS = 2.0
"""For how long the guest is watched before a merge that shall not be felt."""
_EVERY = 1.0
"""Seconds between two changes of the speed."""


def _wait(seconds: float) -> None:
    threading.Event().wait(seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """limit: bytes a second, 0 for none; idle: stay below what the guest feels

    clock, wait: of the host; tests have others
    """

    limit: int = 0
    idle: bool = False
    clock: Callable[[], float] = time.monotonic
    wait: Callable[[float], None] = _wait

    @property
    def first_speed(self) -> int:
        """To begin a job with."""
        return min(FLOOR, self.limit or FLOOR) if self.idle else self.limit

    def begin(self, guest: Guest, disk: str) -> OnLook:
        """Watch the guest before a job; what to do at each look at the job. Raises as `statistics`."""
        if not self.idle:
            return lambda _job, _now: None
        before = _work(guest, disk)
        self.wait(BASELINE_SECONDS)
        return _Controller(self, guest, disk, _work(guest, disk).since(before).latency).look


class _Controller:
    def __init__(self, pace: Pace, guest: Guest, disk: str, baseline: float | None) -> None:
        self._pace, self._guest, self._disk, self._baseline = pace, guest, disk, baseline
        self._speed = pace.first_speed
        self._seen = _work(guest, disk)
        self._at = pace.clock()

    def look(self, job: Job, _now: JobProgress) -> None:
        now = self._pace.clock()
        if now - self._at < _EVERY:
            return
        work = _work(self._guest, self._disk)
        latency = work.since(self._seen).latency
        self._seen, self._at = work, now
        if latency is not None:
            # A guest that did nothing before is measured by its best since.
            self._baseline = latency if self._baseline is None else min(self._baseline, latency)
        ceiling = self._pace.limit or CEILING
        speed = next_speed(self._speed, latency, baseline=self._baseline, floor=min(FLOOR, ceiling), ceiling=ceiling)
        if speed != self._speed:
            job.set_speed(speed)
            self._speed = speed


def _work(guest: Guest, disk: str) -> Work:
    found = guest.statistics(disk)
    return Work(found.reads + found.writes + found.flushes, found.read_ns + found.write_ns + found.flush_ns)
