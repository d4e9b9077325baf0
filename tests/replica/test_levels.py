"""The level follows the link and the processors: harder while frames wait and nobody else does, easier otherwise."""

from __future__ import annotations

import time

from snapchain.replica.stream.compression import LADDER, Levels, Link


def told(levels: Levels, *fullness: float) -> int | None:
    for each in fullness:
        levels.queue_seen(each)
    return levels.level


def test_it_rises_while_frames_wait() -> None:
    levels = Levels(Link.NETWORK)
    assert levels.level == 4 == LADDER[0]
    assert told(levels, 1.0) == 4
    assert told(levels, 1.0) == 5
    assert told(levels, *[1.0] * 100) == 12 == LADDER[-1]


def test_it_falls_while_none_waits_and_stops_at_the_floor() -> None:
    levels = Levels(Link.NETWORK)
    told(levels, *[1.0] * 6)
    assert told(levels, 0.0, 0.0, 0.0) == 9
    assert told(levels, 0.0) == 6
    assert told(levels, *[0.0] * 100) == 4


def test_it_stays_where_frames_neither_wait_nor_lack() -> None:
    levels = Levels(Link.NETWORK)
    told(levels, *[1.0] * 6)
    assert told(levels, *[1.0, 0.5] * 20, *[0.0, 0.0, 0.0, 0.5] * 20, *[1.0, 0.0] * 20) == 9


def test_it_does_not_rise_where_processors_are_short() -> None:
    levels = Levels(Link.NETWORK)
    for _ in range(50):
        levels.took(1.0, 0.7)
    assert told(levels, *[1.0] * 100) == 4
    for _ in range(50):
        levels.took(1.0, 1.0)
    assert told(levels, *[1.0] * 100) == 12
    for _ in range(50):
        levels.took(1.0, 0.4)
    assert told(levels, *[1.0] * 100) == 4


def test_what_a_frame_took_is_measured() -> None:
    levels = Levels(Link.NETWORK)
    for _ in range(100):
        with levels.compressing() as level:
            assert level == 4
            time.sleep(0.001)  # as if the processor had been elsewhere
    assert told(levels, *[1.0] * 100) == 4


def test_nothing_is_compressed_for_this_machine() -> None:
    levels = Levels(Link.LOCAL)
    assert told(levels, 1.0, 1.0, 0.0) is None
