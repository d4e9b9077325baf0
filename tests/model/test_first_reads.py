"""Recordings of first reads: runs, portions, and which of two recordings is kept."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from snapchain.model.first_reads import FirstReads, joined, portions, replaces, size_of


def leaves_of(reads: FirstReads) -> list[int]:
    return [leaf for first, count in reads for leaf in range(first, first + count)]


@given(st.lists(st.integers(0, 30), unique=True), st.integers(1, 9))
def test_runs_and_their_portions_are_the_leaves_in_their_order(leaves: list[int], most: int) -> None:
    reads = joined(leaves)
    assert leaves_of(reads) == leaves
    assert size_of(reads) == len(leaves)
    found = list(portions(reads, most))
    assert [leaf for portion in found for leaf in leaves_of(portion)] == leaves
    assert all(size_of(portion) == most for portion in found[:-1])
    assert all(0 < size_of(portion) <= most for portion in found)


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ((), (), False),
        (((5, 1),), (), True),
        (((0, 100),), ((0, 100),), False),
        (((0, 100),), ((5, 100),), False),
        (((0, 100),), ((20, 100),), True),
        (((500, 10),), ((0, 100),), False),
        (((500, 25),), ((0, 100),), True),
        ((), ((0, 100),), False),
    ],
    ids=["nothing", "the first", "the same", "nearly the same", "another", "a look", "a shorter boot", "no reads"],
)
def test_a_recording_replaces_one_that_is_of_no_use_any_more(new: FirstReads, old: FirstReads, expected: bool) -> None:
    assert replaces(new, old) is expected
