"""Layers and chains: who may stand on whom, what a chain reads as, and which bytes are hidden."""

import numpy as np
import pytest
from hypothesis import given

from snapchain.errors import InvalidInput
from snapchain.model.chain import Chain, Layer, LayerUse
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents
from snapchain.testing.reference import bytewise, walk
from snapchain.testing.strategies import chain_of, chains

EMPTY = Extents.absent(4)


@given(chains())
def test_a_chain_resolves_to_its_owners(chain: Chain) -> None:
    assert bytewise(chain.resolve()) == walk([layer.extents for layer in chain.layers])


@given(chains())
def test_shadowed_bytes_are_what_no_reader_sees(chain: Chain) -> None:
    maps = [bytewise(layer.extents) for layer in chain.layers]
    top = maps[-1]
    data, zero = [], []
    for place, values in enumerate(maps):
        hidden = {
            offset
            for offset in range(len(values))
            if offset >= len(top) or any(offset >= len(above) or above[offset] != ABSENT for above in maps[place + 1 :])
        }
        data.append(sum(values[offset] == DATA for offset in hidden))
        zero.append(sum(values[offset] == ZERO for offset in hidden))
    assert chain.shadowed().data.tolist() == data
    assert chain.shadowed().zero.tolist() == zero


@given(chains())
def test_held_is_visible_and_shadowed(chain: Chain) -> None:
    held, visible, shadowed = chain.held(), chain.visible(), chain.shadowed()
    assert (held.data == visible.data + shadowed.data).all()
    assert (held.zero == visible.zero + shadowed.zero).all()
    assert (shadowed.data >= 0).all()
    assert (shadowed.zero >= 0).all()
    assert shadowed.data[-1] == shadowed.zero[-1] == 0
    assert visible.data.sum() == chain.resolve().data_bytes


@given(chains(min_layers=2))
def test_a_layer_that_goes_away_gives_back_what_it_hid(chain: Chain) -> None:
    """Everything shadowed before the top layer came is shadowed still."""
    before = Chain(chain.layers[:-1])
    assert before.top == chain.layers[-2]
    assert (before.shadowed().data <= chain.shadowed().data[:-1]).all()
    assert (before.shadowed().zero <= chain.shadowed().zero[:-1]).all()


def test_usage_of_a_small_chain() -> None:
    root = Extents.from_runs(10, [(0, 6, DATA), (6, 2, ZERO)])
    middle = Extents.from_runs(8, [(0, 1, ZERO), (4, 2, DATA)])  # shorter: hides [8, 10)
    top = Extents.from_runs(12, [(0, 2, DATA), (7, 1, DATA), (9, 1, ZERO)])
    assert chain_of([root, middle, top]).usage() == (
        LayerUse("l0", 10, data_bytes=6, zero_bytes=2, shadowed_bytes=4, shadowed_zero_bytes=1),
        LayerUse("l1", 8, data_bytes=2, zero_bytes=1, shadowed_bytes=0, shadowed_zero_bytes=1),
        LayerUse("l2", 12, data_bytes=3, zero_bytes=1, shadowed_bytes=0, shadowed_zero_bytes=0),
    )


def test_bytes_past_a_shorter_top_are_shadowed() -> None:
    shadowed = chain_of([Extents.constant(10, DATA), Extents.absent(4)]).shadowed()
    assert shadowed.data.tolist() == [6, 0]


def test_counts_stay_exact_beyond_double_precision() -> None:
    size = (1 << 62) + 1
    chain = chain_of([Extents.constant(size, DATA), Extents.from_runs(size, [(5, 1, DATA)])])
    assert chain.visible().data.tolist() == [size - 1, 1]
    assert chain.shadowed().data.tolist() == [1, 0]


def test_names_and_ends() -> None:
    chain = chain_of([Extents.absent(4), Extents.absent(6), Extents.absent(5)])
    assert chain.ids == ("l0", "l1", "l2")
    assert (chain.root.id, chain.top.id, chain.size, len(chain)) == ("l0", "l2", 5, 3)
    assert chain.root.is_root
    assert not chain.top.is_root


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "at least one"),
        ([Layer("b", EMPTY, "a")], "parent is a, but below it lies None"),
        ([Layer("a", EMPTY), Layer("b", EMPTY)], "parent is None, but below it lies a"),
        ([Layer("a", EMPTY), Layer("c", EMPTY, "b")], "parent is b, but below it lies a"),
        ([Layer("a", EMPTY), Layer("b", EMPTY, "a"), Layer("a", EMPTY, "b")], "twice"),
    ],
)
def test_a_chain_that_hangs_together_wrongly(layers: list[Layer], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Chain(layers)


@pytest.mark.parametrize(
    ("name", "extents", "parent", "words"),
    [
        ("", EMPTY, None, "needs an id"),
        ("a", EMPTY, "a", "its own parent"),
        ("a", Extents.constant(4, 3), None, "names no owners"),
        ("a", Extents.constant(4, -3), None, "names no owners"),
    ],
    ids=["no-id", "own-parent", "owners", "unknown-value"],
)
def test_a_layer_that_is_none(name: str, extents: Extents, parent: str | None, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        Layer(name, extents, parent)


def test_layers_are_values() -> None:
    assert Layer("a", Extents.absent(4)) == Layer("a", EMPTY)
    assert Layer("a", Extents.absent(4)) != Layer("a", Extents.constant(4, ZERO))
    assert len({Layer("a", Extents.absent(4)), Layer("a", EMPTY)}) == 1
    assert Layer("a", Extents.from_starts(4, np.array([0, 2]), np.array([ZERO, DATA]))).zero_bytes == 2
