"""What a run does in which order, and when it stops beginning: pure decisions.

order     disks that the last runs did not reach come first, then by how long ago they were
Limits    nothing is begun after the window or the time has gone; a budget ends the kind of work that it is for
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TypeVar

from snapchain.model.retention import is_future
from snapchain.ops.nightly.values import Window

D = TypeVar("D")

_NEVER = datetime.min.replace(tzinfo=UTC)


def order(
    disks: Sequence[D], name: Callable[[D], str], reached: Mapping[str, datetime], *, now: datetime | None = None
) -> list[D]:
    """The disks as a run takes them. reached: when each last had its turn, well or ill; not for new ones.

    A turn later than the clock `now` counts as none: a run with a wrong clock would else put the disk last for years.
    Equal times leave them as they are configured: sorting is stable.
    """
    past = {each: turn for each, turn in reached.items() if now is None or not is_future(turn, now)}
    return sorted(disks, key=lambda disk: past.get(name(disk), _NEVER))


class CutOffError(Exception):
    """No more work is begun; the text says why. Never leaves the runner."""


class Limits:
    """When to stop beginning new work, asked before each step; thread-safe.

    closes: end of the window or of the time, UTC; None: no end. Budgets in bytes, None: no limit.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], datetime],
        closes: datetime | None,
        why: str,
        ship: int | None = None,
        merge: int | None = None,
    ) -> None:
        self._clock, self._closes, self._why = clock, closes, why
        self._left = {"ship": ship, "merge": merge}
        self._began: set[str] = set()
        self._lock = threading.Lock()

    @property
    def closes(self) -> datetime | None:
        """The end, UTC."""
        return self._closes

    def check(self) -> None:
        """Raises CutOffError once no more work is to be begun."""
        if self._closes is not None and self._clock() >= self._closes:
            raise CutOffError(self._why)

    def left(self, kind: str) -> int | None:
        """Bytes of the budget that no piece of work has taken; None: no limit."""
        return self._left[kind]

    def has_begun(self, kind: str) -> bool:
        """Whether some piece of work has taken of it."""
        return kind in self._began

    def take(self, kind: str, count: int) -> None:
        """Bytes that a piece of work will use. Raises CutOffError when they are more than is left.

        The first piece of a run always goes: what is larger than a whole budget would else never be done.
        """
        with self._lock:
            left = self._left[kind]
            if left is not None and count:
                if count > left and kind in self._began:
                    raise CutOffError(f"the budget of bytes to {kind} has {left} left, and this needs {count}")
                self._left[kind] = max(left - count, 0)
            if count:
                self._began.add(kind)


def limits_of(
    *,
    now: datetime,
    clock: Callable[[], datetime],
    window: Window | None,
    zone: tzinfo,
    seconds: float | None,
    ship: int | None,
    merge: int | None,
) -> Limits:
    """The limits of a run that starts `now`; outside of its window it is over at once."""
    ends: list[tuple[datetime, str]] = []
    if window is not None:
        closes = window.closes(now, zone)
        ends.append(
            (now, f"outside of the window {window}") if closes is None else (closes, f"the window {window} is over")
        )
    if seconds is not None:
        ends.append((now + timedelta(seconds=seconds), f"the time of {seconds:g} seconds is over"))
    closes_at, why = min(ends, default=(None, ""))
    return Limits(clock=clock, closes=closes_at, why=why, ship=ship, merge=merge)
