"""The level follows the link: hard from the start, harder while frames wait, easier while none does."""

from __future__ import annotations

from snapchain.replica.levels import LADDER, Levels, Link


def told(levels: Levels, *fullness: float) -> int | None:
    for each in fullness:
        levels.queue_seen(each)
    return levels.level


def test_it_begins_hard_and_rises_while_frames_wait() -> None:
    levels = Levels(Link.NETWORK)
    assert levels.level == 9
    assert told(levels, 1.0) == 9
    assert told(levels, 1.0) == 12
    assert told(levels, *[1.0] * 100) == 12 == LADDER[-1]


def test_it_falls_while_none_waits_and_stops_at_the_floor() -> None:
    levels = Levels(Link.NETWORK)
    assert told(levels, 0.0, 0.0, 0.0) == 9
    assert told(levels, 0.0) == 7
    assert told(levels, *[0.0] * 100) == 5 == LADDER[0]


def test_it_stays_where_frames_neither_wait_nor_lack() -> None:
    levels = Levels(Link.NETWORK)
    assert told(levels, *[1.0, 0.5] * 20, *[0.0, 0.0, 0.0, 0.5] * 20, *[1.0, 0.0] * 20) == 9


def test_nothing_is_compressed_for_this_machine() -> None:
    levels = Levels(Link.LOCAL)
    assert told(levels, 1.0, 1.0, 0.0) is None
