"""Hypothesis strategies for maps, stacks and chains, shared by all tests that hold a law on random stacks.

Sizes are small on purpose: the laws do not depend on scale, and small examples collide, touch, shrink and end
in the middle of each other far more often than large ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from snapchain.model.chain import Chain
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents
from snapchain.model.layer import Layer

LAYER_VALUES = (ABSENT, ZERO, DATA)


@st.composite
def extents(
    draw: st.DrawFn, *, size: int | None = None, max_size: int = 40, values: Sequence[int] = LAYER_VALUES
) -> Extents:
    """A map of exactly `size` bytes, or of 0 to `max_size` bytes."""
    length = draw(st.integers(0, max_size)) if size is None else size
    if length == 0:
        return Extents.absent(0)
    inner = draw(st.sets(st.integers(1, length - 1), max_size=8)) if length > 1 else set()
    starts = [0, *sorted(inner)]
    chosen = draw(st.lists(st.sampled_from(list(values)), min_size=len(starts), max_size=len(starts)))
    return Extents.from_starts(length, starts, chosen)


@st.composite
def stacks(
    draw: st.DrawFn, *, min_layers: int = 1, max_layers: int = 6, max_size: int = 40, one_size: bool = False
) -> list[Extents]:
    """Layers root first. Sizes often agree, as in real stacks, and often do not: grown, shrunk and empty layers."""
    count = draw(st.integers(min_layers, max_layers))
    common = draw(st.integers(0, max_size))
    sizes = st.just(common) if one_size else st.one_of(st.just(common), st.integers(0, max_size))
    return [draw(extents(size=draw(sizes))) for _ in range(count)]


def chain_of(stack: Sequence[Extents]) -> Chain:
    """The chain of layers named l0, l1, ... that have these maps."""
    return Chain([Layer(f"l{n}", layer, f"l{n - 1}" if n else None) for n, layer in enumerate(stack)])


def chains(*, min_layers: int = 1, max_layers: int = 6, max_size: int = 40) -> st.SearchStrategy[Chain]:
    """Random chains of layers named l0, l1, ..."""
    return stacks(min_layers=min_layers, max_layers=max_layers, max_size=max_size).map(chain_of)
