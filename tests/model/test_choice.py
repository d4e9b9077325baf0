"""What of a chain may be merged."""

from itertools import combinations

import pytest
from hypothesis import given, strategies as st

from snapchain.errors import InvalidInput
from snapchain.model.choice import MergeRange, barred, segments

PLACES = st.sets(st.integers(0, 8))


@given(st.integers(0, 9), PLACES, PLACES)
def test_every_part_of_a_segment_and_nothing_else_may_be_merged(count: int, stays: set[int], kept: set[int]) -> None:
    found = segments(count, stays=stays, kept=kept)
    assert list(found) == sorted(found)
    for first, last in combinations(range(count), 2):
        inside = any(each.first <= first and last <= each.last for each in found)
        may = not stays & set(range(first, last + 1)) and not kept & set(range(first, last))
        assert inside == may


@given(st.data(), st.integers(1, 9))
def test_what_a_destination_lacks_or_builds_on_stays(data: st.DataObject, count: int) -> None:
    present = data.draw(st.lists(st.integers(0, count), max_size=3))
    held = data.draw(PLACES)
    stays = barred(count, present=present, held=held)
    for place in range(count):
        lacking = any(place >= there for there in present)
        common = any(place == there - 1 for there in present)
        assert (place in stays) == (lacking or common or place in held or place in (0, count - 1))


def test_the_ends_may_be_merged_when_asked() -> None:
    assert barred(4, root=False, top=False) == set()
    assert barred(4, present=[4], root=False, top=False) == {3}
    assert segments(4, stays=barred(4, root=False), kept=[1]) == (MergeRange(0, 1),)
    assert MergeRange(2, 5).removes == 3


def test_no_destination_has_more_than_there_is() -> None:
    with pytest.raises(InvalidInput, match="cannot hold 4 of 3 layers"):
        barred(3, present=[4])


def test_layers_that_say_nothing_may_be_merged_with_each_other_above_what_all_hold() -> None:
    """An idle guest gets one each night, and no shipment brings any of them to a destination."""
    assert barred(7, present=(3, 3), silent={1, 3, 4, 5}) == {0, 2, 6}
    assert barred(7, present=(3, 5), silent={3, 4, 5}) == {0, 2, 3, 4, 6}
    assert barred(7, present=(3,), silent={3, 4, 5}, held={4}) == {0, 2, 4, 6}
