"""Go on after a connection was lost: again and again, for a bounded time, telling each time.

    result = persist(transfer, policy=Persistence(), moved=lambda: durable, told=notice)

A transfer that resumes where it stopped may simply be called again.  How long it pays to do so depends on whether it
gets anywhere: time counts from the last moment at which an attempt had moved something, so a long transfer over a bad
link goes on for as long as it moves, and a host that stays away is given up in good time.  Only Unavailable is tried
again; a refused login or a diverged chain will not go away by asking once more, nor will what a file here or over
there fails by, such as a full disk (`Lasting`).  After it, Busy is too: who holds the disk over there may be our own
last attempt, which has not noticed yet that nobody is at the other end.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from snapchain.errors import Busy, Unavailable

Result = TypeVar("Result")
_INSTANT = 0.01
"""Seconds that are not worth waiting: a clock may stand still for less."""


class Lasting(Unavailable):
    """Not the link has failed, but a file or disk at one of its ends: another connection finds the same."""


@dataclass(frozen=True, slots=True)
class Persistence:
    """give_up_after: seconds without progress.

    The pause after n failures in a row is drawn between half and all of `first * 2**(n - 1)`, at most `longest`.
    """

    give_up_after: float = 300.0
    first: float = 1.0
    longest: float = 30.0

    def pause(self, failures: int) -> float:
        """Seconds to wait after that many failures in a row (from 1)."""
        whole = min(self.longest, self.first * 2.0 ** min(failures - 1, 60))
        return whole * random.uniform(0.5, 1.0)  # noqa: S311


@dataclass(frozen=True, slots=True)
class Retry:
    """What is told before each pause. failures: in a row; pause, left: seconds."""

    error: Unavailable | Busy
    failures: int
    pause: float
    left: float

    def __str__(self) -> str:
        return f"{self.error}; trying again in {self.pause:.0f} s, for {self.left:.0f} s at most"


def persist(
    attempt: Callable[[], Result],
    *,
    policy: Persistence,
    moved: Callable[[], int],
    told: Callable[[Retry], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Result:
    """Call `attempt` until it returns; raise its last error when nothing has moved for `give_up_after` seconds.

    moved: a count that grows as long as attempts get anywhere, such as durable bytes over there; not bytes sent,
    which a link may swallow again and again
    """
    failures, seen, since, lost = 0, moved(), clock(), False
    while True:
        started = clock()
        try:
            return attempt()
        except (Unavailable, Busy) as error:
            if _lasts(error) or (isinstance(error, Busy) and not lost):
                raise
            lost = True
            now, count = clock(), moved()
            if count != seen:
                # It got somewhere, at a moment that nobody noted; its end is what is known.
                failures, seen, since = 0, count, now
            failures += 1
            left = policy.give_up_after - (now - since)
            if left < _INSTANT:
                raise
            pause = min(policy.pause(failures), left)
            if now - started >= policy.longest:
                pause = min(pause, policy.first)  # the attempt itself has waited long enough
            told(Retry(error, failures, pause, left))
            sleep(pause)


def _lasts(error: Unavailable | Busy) -> bool:
    """A file here that fails is named by its path, and a link by who is at its other end."""
    is_file = error.subject is not None and error.subject.startswith("/")
    return isinstance(error, Lasting) or (is_file and not isinstance(error, Busy))
