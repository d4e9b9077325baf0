"""What a run does in which order, and when it stops beginning: pure decisions.

order     disks that the last runs did not reach come first, then by how long ago they were
Limits    nothing is begun after the window or the time has gone; a budget ends the kind of work that it is for
to_merge  which local layers become one
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TypeVar

from snapchain.model.economics import Into, RangeGains
from snapchain.ops.nightly.window import Window

D = TypeVar("D")

_NEVER = datetime.min.replace(tzinfo=UTC)


def order(disks: Sequence[D], name: Callable[[D], str], reached: Mapping[str, datetime]) -> list[D]:
    """The disks as a run takes them. reached: when each was last worked on to its end, well or ill; not for new ones.

    Equal times leave them as they are configured: sorting is stable.
    """
    return sorted(disks, key=lambda disk: reached.get(name(disk), _NEVER))


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


@dataclass(frozen=True, slots=True)
class MergeRange:
    """Local layers `first` to `last`, both included, counted from the root, are to become one."""

    first: int
    last: int


def to_merge(
    *,
    count: int,
    cap: int,
    present: Collection[int],
    held: Collection[int],
    gains: RangeGains,
) -> MergeRange | str:
    """Which sealed layers bring a local chain down to its cap; else why none do.

    count: files of the chain, root and top included; present: for each destination how many files, from the root on,
    it holds; held: places that stay as they are.

    Never merged: the root, the top, what some destination lacks, the newest layer that a destination shares with this
    chain (the next shipment builds on it), what is held.  Of all ranges that suffice, the one that costs least: bytes
    moved less bytes freed.
    """
    if count <= cap:
        return f"{count} files are no more than {cap}"
    common = {there - 1 for there in present}
    free = [place for place in range(1, min([*present, count - 1])) if place not in common and place not in held]
    wanted = count - cap + 1
    ranges = [
        MergeRange(first, first + length - 1)
        for length in range(wanted, 1, -1)
        for first in free
        if set(range(first, first + length)) <= set(free)
    ]
    if not ranges:
        return "no neighbouring layers are at every destination and free to be merged"
    longest = max(each.last - each.first for each in ranges)
    moved, freed = gains.moved[Into.NEW], gains.freed
    return min(
        (each for each in ranges if each.last - each.first == longest),
        key=lambda each: (int(moved[each.first, each.last]) - int(freed[each.first, each.last]), each.first),
    )
