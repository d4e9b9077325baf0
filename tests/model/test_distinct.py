"""Distinct values: the same as numpy's, without what numpy loads for it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given, strategies as st

from snapchain.model.extents import counted, distinct

columns = st.lists(st.lists(st.integers(-5, 5), max_size=12), min_size=1, max_size=3)


@given(columns)
def test_as_numpy_says(values: list[list[int]]) -> None:
    arrays = [np.array(each, np.int64) for each in values]
    all_values = np.concatenate(arrays)
    expected, times = np.unique(all_values, return_counts=True)
    assert distinct(*arrays).tolist() == expected.tolist()
    found, counts = counted(*arrays)
    assert (found.tolist(), counts.tolist()) == (expected.tolist(), times.tolist())


def test_a_merge_loads_no_masked_arrays() -> None:
    program = (
        "import sys, numpy as np\n"
        "import snapchain.merge.plan, snapchain.image.sameness\n"
        "from snapchain.model.extents import distinct\n"
        "distinct(np.arange(3), np.arange(2))\n"
        "print('numpy.ma' in sys.modules)\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"
