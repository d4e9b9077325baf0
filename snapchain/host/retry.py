"""Try again after a connection was lost, for a bounded time, with a growing pause.

    result = retry(transfer, policy=RetryPolicy(), progress=lambda: durable, on_retry=notice)

An attempt that resumes where the last one stopped can simply be called again. The time limit counts from the last
attempt that made progress: a long transfer over a bad link continues as long as it progresses, and a host that stays
away is given up early. Only Unavailable is retried, except where a file or disk at one end failed (`Lasting`): a
refused login, a diverged chain or a full disk would fail again. After a first Unavailable, Busy is retried too: our
own last attempt may still hold the lock over there, until its end notices the lost connection.
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
"""Seconds. Less is not worth a pause: a coarse clock may not even advance."""


class Lasting(Unavailable):
    """A file or disk at one end has failed, not the link: another attempt would fail in the same way."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
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
    """An attempt failed, and the next one follows after a pause. failures: in a row; pause, left: seconds."""

    error: Unavailable | Busy
    failures: int
    pause: float
    left: float

    def __str__(self) -> str:
        return f"{self.error}; trying again in {self.pause:.0f} s, for {self.left:.0f} s at most"


def retry(
    attempt: Callable[[], Result],
    *,
    policy: RetryPolicy,
    progress: Callable[[], int],
    on_retry: Callable[[Retry], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Result:
    """The result of `attempt`, which is called until it returns.

    progress: a count that grows when an attempt achieves something, such as durable bytes at the other end. Bytes sent
        do not count: a link may lose the same ones again and again.
    on_retry: called before each pause
    Raises the last error when nothing has progressed for `give_up_after` seconds.
    """
    failures, seen, since, lost = 0, progress(), clock(), False
    while True:
        started = clock()
        try:
            return attempt()
        except (Unavailable, Busy) as error:
            if _lasts(error) or (isinstance(error, Busy) and not lost):
                raise
            lost = True
            now, count = clock(), progress()
            if count != seen:
                # When it progressed was not recorded; the end of the attempt is the latest possible moment.
                failures, seen, since = 0, count, now
            failures += 1
            left = policy.give_up_after - (now - since)
            if left < _INSTANT:
                raise
            pause = min(policy.pause(failures), left)
            if now - started >= policy.longest:
                pause = min(pause, policy.first)  # the attempt itself has already taken that long
            on_retry(Retry(error, failures, pause, left))
            sleep(pause)


def _lasts(error: Unavailable | Busy) -> bool:
    """An error about a local file has its path as the subject; an error about the link names the peer."""
    is_file = error.subject is not None and error.subject.startswith("/")
    return isinstance(error, Lasting) or (is_file and not isinstance(error, Busy))
