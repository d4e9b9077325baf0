"""A strip shows each layer to scale: what it holds, and what of that is hidden."""

from __future__ import annotations

import numpy as np
from hypothesis import given, strategies as st

from snapchain.model.extents import ABSENT, DATA, ZERO, Extents
from snapchain.ops.inspect import shares, strips


def layer(text: str, *, scale: int = 100) -> Extents:
    """'..##00' -> six runs of `scale` bytes."""
    values = [{".": ABSENT, "#": DATA, "0": ZERO}[letter] for letter in text]
    return Extents.from_starts(len(values) * scale, np.arange(len(values)) * scale, values)


def test_hidden_data_is_drawn_apart() -> None:
    assert strips([layer("####"), layer(".##."), layer(".0..")], 4) == ["#++#", ".+#.", ".0.."]


def test_what_lies_past_the_end_of_a_short_layer_is_absent_in_it_and_hidden_below() -> None:
    assert strips([layer("####"), layer("..")], 4) == ["##++", "...."]
    assert strips([layer("####"), layer(".."), layer("....")], 4) == ["##++", "....", "...."]


def test_a_lone_cluster_on_a_terabyte_is_seen() -> None:
    disk = Extents.from_runs(1 << 40, [(1 << 39, 65536, DATA)])
    assert strips([disk], 8) == ["....#..."]


def test_nothing_gives_an_empty_strip() -> None:
    assert strips([], 8) == []
    assert strips([Extents.absent(0)], 3) == ["..."]


@given(st.text(".#0", min_size=1, max_size=30), st.integers(1, 40))
def test_shares_add_up_to_the_bytes_of_the_runs(text: str, cells: int) -> None:
    disk = layer(text, scale=1000)
    chosen = disk.val == DATA
    edges = np.arange(cells + 1) * disk.size // cells
    assert round(float((shares(disk, chosen, cells) * np.diff(edges)).sum())) == disk.bytes_where(chosen)
