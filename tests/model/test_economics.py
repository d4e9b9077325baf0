"""Gains of merges, counted byte by byte."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from snapchain.errors import InvalidInput
from snapchain.model.chain import Chain
from snapchain.model.economics import Gain, Into, gain, gains_of, hidden_by
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, fold
from snapchain.testing.reference import bytewise, walk
from snapchain.testing.strategies import chain_of, chains


def counted(chain: Chain, first: int, last: int, into: Into) -> Gain:
    stack = [layer.extents for layer in chain.layers[first : last + 1]]
    merged = walk(stack)
    held = [bytewise(layer).count(DATA) for layer in stack]
    survivors = [merged.count(place) for place in range(len(stack))]
    freed = sum(held) - sum(survivors)
    if into is Into.NEW:
        return Gain(freed, sum(survivors), sum(survivors))
    if into is Into.UPPER:
        return Gain(freed, sum(survivors[:-1]), sum(survivors[:-1]))
    lower = bytewise(stack[0]) + [ABSENT] * len(merged)
    grown = sum(owner > 0 and lower[offset] != DATA for offset, owner in enumerate(merged))
    return Gain(freed, sum(survivors[1:]), grown)


@given(chains(min_layers=2), st.data(), st.sampled_from(Into))
def test_gain_is_what_a_byte_count_says(chain: Chain, data: st.DataObject, into: Into) -> None:
    first = data.draw(st.integers(0, len(chain) - 2))
    last = data.draw(st.integers(first + 1, len(chain) - 1))
    assert gain(chain, first, last, into=into) == counted(chain, first, last, into)


@given(chains(max_layers=7, max_size=30))
def test_all_ranges_at_once_say_what_each_says(chain: Chain) -> None:
    table = gains_of(hidden_by(chain))
    for first in range(len(chain)):
        for last in range(len(chain)):
            for into in Into:
                want = gain(chain, first, last, into=into) if first < last else Gain(0, 0, 0)
                assert table.freed[first, last] == want.bytes_freed
                assert table.moved[into][first, last] == want.bytes_moved


@given(chains(max_layers=7))
def test_hidden_by_agrees_with_the_chain(chain: Chain) -> None:
    hidden = hidden_by(chain)
    assert (hidden >= 0).all()
    assert not np.tril(hidden[:, :-1]).any()  # nothing is hidden by itself or from below
    assert hidden.sum(axis=1).tolist() == chain.held().data.tolist()
    assert hidden[:, -1].tolist() == chain.visible().data.tolist()
    assert hidden[:, :-1].sum(axis=1).tolist() == chain.shadowed().data.tolist()


@given(chains(min_layers=2))
def test_merging_everything_frees_all_data_that_is_shadowed(chain: Chain) -> None:
    whole = gain(chain, 0, len(chain) - 1)
    assert whole.bytes_freed == chain.shadowed().data.sum()
    assert whole.bytes_moved == fold([layer.extents for layer in chain.layers]).data_bytes


def test_by_hand() -> None:
    root = Extents.constant(100, DATA)
    middle = Extents.from_runs(100, [(0, 10, DATA), (20, 5, ZERO), (50, 10, DATA)])
    top = Extents.from_runs(120, [(0, 4, DATA), (22, 8, DATA), (110, 5, DATA)])
    chain = chain_of([root, middle, top])
    assert hidden_by(chain).tolist() == [[0, 25, 5, 70], [0, 0, 4, 16], [0, 0, 0, 17]]
    assert gain(chain, 0, 2) == Gain(bytes_freed=34, bytes_moved=103, peak_bytes=103)
    assert gain(chain, 1, 2) == Gain(bytes_freed=4, bytes_moved=33, peak_bytes=33)
    assert gain(chain, 1, 2, into=Into.UPPER) == Gain(bytes_freed=4, bytes_moved=16, peak_bytes=16)
    # 4 of the top's 17 bytes are written over the middle's own.
    assert gain(chain, 1, 2, into=Into.LOWER) == Gain(bytes_freed=4, bytes_moved=17, peak_bytes=13)


@pytest.mark.parametrize(("first", "last"), [(-1, 1), (0, 0), (1, 0), (0, 2)])
def test_no_such_range(first: int, last: int) -> None:
    with pytest.raises(InvalidInput, match="no range of a chain of 2"):
        gain(chain_of([Extents.absent(4)] * 2), first, last)
