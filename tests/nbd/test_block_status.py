"""Runs of `base:allocation` against a map that is looked up byte by byte."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from snapchain.model.extents import ABSENT, DATA, ZERO, Extents
from snapchain.nbd import block_status as module
from snapchain.nbd.block_status import block_status

FLAGS = {ABSENT: 3, ZERO: 2, DATA: 0}


@given(st.lists(st.sampled_from([ABSENT, ZERO, DATA]), min_size=1, max_size=40), st.data(), st.booleans())
def test_runs_say_what_the_map_says(values: list[int], data: st.DataObject, only_one: bool) -> None:
    extents = Extents.from_starts(len(values), list(range(len(values))), values)
    offset = data.draw(st.integers(0, len(values) - 1))
    length = data.draw(st.integers(1, len(values) - offset))
    found = block_status(extents, offset, length, only_one=only_one).tolist()
    wanted = [FLAGS[value] for value in values[offset : offset + length]]
    shown = [flags for run, flags in found for _ in range(run)]
    assert shown == wanted[: len(shown)]
    assert all(run > 0 for run, _ in found)
    assert all(one[1] != other[1] for one, other in pairwise(found)), "neighbours are joined"
    assert len(found) == 1 if only_one else len(shown) == length


def test_a_long_map_comes_in_several_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_RUNS", 3)
    extents = Extents.from_starts(10, range(10), [DATA, ZERO] * 5)
    assert block_status(extents, 1, 9).tolist() == [[1, 2], [1, 0], [1, 2]]
    assert block_status(extents, 8, 2).tolist() == [[1, 0], [1, 2]]


def test_layers_are_one_kind_of_data() -> None:
    extents = Extents.from_starts(8 << 30, [0, 1 << 30, 6 << 30], [DATA, DATA + 1, ABSENT])
    assert block_status(extents, 512, 2**32 - 1).tolist() == [[2**32 - 1, 0]]
