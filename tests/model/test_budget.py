"""The choice of merges, against all sets that there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from hypothesis import given, settings, strategies as st

from snapchain.model.choice import MergeRange, best, cheapest, most_removable, segments
from snapchain.model.economics import Into, gains_of, hidden_by
from snapchain.model.extents import Int64s
from snapchain.testing.strategies import chains

Sets = tuple[MergeRange, ...]


def all_sets(allowed: Sequence[MergeRange], place: int = 0) -> Iterator[Sets]:
    """Every set of disjoint ranges inside the allowed ones."""
    ranges = [
        MergeRange(first, last)
        for span in allowed
        for first in range(span.first, span.last)
        for last in range(first + 1, span.last + 1)
    ]

    def grow(at: int, chosen: Sets) -> Iterator[Sets]:
        yield chosen
        for number in range(at, len(ranges)):
            if all(ranges[number].first > each.last or ranges[number].last < each.first for each in chosen):
                yield from grow(number + 1, (*chosen, ranges[number]))

    yield from grow(place, ())


def total(table: Int64s, chosen: Sequence[MergeRange]) -> int:
    return sum(int(table[each.first, each.last]) for each in chosen)


def removed(chosen: Sequence[MergeRange]) -> int:
    return sum(each.removes for each in chosen)


@st.composite
def choices(draw: st.DrawFn) -> tuple[tuple[MergeRange, ...], Int64s, Int64s]:
    """Ranges of a chain of up to 8 layers, and tables of gains and costs: of a real chain, or out of thin air."""
    if draw(st.booleans()):
        chain = draw(chains(min_layers=2, max_layers=7, max_size=40))
        gains = gains_of(hidden_by(chain))
        count, freed, moved = len(chain), gains.freed, gains.moved[draw(st.sampled_from(Into))]
    else:
        count = draw(st.integers(2, 8))
        seed = draw(st.integers(0, 1 << 30))
        top = draw(st.sampled_from([2, 5, 1 << 45]))
        freed, moved = np.random.default_rng(seed).integers(0, top, (2, count, count), dtype=np.int64)
    stays = draw(st.sets(st.integers(0, count - 1), max_size=2))
    kept = draw(st.sets(st.integers(0, count - 1), max_size=2))
    return segments(count, stays=stays, kept=kept), freed, moved


@given(choices(), st.data())
@settings(max_examples=150)
def test_the_best_within_a_budget(drawn: tuple[tuple[MergeRange, ...], Int64s, Int64s], data: st.DataObject) -> None:
    allowed, freed, cost = drawn
    sets = list(all_sets(allowed))
    price = data.draw(st.sampled_from(sorted({total(cost, each) for each in sets})))
    budget = max(price + data.draw(st.integers(-1, 1)), 0)
    found = best(allowed, freed=freed, cost=cost, budget=budget)
    assert found in sets
    within = [each for each in sets if total(cost, each) <= budget]
    assert total(cost, found) <= budget

    def worth(chosen: Sets) -> tuple[int, int, int]:
        return total(freed, chosen), removed(chosen), -total(cost, chosen)

    assert worth(found) == max(map(worth, within))


def test_fewer_layers_removed_at_first_may_free_more_in_the_end() -> None:
    allowed = (MergeRange(0, 5),)
    freed = np.array(
        [[1, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 0], [1, 0, 1, 1, 1, 0], [0] * 6]
    )
    cost = np.array([[0] * 6, [1] * 6, [1, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0]])
    found = best(allowed, freed=freed, cost=cost, budget=0, removes=2)
    assert (removed(found), total(freed, found)) == (2, 1)


@given(choices(), st.data())
@settings(max_examples=150)
def test_down_to_a_cap_within_a_budget(
    drawn: tuple[tuple[MergeRange, ...], Int64s, Int64s], data: st.DataObject
) -> None:
    allowed, freed, cost = drawn
    sets = list(all_sets(allowed))
    budget = data.draw(st.sampled_from(sorted({total(cost, each) for each in sets})))
    aim = data.draw(st.integers(0, 7))
    found = best(allowed, freed=freed, cost=cost, budget=budget, removes=aim)
    within = [each for each in sets if total(cost, each) <= budget and removed(each) <= aim]
    assert found in within

    def worth(chosen: Sets) -> tuple[int, int, int]:
        return removed(chosen), total(freed, chosen), -total(cost, chosen)

    assert worth(found) == max(map(worth, within))


@given(choices(), st.integers(0, 7))
@settings(max_examples=150)
def test_the_cheapest_that_suffices(drawn: tuple[tuple[MergeRange, ...], Int64s, Int64s], aim: int) -> None:
    allowed, freed, moved = drawn
    sets = list(all_sets(allowed))
    found = cheapest(allowed, freed=freed, moved=moved, removes=aim)
    assert found in sets
    assert removed(found) == min(aim, most_removable(allowed))

    def price(chosen: Sets) -> tuple[int, int]:
        return total(moved, chosen) - total(freed, chosen), len(chosen)

    assert price(found) == min(price(each) for each in sets if removed(each) == removed(found))


def test_two_hundred_layers_are_chosen_from_in_a_moment() -> None:
    draw = np.random.default_rng(3)
    freed, moved = draw.integers(0, 1 << 40, (2, 200, 200), dtype=np.int64)
    whole = (MergeRange(1, 198),)
    assert removed(cheapest(whole, freed=freed, moved=moved, removes=150)) == 150
    for removes in (None, 60):
        found = best(whole, freed=freed, cost=moved, budget=1 << 43, removes=removes)
        assert 0 < total(moved, found) <= 1 << 43
