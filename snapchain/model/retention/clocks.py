"""Which times of points the rules may count on, so that one run with a wrong clock costs no history.

The times of points come from the clocks of hosts, and some day one of these is wrong.  Nothing tells which: the clock
of this run, or the one by which a point was dated.  So a point whose time is in doubt stays, takes no place of any
rule, and is not the newest point from which `within` counts:

    FUTURE        it is later than the clock by more than TOLERANCE
    UNCONFIRMED   it comes after a jump, and no point a day younger confirms it: a clock that ran years ahead for one
                  night dates a point so, and so does a disk that was idle; the rules wait for a second night

            t   t  t t        jump         X            X alone: rules go by the times before the jump
            t   t  t t        jump         X  X  X      X and more than a DAY on: time has really passed

A clock that ran behind for a night dates a point before others that were shipped earlier.  Such a point is judged by
the rules, and takes no place of others (`backdated`).  To the run with that clock the others are of the future, so that
it cannot know: there a new *era* of the shipping order begins, and of a day each era keeps its own newest point.
docs/decisions/0060-points-of-the-future.md has the reasons for the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import Enum

TOLERANCE = timedelta(minutes=10)
"""By how much the clocks of two hosts may differ without a word."""
DAY = timedelta(days=1)
_JUMP = timedelta(days=60)
_TIMES = 3
"""A jump is longer than _JUMP, and than so many times the gap before it: two points a year make none."""


class Doubt(Enum):
    """Why a time does not count; the value is the reason for which the point stays."""

    FUTURE = "dated in the future"
    UNCONFIRMED = "dated long after the points before it; a later point must confirm that"


def is_future(time: datetime, now: datetime) -> bool:
    """Whether a point is dated later than the clock, beyond what clocks of two hosts may differ."""
    return time - now > TOLERANCE


def doubts(times: Sequence[datetime], now: datetime) -> list[Doubt | None]:
    """Why each time does not count; None for a time that counts. times: in any order."""
    past = sorted(time for time in times if not is_future(time, now))
    jumped = _after_jump(past)
    return [
        Doubt.FUTURE if is_future(time, now) else Doubt.UNCONFIRMED if jumped is not None and time >= jumped else None
        for time in times
    ]


def eras(times: Sequence[datetime]) -> list[int]:
    """The era of each point: a new one begins where a point is older than the one shipped before it.

    times: in the order in which the points were shipped
    """
    found: list[int] = []
    for place, time in enumerate(times):
        back = place > 0 and times[place - 1] - time > TOLERANCE
        found.append(found[-1] + back if found else 0)
    return found


def backdated(times: Sequence[datetime], doubtful: Sequence[Doubt | None]) -> list[bool]:
    """Which points are older than one that was shipped before them. Arguments: as shipped; doubtful ones count not."""
    newest: datetime | None = None
    found = []
    for time, doubt in zip(times, doubtful, strict=True):
        found.append(doubt is None and newest is not None and newest - time > TOLERANCE)
        if doubt is None and (newest is None or time > newest):
            newest = time
    return found


def _after_jump(past: Sequence[datetime]) -> datetime | None:
    """The first time after a jump that is not confirmed. past: ascending."""
    for place in range(len(past) - 1, 0, -1):
        if past[-1] - past[place] > DAY:
            return None
        gap = past[place] - past[place - 1]
        usual = past[place - 1] - past[place - 2] if place > 1 else timedelta(0)
        if gap > _JUMP and gap > _TIMES * usual:
            return past[place]
    return None
