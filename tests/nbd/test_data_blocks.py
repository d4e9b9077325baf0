"""Blocks with data are numbered without a gap, as a list of them shows."""

from __future__ import annotations

from hypothesis import given, strategies as st

from snapchain.model.extents import ABSENT, DATA, ZERO, Extents
from snapchain.nbd.data_blocks import DataBlocks


@given(st.lists(st.sampled_from([ABSENT, ZERO, DATA, DATA + 1]), max_size=60), st.integers(1, 7), st.data())
def test_numbers_are_places_in_the_list(values: list[int], block: int, data: st.DataObject) -> None:
    extents = Extents.from_starts(len(values), range(len(values)), values)
    held = [
        number
        for number in range(-(-len(values) // block))
        if any(value >= DATA for value in values[number * block : (number + 1) * block])
    ]
    found = DataBlocks(extents, block)
    assert found.count == len(held)
    for number in range(-(-len(values) // block) + 2):
        assert found.number(number) == sum(each < number for each in held)
    first = data.draw(st.integers(0, len(held) + 1))
    stop = data.draw(st.integers(first, len(held) + 2))
    assert [each for begin, end in found.runs(first, stop) for each in range(begin, end)] == held[first:stop]
