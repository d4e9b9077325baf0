"""The uppermost of many ranges is what painting them one after the other leaves."""

from __future__ import annotations

import numpy as np
from hypothesis import given, strategies as st

from snapchain.repository.merging import uppermost

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), max_size=40)


@given(ranges=RANGES)
def test_it_is_what_painting_leaves(ranges: list[tuple[int, int]]) -> None:
    canvas = [-1] * 120
    for number, (start, length) in enumerate(ranges):
        canvas[start : start + length] = [number] * length
    first = np.array([start for start, _ in ranges], np.int64)
    edges, top = uppermost(first, first + np.array([length for _, length in ranges], np.int64))
    found = [-1] * 120
    for at, end, number in zip(edges.tolist(), edges[1:].tolist(), top.tolist(), strict=False):
        found[at:end] = [number] * (end - at)
    assert found == canvas
    assert len(top) == max(0, len(edges) - 1)


def test_a_wide_range_below_many_small_ones() -> None:
    count = 10_000
    start = np.concatenate([[0], np.arange(count) * 10 + 5]).astype(np.int64)
    stop = np.concatenate([[10 * count], np.arange(count) * 10 + 6]).astype(np.int64)
    edges, top = uppermost(start, stop)
    assert len(edges) == 2 * count + 2
    assert np.array_equal(top[1::2], np.arange(1, count + 1))
    assert not top[::2].any()
