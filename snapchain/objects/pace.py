"""How many requests a server gets at once: fewer when it answers SlowDown, and more again while it does not.

Additive increase, multiplicative decrease, as TCP's: a refusal halves the number of requests that may be under way, and
each round of answers adds one.  Of the requests that were under way together, one refusal counts: the others were sent
at the same pace.  A refused request frees its slot, waits for a random time, and is sent again. The limit of
that time doubles.

All threads of a store share the pace, and a budget of repetitions: each repetition takes one, each answer gives one
back.  So where a server refuses most requests, the command fails before it has repeated each of them in vain.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

ATTEMPTS = 8
"""Of one request. The last wait is up to LONGEST; all together 20 s in the mean."""
FIRST, LONGEST = 0.5, 20.0
"""Seconds: the longest first wait, and the longest of all."""
BUDGET = 100
"""Repetitions in reserve: six rounds of 16 requests."""

Result = TypeVar("Result")


class Pace:
    """The pace of one store. most: requests at once. Thread-safe."""

    def __init__(self, most: int, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._most = most
        self._sleep = sleep
        self._changed = threading.Condition()
        self._allowed = float(most)
        self._running = 0
        self._cuts = 0
        self._budget = BUDGET

    @property
    def allowed(self) -> int:
        """Requests that may be under way at once."""
        return int(self._allowed)

    def ask(self, request: Callable[[], Result], *, is_refusal: Callable[[Exception], bool]) -> Result:
        """What the request returns or raises. It is made when its turn comes, and again after a refusal.

        is_refusal: whether an error says that the server wants fewer requests
        """
        for attempt in range(1, ATTEMPTS + 1):
            cuts = 0
            try:
                with self._turn() as cuts:
                    result = request()
            except Exception as error:
                if not is_refusal(error):
                    raise
                self._refused(cuts)
                if attempt == ATTEMPTS or not self._may_repeat():
                    raise
            else:
                self._answered()
                return result
            self._sleep(random.uniform(0, min(LONGEST, FIRST * 2 ** (attempt - 1))))  # noqa: S311
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def _turn(self) -> Iterator[int]:
        """Wait for a slot, and hold it during the block. Yields how often the pace was halved so far."""
        with self._changed:
            self._changed.wait_for(lambda: self._running < int(self._allowed))
            self._running += 1
            cuts = self._cuts
        try:
            yield cuts
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify()

    def _refused(self, cuts: int) -> None:
        """Halve the pace, unless it was halved since the request was sent. cuts: what `_turn` gave"""
        with self._changed:
            if cuts == self._cuts:
                self._cuts += 1
                self._allowed = max(1.0, self._allowed / 2)

    def _answered(self) -> None:
        with self._changed:
            self._budget = min(BUDGET, self._budget + 1)
            self._allowed = min(float(self._most), self._allowed + 1 / self._allowed)
            self._changed.notify_all()

    def _may_repeat(self) -> bool:
        with self._changed:
            if self._budget < 1:
                return False
            self._budget -= 1
            return True
