"""The speed of a merge that its guest shall not feel (model/pacing.py)."""

from __future__ import annotations

from hypothesis import given, strategies as st

from snapchain.model.pacing import CEILING, FLOOR, SLACK, Work, next_speed

SPEEDS = st.integers(FLOOR, CEILING)
LATENCIES = st.floats(1, 1e11)


@given(SPEEDS, st.none() | LATENCIES, st.none() | LATENCIES)
def test_it_stays_between_floor_and_ceiling(speed: int, latency: float | None, baseline: float | None) -> None:
    assert FLOOR <= next_speed(speed, latency, baseline=baseline) <= CEILING


@given(SPEEDS, LATENCIES, LATENCIES, LATENCIES)
def test_a_higher_latency_is_never_answered_with_more_speed(
    speed: int, one: float, other: float, baseline: float
) -> None:
    low, high = sorted((one, other))
    assert next_speed(speed, high, baseline=baseline) <= next_speed(speed, low, baseline=baseline)


@given(SPEEDS, LATENCIES)
def test_a_latency_above_the_slack_halves_it_at_least(speed: int, baseline: float) -> None:
    felt = (baseline * (1 + SLACK) + 500_000) * 1.01
    assert next_speed(speed, felt, baseline=baseline) <= max(FLOOR, speed // 2 + 1)


@given(st.integers(FLOOR, CEILING - 1), LATENCIES)
def test_a_latency_as_before_raises_it(speed: int, baseline: float) -> None:
    assert next_speed(speed, baseline, baseline=baseline) > speed


@given(LATENCIES)
def test_from_the_ceiling_it_is_at_the_floor_within_ten_looks(baseline: float) -> None:
    speed = CEILING
    for _ in range(10):
        speed = next_speed(speed, baseline * 3 + 2_000_000, baseline=baseline)
    assert speed == FLOOR


def test_counters_that_began_anew_are_nothing() -> None:
    assert Work(3, 10).since(Work(100, 1000)) == Work(0, 0)
    assert Work(3, 10).latency is None
    assert Work(110, 2000).since(Work(100, 1000)).latency == 100
