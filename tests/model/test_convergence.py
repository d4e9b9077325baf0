"""When rounds of seal and ship end."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from snapchain.errors import InvalidInput
from snapchain.model.convergence import Rules, Verdict, judge

sizes = st.lists(st.integers(0, 1 << 50), max_size=40)
some_rules = st.builds(
    Rules,
    rounds=st.integers(0, 30),
    stalled=st.integers(0, 5),
    growth=st.floats(1, 4),
    grace=st.integers(0, 3),
)


def run(after: list[int], enough: int | None, rules: Rules) -> tuple[Verdict, int]:
    """The verdict at which a loop over these stops, and how many rounds it took; the last size repeats for ever."""
    left = after[:1]
    while not (verdict := judge(left, enough, rules)).ends:
        left.append(after[min(len(left), len(after) - 1)])
    return verdict, len(left) - 1


@given(sizes.filter(bool), st.one_of(st.none(), st.integers(0, 1 << 50)), some_rules)
def test_every_loop_ends_within_the_rounds(after: list[int], enough: int | None, rules: Rules) -> None:
    verdict, rounds = run(after, enough, rules)
    assert rounds <= rules.rounds
    assert verdict.ends


@given(sizes, st.integers(0, 1 << 50), some_rules)
def test_enough_is_when_it_is_enough_and_only_then(left: list[int], enough: int, rules: Rules) -> None:
    assert (judge(left, enough, rules) is Verdict.ENOUGH) == (bool(left) and left[-1] <= enough)


@given(sizes.filter(bool), some_rules)
def test_where_nothing_was_measured_only_nothing_is_enough(left: list[int], rules: Rules) -> None:
    assert (judge(left, None, rules) is Verdict.ENOUGH) == (left[-1] == 0)


@given(st.lists(st.integers(1, 1 << 50), min_size=1, max_size=20, unique=True), some_rules)
def test_what_always_shrinks_is_never_given_up(after: list[int], rules: Rules) -> None:
    assert judge(sorted(after, reverse=True), 0, rules) not in (Verdict.NO_PROGRESS, Verdict.GROWING)


@given(st.integers(1, 1 << 40), st.integers(0, 5))
def test_what_stays_as_it_is_ends_after_the_stalled_rounds(size: int, stalled: int) -> None:
    assert run([size], 0, Rules(stalled=stalled)) == (Verdict.NO_PROGRESS, stalled + 1)


@given(st.integers(10, 1 << 40), st.floats(1.3, 5))
def test_a_guest_faster_than_the_link_is_noticed_after_two_rounds(first: int, factor: float) -> None:
    after = [first * 100, first, int(first * factor) + 1]
    assert run(after, 0, Rules()) == (Verdict.GROWING, 2)


@given(sizes.filter(bool), st.integers(0, 1 << 50), some_rules, st.integers(2, 1000))
def test_the_unit_does_not_matter(left: list[int], enough: int, rules: Rules, factor: int) -> None:
    scaled = [size * factor for size in left]
    whole = Rules(rounds=rules.rounds, stalled=rules.stalled, growth=2, grace=rules.grace)
    assert judge(scaled, enough * factor, whole) is judge(left, enough, whole)


def test_the_first_round_may_grow() -> None:
    """Before it nothing was sealed: what the guest wrote since says nothing about the rounds."""
    assert judge([1, 1000], 0, Rules()) is Verdict.AGAIN
    assert judge([1, 1000, 1000], 0, Rules()) is Verdict.GROWING


def test_a_pause_in_progress_is_forgotten() -> None:
    left = [100, 100, 100, 100, 90]
    assert judge(left[:-1], 0, Rules()) is Verdict.AGAIN
    assert judge(left, 0, Rules()) is Verdict.AGAIN
    assert judge([*left, 90, 90, 90, 90], 0, Rules()) is Verdict.NO_PROGRESS


def test_nothing_seen_yet() -> None:
    assert judge([], 0, Rules()) is Verdict.AGAIN


@pytest.mark.parametrize("wrong", [{"rounds": -1}, {"stalled": -1}, {"grace": -1}, {"growth": 0.5}])
def test_rules_that_mean_nothing(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match="growth is at least 1"):
        Rules(**wrong)  # type: ignore[arg-type]
