"""`auto` follows the store: it compresses harder only in time that the store needs, and is never slower than fast."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from snapchain.errors import InvalidInput
from snapchain.model.compression import LEVELS, STEPS, Compression, Effort, next_effort, parse_compression

SECONDS = (0.10, 0.14, 0.30, 0.45, 0.65)
"""To fill a pack of 16 MiB of plain data, at each step."""
STORED = (0.361, 0.344, 0.337, 0.328, 0.326)
"""Of a plain byte, at each step."""
IN_FLIGHT = 4


def shipped(store: float, packs: int, *, fixed: int | None = None) -> tuple[float, list[int]]:
    """(seconds until all packs are stored, the step of each). store: seconds for an uncompressed pack"""
    effort, now, free, ready, steps = Effort(), 0.0, 0.0, 0.0, list[int]()
    done: list[float] = []
    for number in range(packs):
        step = effort.step if fixed is None else fixed
        now += SECONDS[step]
        waited = max(0.0, done[number - IN_FLIGHT] - now) if number >= IN_FLIGHT else 0.0
        now += waited
        effort = next_effort(effort, waited=waited, elapsed=now - ready)
        ready = now
        free = max(free, now) + store * STORED[step]
        done.append(free)
        steps.append(step)
    return free, steps


@given(store=st.floats(0.001, 20))
def test_auto_is_never_slower_than_fast_but_for_its_last_packs(store: float) -> None:
    """Whatever was begun when the store became free again is finished: a few packs at the highest level."""
    auto, _ = shipped(store, 200)
    fast, _ = shipped(store, 200, fixed=0)
    assert auto <= fast * 1.1 + IN_FLIGHT * SECONDS[-1]


def test_a_slow_store_gets_the_smallest_packs() -> None:
    seconds, steps = shipped(20, 50)
    assert steps[-1] == len(STEPS) - 1
    assert seconds < shipped(20, 50, fixed=0)[0]


def test_a_fast_store_gets_the_fastest_level() -> None:
    assert set(shipped(0.01, 50)[1]) == {0}


def test_a_store_that_becomes_fast_is_followed_down() -> None:
    effort = Effort(len(STEPS) - 1)
    for _ in STEPS:
        effort = next_effort(effort, waited=0, elapsed=1)
    assert effort == Effort()


@pytest.mark.parametrize(
    ("waited", "after"),
    [(0.0, Effort(1)), (0.01, Effort(1)), (0.1, Effort(2, 0)), (0.3, Effort(3)), (1.0, Effort(3))],
)
def test_one_step_at_a_time(waited: float, after: Effort) -> None:
    assert next_effort(Effort(2, waited=1), waited=waited, elapsed=1) == after


def test_a_single_wait_changes_nothing() -> None:
    assert next_effort(Effort(2), waited=1, elapsed=1) == Effort(2, waited=1)


def test_no_time_is_no_wait() -> None:
    assert next_effort(Effort(1), waited=0, elapsed=0) == Effort()


def test_the_levels_rise() -> None:
    assert list(STEPS) == sorted(set(STEPS))
    assert STEPS[0] == LEVELS[Compression.FAST] < LEVELS[Compression.DEFAULT] < LEVELS[Compression.MAX]


def test_other_words_are_none() -> None:
    with pytest.raises(InvalidInput, match="unknown compression 'best'"):
        parse_compression("best")
