"""How old the newest point is: a point of the future is never it, and what is kept of a disk stays true."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from hypothesis import given, strategies as st

from snapchain.model.freshness import MOST_OF_THE_FUTURE, candidates, has_gone_back, newest_of
from snapchain.model.retention import TOLERANCE

NOW = datetime(2026, 11, 30, 2, tzinfo=UTC)
HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class P:
    point: int
    time: datetime


def points_of(hours: list[int]) -> list[P]:
    return [P(number, NOW + at * HOUR) for number, at in enumerate(hours, 1)]


HOURS = st.lists(st.integers(-50, 50), max_size=12)


@given(HOURS, st.integers(-50, 50))
def test_it_is_the_newest_that_the_clock_allows(hours: list[int], now: int) -> None:
    clock = NOW + now * HOUR
    newest, future = newest_of(points_of(hours), clock)
    assert [each.time for each in future] == sorted(NOW + at * HOUR for at in hours if at > now)
    past = [at for at in hours if at <= now]
    assert (newest is None) == (not past)
    if newest is not None:
        assert newest.time == NOW + max(past) * HOUR
        assert newest.point == max(number for number, at in enumerate(hours, 1) if at == max(past))


@given(HOURS, st.integers(-50, 50), st.integers(-50, 50))
def test_what_is_kept_gives_the_same_later(hours: list[int], then: int, now: int) -> None:
    points = points_of(hours)
    kept = candidates(points, NOW + then * HOUR)
    clock = NOW + now * HOUR
    if now >= then:
        assert not has_gone_back(kept, len(points), clock) or newest_of(points, clock)[0] is None
    if not has_gone_back(kept, len(points), clock):
        assert newest_of(kept, clock)[0] == newest_of(points, clock)[0]


def test_a_clock_that_differs_a_little_makes_no_future() -> None:
    point = P(1, NOW + TOLERANCE)
    assert newest_of([point], NOW) == (point, ())
    late = P(1, NOW + TOLERANCE + timedelta(seconds=1))
    assert newest_of([late], NOW) == (None, (late,))


def test_of_many_points_of_the_future_the_earliest_are_kept() -> None:
    kept = candidates(points_of([0, *range(1, 500)]), NOW)
    assert [each.point for each in kept] == list(range(1, MOST_OF_THE_FUTURE + 2))
