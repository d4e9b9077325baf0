"""Gains of merges, counted byte by byte."""

import numpy as np
from hypothesis import given

from snapchain.model.chain import Chain
from snapchain.model.economics import Into, gains_of, hidden_by
from snapchain.model.extents import DATA, ZERO, Extents, fold
from snapchain.testing.reference import bytewise, walk
from snapchain.testing.strategies import chain_of, chains


def counted(chain: Chain, first: int, last: int, into: Into) -> tuple[int, int]:
    """(bytes that a merge of the range frees, bytes that it moves)"""
    stack = [layer.extents for layer in chain.layers[first : last + 1]]
    merged = walk(stack)
    survivors = [merged.count(place) for place in range(len(stack))]
    freed = sum(bytewise(layer).count(DATA) for layer in stack) - sum(survivors)
    kept = {Into.NEW: survivors, Into.UPPER: survivors[:-1], Into.LOWER: survivors[1:]}[into]
    return freed, sum(kept)


@given(chains(max_layers=7, max_size=30))
def test_all_ranges_are_what_a_byte_count_says(chain: Chain) -> None:
    table = gains_of(hidden_by(chain))
    for first in range(len(chain)):
        for last in range(len(chain)):
            for into in Into:
                want = counted(chain, first, last, into) if first < last else (0, 0)
                assert (table.freed[first, last], table.moved[into][first, last]) == want


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
    table = gains_of(hidden_by(chain))
    assert table.freed[0, -1] == chain.shadowed().data.sum()
    assert table.moved[Into.NEW][0, -1] == fold([layer.extents for layer in chain.layers]).data_bytes


def test_by_hand() -> None:
    root = Extents.constant(100, DATA)
    middle = Extents.from_runs(100, [(0, 10, DATA), (20, 5, ZERO), (50, 10, DATA)])
    top = Extents.from_runs(120, [(0, 4, DATA), (22, 8, DATA), (110, 5, DATA)])
    chain = chain_of([root, middle, top])
    assert hidden_by(chain).tolist() == [[0, 25, 5, 70], [0, 0, 4, 16], [0, 0, 0, 17]]
    table = gains_of(hidden_by(chain))
    assert (table.freed[0, 2], table.moved[Into.NEW][0, 2]) == (34, 103)
    assert table.freed[1, 2] == 4
    assert [table.moved[into][1, 2] for into in (Into.NEW, Into.UPPER, Into.LOWER)] == [33, 16, 17]
