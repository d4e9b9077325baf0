"""Hypothesis strategies for maps, stacks and chains, shared by all tests that hold a law on random stacks.

Sizes are small on purpose: the laws do not depend on scale, and small examples collide, touch, shrink and end
in the middle of each other far more often than large ones.  A run and a layer's size are one drawn number each:
hypothesis spends its time on draws, and thousands of stacks are drawn in a run of the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hypothesis import strategies as st

from snapchain.model.chain import Chain, Layer
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents

LAYER_VALUES = (ABSENT, ZERO, DATA)
_MAX_RUNS = 8


def extents(
    *, size: int | None = None, max_size: int = 40, values: Sequence[int] = LAYER_VALUES
) -> st.SearchStrategy[Extents]:
    """A map of exactly `size` bytes, or of 0 to `max_size` bytes."""
    widest = max_size if size is None else size
    sizes = st.integers(0, max_size) if size is None else st.just(size)
    return st.builds(lambda length, runs: _map_of(length, runs, values), sizes, _runs(widest, values))


def stacks(
    *, min_layers: int = 1, max_layers: int = 6, max_size: int = 40, one_size: bool = False
) -> st.SearchStrategy[list[Extents]]:
    """Layers root first. Sizes often agree, as in real stacks, and often do not: grown, shrunk and empty layers."""
    own_size = (
        st.just(max_size + 1) if one_size else st.integers(0, 2 * max_size + 1)
    )  # beyond max_size: the common one
    layers = st.lists(st.tuples(own_size, _runs(max_size, LAYER_VALUES)), min_size=min_layers, max_size=max_layers)
    return st.builds(
        lambda common, drawn: [
            _map_of(size if size <= max_size else common, runs, LAYER_VALUES) for size, runs in drawn
        ],
        st.integers(0, max_size),
        layers,
    )


def chain_of(stack: Sequence[Extents]) -> Chain:
    """The chain of layers named l0, l1, ... that have these maps."""
    return Chain([Layer(f"l{n}", layer, f"l{n - 1}" if n else None) for n, layer in enumerate(stack)])


def chains(*, min_layers: int = 1, max_layers: int = 6, max_size: int = 40) -> st.SearchStrategy[Chain]:
    """Random chains of layers named l0, l1, ..."""
    return stacks(min_layers=min_layers, max_layers=max_layers, max_size=max_size).map(chain_of)


def _runs(max_size: int, values: Sequence[int]) -> st.SearchStrategy[list[int]]:
    """Numbers that `_map_of` takes apart: the place of a value, and a start."""
    return st.lists(st.integers(0, max(len(values) * max_size, 1) - 1), max_size=_MAX_RUNS)


def _map_of(size: int, runs: Iterable[int], values: Sequence[int]) -> Extents:
    if size == 0:
        return Extents.absent(0)
    starts = {0: values[0]}
    for number in runs:
        start, place = divmod(number, len(values))
        if start < size:
            starts[start] = values[place]
    at = sorted(starts)
    return Extents.from_starts(size, at, [starts[start] for start in at])
