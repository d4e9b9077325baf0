"""Points that are named go, and nothing else does."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from hypothesis import given, strategies as st

from snapchain.errors import InvalidInput
from snapchain.model.retention import DropPoints, Policy, decide, decide_by

NOW = datetime(2026, 11, 30, tzinfo=UTC)


@dataclass(frozen=True)
class Point:
    point: int
    held: bool = False
    time: datetime = NOW
    labels: tuple[str, ...] = ()
    instant: str | None = None


def reasons(point: Point) -> list[str]:
    return ["held"] if point.held else []


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.frozensets(st.integers(1, 10)))
def test_exactly_the_named_go_but_held_ones_and_the_last(held: list[bool], numbers: frozenset[int]) -> None:
    points = [Point(number, each) for number, each in enumerate(held, 1)]
    decisions = decide_by(
        points,
        DropPoints(numbers),
        disk="web1/vda",
        zone=UTC,
        now=NOW,
        holds=lambda point: ["held"] if point.held else [],
    )
    gone = {each.point.point for each in decisions if not each.kept}
    assert gone == {each.point for each in points[:-1] if each.point in numbers and not each.held}
    assert all(each.reasons for each in decisions)


def test_a_policy_decides_as_ever() -> None:
    points = [Point(1), Point(2)]
    found = decide_by(points, Policy(last=1), disk="web1/vda", zone=UTC, now=NOW, holds=lambda _: ())
    assert found == decide(points, Policy(last=1), zone=UTC, now=NOW)
    assert [each.kept for each in found] == [False, True]


def test_a_policy_does_not_tear_a_guest_point() -> None:
    points = [Point(1), Point(2, instant="0" * 32)]
    for rules in (Policy(last=1), Policy()):
        with pytest.raises(InvalidInput, match="kept or dropped as a whole") as refused:
            decide_by(points, rules, disk="a/web1/vda", zone=UTC, now=NOW, holds=lambda _: ())
        assert (refused.value.subject, refused.value.hint) == ("a/web1/vda", "name the guest: DEST::a/web1")
    kept = decide_by(points, DropPoints(frozenset({1})), disk="web1/vda", zone=UTC, now=NOW, holds=lambda _: ())
    assert [each.kept for each in kept] == [False, True]
