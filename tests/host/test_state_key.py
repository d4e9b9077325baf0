"""The key of a user's own records: made once, for this user alone, and refused where somebody else may have it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from snapchain.errors import InvalidInput
from snapchain.host import records as state_key
from snapchain.host.records import NAME, made_key, own_key
from tests.host.others import ALICE, directory, open_host, root_only

__all__ = ["open_host"]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state directory, which is not there yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "snapchain"


def test_it_is_made_once_for_this_user_alone(state: Path) -> None:
    assert own_key() is None
    assert not state.exists(), "asking makes nothing"
    before = os.umask(0)
    try:
        key = made_key()
    finally:
        os.umask(before)
    assert own_key() == made_key() == key
    assert [each.name for each in state.iterdir()] == [NAME]
    assert stat.S_IMODE((state / NAME).stat().st_mode) == 0o600
    assert {stat.S_IMODE(each.stat().st_mode) for each in (state, state.parent)} == {0o700}
    assert key.secret.hex() not in repr(key)


def test_of_many_that_make_it_at_once_all_have_one(state: Path) -> None:
    read, write = os.pipe()
    children = []
    for _ in range(8):
        if (pid := os.fork()) == 0:
            os.write(write, made_key().secret)
            os._exit(0)
        children.append(pid)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    secrets = os.read(read, 8 * 32)
    assert secrets == made_key().secret * 8
    assert [each.name for each in state.iterdir()] == [NAME]


def test_a_mark_is_of_one_key_kind_place_and_text(state: Path) -> None:
    key = made_key()
    mark = key.mark("merge", 7, b"text")
    assert key.has_made(mark, "merge", 7, b"text")
    (state / NAME).unlink()
    other = made_key()
    wrong = [
        other.has_made(mark, "merge", 7, b"text"),
        key.has_made(mark, "layer", 7, b"text"),
        key.has_made(mark, "merge", 8, b"text"),
        key.has_made(mark, "merge", 7, b"texts"),
        key.has_made("", "merge", 7, b"text"),
        key.has_made("\udcff", "merge", 7, b"text"),
    ]
    assert wrong == [False] * 6


def readable(path: Path) -> None:
    path.chmod(0o640)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def another(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [readable, emptied, another, linked, pipe])
def test_a_key_that_others_may_know_or_have_planted_is_refused(state: Path, spoil: Callable[[Path], None]) -> None:
    made_key()
    spoil(state / NAME)
    assert own_key() is None
    with pytest.raises(InvalidInput, match=NAME):
        made_key()


@root_only
def test_a_key_of_another_user_is_refused(state: Path) -> None:
    made_key()
    os.chown(state / NAME, ALICE, ALICE)
    with pytest.raises(InvalidInput, match="others may read or change it"):
        made_key()


@root_only
def test_root_keeps_its_key_where_the_service_does_unless_the_named_place_is_roots_alone(
    open_host: Path, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_key, "SYSTEM_STATE", tmp_path / "system")
    mine = made_key()
    assert (state / NAME).exists()
    alices = directory(open_host / "alice", uid=ALICE)
    monkeypatch.setenv("XDG_STATE_HOME", str(alices / "state"))
    system = made_key()
    assert system != mine
    assert list(alices.iterdir()) == []
    assert (tmp_path / "system" / NAME).exists()
    monkeypatch.delenv("XDG_STATE_HOME")
    assert made_key() == system
    os.chown(tmp_path / "system", ALICE, ALICE)
    with pytest.raises(InvalidInput, match=f"user {ALICE} may replace it"):
        made_key()


def test_where_nothing_can_be_kept_there_is_none(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_key, "SYSTEM_STATE", state)
    state.parent.write_bytes(b"no directory")
    assert own_key() is None
    with pytest.raises(InvalidInput, match=f"{state}.*: not a directory"):
        made_key()
