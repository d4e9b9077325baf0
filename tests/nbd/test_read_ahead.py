"""Which blocks are fetched ahead, for the patterns in which clients read."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given, strategies as st

from snapchain.nbd.read_ahead import ReadAhead


def fetched(ahead: ReadAhead, *requests: tuple[int, int]) -> list[tuple[int, int]]:
    return [found for request in requests if (found := ahead.wanted(*request)) is not None]


def test_a_stream_doubles_its_window_and_fetches_nothing_twice() -> None:
    ahead = ReadAhead(32)
    found = fetched(ahead, *((block, block + 1) for block in range(200)))
    lengths = [stop - start for start, stop in found]
    assert lengths[:5] == [2, 3, 6, 12, 24], "the first two requests make it a stream"
    assert max(lengths) <= 32
    assert all(one[1] == other[0] for one, other in pairwise(found)), "without a gap"
    assert found[-1][1] > 200, "always ahead"


def test_two_streams_and_some_noise_are_told_apart() -> None:
    ahead = ReadAhead(16)
    noise = random.Random(1)
    wanted: set[int] = set()
    for step in range(40):
        for base in (0, 10_000):
            for start, stop in fetched(ahead, (base + step, base + step + 1)):
                wanted |= set(range(start, stop))
        block = noise.randrange(20_000, 10**9)
        assert fetched(ahead, (block, block + 1)) == []
    assert {20, 39, 10_020, 10_039} <= wanted


def test_requests_that_are_out_of_order_are_one_stream() -> None:
    found = fetched(ReadAhead(8), *((block, block + 1) for block in (1, 0, 3, 2, 5, 4, 7, 6, 9, 8)))
    assert found
    assert found[0][0] <= 5


def test_blocks_that_were_read_by_the_request_itself_are_not_fetched() -> None:
    ahead = ReadAhead(8)
    ahead.wanted(0, 4)
    assert ahead.wanted(4, 20) == (20, 22)


def test_nothing_is_fetched_for_random_reads_or_where_there_is_no_room() -> None:
    places = random.Random(2).sample(range(0, 10**6, 100), 500)
    assert fetched(ReadAhead(32), *((block, block + 1) for block in places)) == []
    assert fetched(ReadAhead(0), *((block, block + 1) for block in range(50))) == []


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=60), st.integers(0, 16))
def test_no_window_is_larger_than_allowed(requests: list[tuple[int, int]], most: int) -> None:
    ahead = ReadAhead(most)
    for first, count in requests:
        found = ahead.wanted(first, first + count)
        if found is not None:
            assert 0 < found[1] - found[0] <= max(most, 1)
            assert found[0] >= first
