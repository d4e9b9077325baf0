"""Sizes and shares as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from snapchain.cli import quantities
from snapchain.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("512", 512), ("64K", 65536), ("64k", 65536), ("1.5GiB", 3 << 29), ("2 TB", 2 << 40), ("10M", 10 << 20)],
)
def test_sizes_are_powers_of_1024(text: str, count: int) -> None:
    assert quantities.parse_size(text) == count


@pytest.mark.parametrize("text", ["", "-1", "1X", "K", "1e3", "one", "1 K K", "١"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="not a size"):
        quantities.parse_size(text)


@given(st.integers(0, 1 << 60))
def test_a_size_written_is_read_back_within_its_rounding(count: int) -> None:
    assert quantities.parse_size(quantities.size(count)) == pytest.approx(count, rel=0.06)


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("100%", 1.0), ("0.25", 0.25), ("1", 1.0)])
def test_shares(text: str, share: float) -> None:
    assert quantities.parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0%", "101%", "-5%", "nan", "%", "half", "2"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="not a share"):
        quantities.parse_share(text)


def test_durations() -> None:
    assert [quantities.duration(seconds) for seconds in (0.25, 42, 125, 4210)] == [
        "0.2 s", "42 s", "2 min 5 s", "1 h 10 min",
    ]  # fmt: skip
