"""The laws of the extent algebra on random stacks, judged by a walk byte by byte."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, strategies as st

from snapchain.model import extents as module
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, fold, over, pairwise, where
from snapchain.testing.reference import assert_canonical, bytewise, reads, walk
from snapchain.testing.strategies import extents, stacks

WHOLE_BLOCK = module._BLOCK


@pytest.fixture(scope="module", autouse=True)
def _tiny_blocks() -> Iterator[None]:
    """Maps are joined two runs at a time here: the seams are where such code breaks.

    The tests of chains, collapse and economics hold the same laws with blocks of the real size.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", 2)
        yield


def owned(stack: list[Extents]) -> list[Extents]:
    return [layer.owned_by(place) for place, layer in enumerate(stack)]


# ---------------------------------------------------------------- laws of `over`


@given(stacks())
def test_read_law(stack: list[Extents]) -> None:
    got = fold(owned(stack))
    assert bytewise(got) == walk(stack)
    assert_canonical(got)


@given(stacks(min_layers=3, max_layers=3))
def test_association(stack: list[Extents]) -> None:
    a, b, c = owned(stack)
    assert over(over(a, b), c) == over(a, over(b, c))


@given(stacks())
def test_fold_in_pairs_is_fold_from_the_root(stack: list[Extents]) -> None:
    row = owned(stack)
    result = row[0]
    for layer in row[1:]:
        result = over(result, layer)
    assert fold(row) == result


@given(stacks(min_layers=2, max_layers=2))
def test_idempotence(stack: list[Extents]) -> None:
    """An upper layer that was merged down already changes nothing when it is merged again."""
    lower, upper = owned(stack)
    merged = over(lower, upper)
    assert over(merged, upper) == merged
    assert over(merged, merged) == merged
    assert over(lower, merged) == merged


@given(extents(), st.integers(0, 40))
def test_absent_is_the_identity(layer: Extents, size: int) -> None:
    assert over(layer, Extents.absent(layer.size)) == layer
    assert over(Extents.absent(layer.size), layer) == layer
    assert over(layer, Extents.absent(size)) == layer.resized(size, ZERO)


@given(stacks(min_layers=2))
def test_size_law(stack: list[Extents]) -> None:
    """Bytes past the end of a layer read zero for ever after, unless a layer above writes them."""
    got = bytewise(fold(owned(stack)))
    assert len(got) == stack[-1].size
    for place in range(len(stack) - 1):
        for offset in range(stack[place].size, len(got)):
            assert got[offset] == ZERO or got[offset] > place


def test_a_shorter_middle_layer_hides_what_is_under_it() -> None:
    root, short, top = Extents.constant(8, DATA), Extents.absent(3), Extents.absent(6)
    assert list(fold([root, short, top]).runs()) == [(0, 3, DATA), (3, 3, ZERO)]


@given(stacks())
def test_root_law(stack: list[Extents]) -> None:
    """ZERO may become ABSENT in the root and no guest byte changes; higher up it brings old data back."""
    root = stack[0].mapped(np.where(stack[0].val == ZERO, ABSENT, stack[0].val))
    assert reads([root, *stack[1:]]) == reads(stack)
    assert [max(v, ZERO) for v in bytewise(fold(owned([root, *stack[1:]])))] == reads(stack)


def test_the_root_law_ends_at_the_root() -> None:
    root, zeroed = Extents.constant(4, DATA), Extents.constant(4, ZERO)
    dropped = zeroed.mapped(np.full(1, ABSENT))
    assert reads([root, zeroed]) == [ZERO] * 4
    assert reads([root, dropped]) == [DATA] * 4


def test_fold_of_nothing() -> None:
    with pytest.raises(TypeError, match="at least one layer"):
        fold([])


# ---------------------------------------------------------------- side by side


@given(stacks(min_layers=2, max_layers=2, one_size=True))
def test_pairwise(stack: list[Extents]) -> None:
    left, right = stack
    at, one, other = pairwise(left, right)
    assert at.tolist() == sorted({*left.at.tolist(), *right.at.tolist()})
    assert one.tolist() == left.values_at(at).tolist()
    assert other.tolist() == right.values_at(at).tolist()


def test_pairwise_wants_one_size() -> None:
    with pytest.raises(ValueError, match="4 and 5"):
        pairwise(Extents.absent(4), Extents.absent(5))


@given(stacks(min_layers=2, max_layers=2, one_size=True), st.sampled_from([ABSENT, ZERO, 7]))
def test_where(stack: list[Extents], otherwise: int) -> None:
    layer, mask = stack
    got = where(layer, mask, otherwise=otherwise)
    assert_canonical(got)
    pairs = zip(bytewise(layer), bytewise(mask), strict=True)
    assert bytewise(got) == [otherwise if chosen == ABSENT else value for value, chosen in pairs]


def test_offsets_beyond_four_exbibytes_do_not_wrap() -> None:
    far = (1 << 63) - 8192
    lower = Extents.from_runs(far + 4096, [(far - 4096, 4096, 0)])
    upper = Extents.from_runs(far + 4096, [(far, 4096, 1)])
    assert list(over(lower, upper).runs())[1:] == [(far - 4096, 4096, 0), (far, 4096, 1)]


# ---------------------------------------------------------------- cost


def million_runs(seed: int) -> Extents:
    numbers = np.random.default_rng(seed)
    gaps = numbers.integers(1, 33, 1_000_000) * 65536
    at = np.concatenate([[0], np.cumsum(gaps)])[:-1]
    # Steps of 1 or 2 modulo 3: neighbours always differ.
    val = np.cumsum(numbers.integers(1, 3, len(at))) % 3 + ABSENT
    return Extents.from_starts(1 << 50, at, val)


@pytest.mark.bench
def test_two_layers_of_a_million_runs_compose_in_a_fifth_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", WHOLE_BLOCK)
    lower, upper = million_runs(1), million_runs(2)
    spent = []
    for _ in range(3):
        start = time.process_time()
        over(lower, upper)
        spent.append(time.process_time() - start)
    assert min(spent) < 0.2


def test_two_layers_of_a_million_runs_compose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", WHOLE_BLOCK)
    lower, upper = million_runs(1), million_runs(2)
    merged = over(lower, upper)
    assert len(merged) > 1_000_000
    # A window of it read by another way: the value of the upper map where it has one, else of the lower.
    offsets = np.arange(0, 1 << 40, 3 << 24)
    low, up = lower.values_at(offsets), upper.values_at(offsets)
    assert merged.values_at(offsets).tolist() == np.where(up == ABSENT, low, up).tolist()
