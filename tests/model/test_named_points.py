"""Points that are named go, and nothing else does."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from hypothesis import given, strategies as st

from snapchain.model.retention import DropPoints, Policy, decide, decide_by

NOW = datetime(2026, 11, 30, tzinfo=UTC)


@dataclass(frozen=True)
class Point:
    point: int
    held: bool = False
    time: datetime = NOW
    labels: tuple[str, ...] = ()


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.frozensets(st.integers(1, 10)))
def test_exactly_the_named_go_but_held_ones_and_the_last(held: list[bool], numbers: frozenset[int]) -> None:
    points = [Point(number, each) for number, each in enumerate(held, 1)]
    decisions = decide_by(
        points, DropPoints(numbers), zone=UTC, now=NOW, holds=lambda point: ["held"] if point.held else []
    )
    gone = {each.point.point for each in decisions if not each.kept}
    assert gone == {each.point for each in points[:-1] if each.point in numbers and not each.held}
    assert all(each.reasons for each in decisions)


def test_a_policy_decides_as_ever() -> None:
    points = [Point(1), Point(2)]
    found = decide_by(points, Policy(last=1), zone=UTC, now=NOW, holds=lambda _: ())
    assert found == decide(points, Policy(last=1), zone=UTC, now=NOW)
    assert [each.kept for each in found] == [False, True]
