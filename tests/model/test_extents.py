"""Building, asking, cutting and rounding of extent maps, judged byte by byte."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, covering, rounded
from snapchain.testing.reference import assert_canonical, bytewise
from snapchain.testing.strategies import LAYER_VALUES, extents, stacks

# ---------------------------------------------------------------- building


@given(extents(max_size=30))
def test_from_runs_reads_back(layer: Extents) -> None:
    stored = [run for run in layer.runs() if run[2] != ABSENT]
    assert Extents.from_runs(layer.size, stored) == layer
    assert Extents.from_runs(layer.size, layer.runs()) == layer


@given(st.lists(st.sampled_from(LAYER_VALUES), max_size=30))
def test_from_starts_merges_equal_neighbours(values: list[int]) -> None:
    got = Extents.from_starts(len(values), np.arange(len(values)), values)
    assert_canonical(got)
    assert bytewise(got) == values


@pytest.mark.parametrize(
    "runs",
    [
        [(4, 2, DATA), (5, 2, DATA)],
        [(4, 2, DATA), (0, 2, DATA)],
        [(4, 0, DATA)],
        [(4, -1, DATA)],
        [(8, 3, DATA)],
        [(-1, 3, DATA)],
    ],
    ids=["overlap", "order", "empty", "negative", "past-the-end", "before-the-start"],
)
def test_from_runs_refuses(runs: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match="out of order or outside"):
        Extents.from_runs(10, runs)


@pytest.mark.parametrize(
    ("size", "at", "val"),
    [
        (4, [1], [DATA]),
        (4, [0, 2, 2], [DATA, ZERO, DATA]),
        (4, [0, 4], [DATA, ZERO]),
        (4, [0, 1], [DATA]),
        (4, [], []),
        (0, [0], [DATA]),
        (-1, [], []),
        (4, [[0]], [[DATA]]),
    ],
)
def test_from_starts_refuses(size: int, at: list[int], val: list[int]) -> None:
    with pytest.raises(ValueError, match=r"run starts|has runs exactly when"):
        Extents.from_starts(size, at, val)


@given(st.integers(0, 30), st.sampled_from(LAYER_VALUES))
def test_constant(size: int, value: int) -> None:
    got = Extents.constant(size, value)
    assert_canonical(got)
    assert bytewise(got) == [value] * size


# ---------------------------------------------------------------- asking


@given(extents(max_size=30))
def test_counts_and_lookups(layer: Extents) -> None:
    values = bytewise(layer)
    assert layer.data_bytes == values.count(DATA)
    assert layer.zero_bytes == values.count(ZERO)
    assert [layer.at_offset(offset) for offset in range(layer.size)] == values
    assert layer.values_at(np.arange(layer.size)).tolist() == values
    assert layer.lengths.sum() == layer.size
    assert layer.ends.tolist() == (layer.at + layer.lengths).tolist()
    for outside in (-1, layer.size):
        with pytest.raises(IndexError, match=f"^{outside}$"):
            layer.at_offset(outside)


@given(stacks(min_layers=2, max_layers=2, max_size=6))
def test_equal_means_equal_byte_for_byte(stack: list[Extents]) -> None:
    left, right = stack
    assert (left == right) == (bytewise(left) == bytewise(right))
    assert left != "a map"
    with pytest.raises(TypeError, match="unhashable"):
        hash(left)


# ---------------------------------------------------------------- cutting


@given(extents(), st.integers(0, 60), st.sampled_from(LAYER_VALUES))
def test_resized(layer: Extents, size: int, fill: int) -> None:
    got = layer.resized(size, fill)
    assert_canonical(got)
    assert bytewise(got) == (bytewise(layer) + [fill] * size)[:size]


@given(extents(), st.data())
def test_window(layer: Extents, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, layer.size))
    stop = data.draw(st.integers(start, layer.size))
    got = layer.window(start, stop)
    assert_canonical(got)
    assert bytewise(got) == bytewise(layer)[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 5)])
def test_window_outside(start: int, stop: int) -> None:
    with pytest.raises(IndexError, match=rf"\({start}, {stop}\)"):
        Extents.absent(4).window(start, stop)


@given(extents(), st.integers(1, 9))
def test_rounded(layer: Extents, grain: int) -> None:
    values = bytewise(layer)
    cells = [values[start : start + grain] for start in range(0, layer.size, grain)]
    want = [DATA if set(cell) - {ABSENT} else ABSENT for cell in cells for _ in cell]
    got = rounded(layer, grain)
    assert_canonical(got)
    assert bytewise(got) == want


@given(st.integers(0, 40), st.data())
def test_covering(size: int, data: st.DataObject) -> None:
    ends = st.integers(0, size)
    ranges = sorted(data.draw(st.lists(st.tuples(ends, ends).map(sorted), max_size=6)))
    first = np.array([r[0] for r in ranges], np.int64)
    stop = np.array([r[1] for r in ranges], np.int64)
    got = covering(size, first, stop)
    want = [DATA if any(a <= offset < b for a, b in ranges) else ABSENT for offset in range(size)]
    assert bytewise(got) == want
    assert_canonical(got)
