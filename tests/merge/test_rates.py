"""What is remembered of how fast merges are."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapchain.merge.rates import COPIED, FIXED_SECONDS, SHARED, Rates, remember

MiB = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_remembered(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


def seconds(directory: Path, moved: int, *, shared: bool = False) -> float:
    return Rates.remembered().seconds(directory, "new-file", moved=moved, shared=shared)


def test_an_assumption_until_a_merge_was_seen(tmp_path: Path) -> None:
    assert seconds(tmp_path, 0) == FIXED_SECONDS
    assert seconds(tmp_path, COPIED) == pytest.approx(1 + FIXED_SECONDS)
    assert seconds(tmp_path, SHARED, shared=True) == pytest.approx(1 + FIXED_SECONDS)


def test_the_rate_of_earlier_merges_counts(tmp_path: Path) -> None:
    remember(tmp_path, "new-file", moved=100 * MiB, seconds=FIXED_SECONDS + 2, shared=False)
    assert seconds(tmp_path, 50 * MiB) == pytest.approx(FIXED_SECONDS + 1)
    remember(tmp_path, "new-file", moved=100 * MiB, seconds=FIXED_SECONDS + 1, shared=False)
    assert seconds(tmp_path, 75 * MiB) == pytest.approx(FIXED_SECONDS + 1)
    assert seconds(tmp_path, SHARED, shared=True) == pytest.approx(1 + FIXED_SECONDS), "another way, another rate"


def test_a_few_bytes_say_nothing(tmp_path: Path) -> None:
    remember(tmp_path, "new-file", moved=MiB, seconds=60, shared=False)
    assert Rates.remembered().rates == {}


def test_a_damaged_file_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "snapchain").mkdir()
    (tmp_path / "snapchain" / "merge-rates.json").write_text("{")
    assert seconds(tmp_path, 0) == FIXED_SECONDS
    remember(tmp_path, "new-file", moved=100 * MiB, seconds=1, shared=False)
    assert len(Rates.remembered().rates) == 1


def test_where_nothing_can_be_remembered_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(file))
    remember(tmp_path, "new-file", moved=100 * MiB, seconds=1, shared=False)
    assert Rates.remembered().rates == {}
