"""Small files of this user alone: where somebody else could have put them, nothing is made, read or believed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from snapchain.errors import InvalidInput, NotFound
from snapchain.host.private import PrivateDirectory, make_private, read_own
from tests.host.others import ALICE, directory, file, link, open_host, root_only
from tests.ops.test_group_shared import as_user

__all__ = ["open_host"]


def test_what_is_written_is_read_and_what_is_there_stays(tmp_path: Path) -> None:
    with PrivateDirectory(tmp_path / "state", make=True) as state:
        with pytest.raises(NotFound, match="no such file"):
            state.read("record", cap=10)
        state.write_once("record", b"first")
        state.write_once("record", b"second")
        assert state.read("record", cap=5, is_secret=True) == b"first"
        state.write("record", b"third")
        assert state.read("record", cap=5) == b"third"
        with pytest.raises(InvalidInput, match="larger than the 4 bytes") as caught:
            state.read("record", cap=4)
        assert caught.value.subject == str(tmp_path / "state" / "record")
        assert state.names() == ["record"]
        state.remove("record")
        state.remove("record")
        assert state.names() == []


def writable(path: Path) -> None:
    path.chmod(0o620)


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def replaced(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (writable, "another user may have written it"),
        (linked, "a symbolic link"),
        (fifo, "a FIFO"),
        (replaced, "a directory"),
    ],
)
def test_a_file_that_somebody_else_may_have_put_there_is_not_read(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "state" / "record"
    with PrivateDirectory(path.parent, make=True) as state:
        state.write(path.name, b"own")
        spoil(path)
        with pytest.raises(InvalidInput, match=words) as caught:
            state.read(path.name, cap=10)
        assert caught.value.subject == str(path)
        with pytest.raises(InvalidInput, match=words):
            read_own(path, cap=10)


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    with PrivateDirectory(tmp_path / "state", make=True) as state:
        state.write("key", b"secret")
        (tmp_path / "state" / "key").chmod(0o640)
        assert state.read("key", cap=10) == b"secret"
        with pytest.raises(InvalidInput, match="others may read or change it"):
            state.read("key", cap=10, is_secret=True)


def test_a_directory_may_be_no_link_and_the_way_to_it_may(tmp_path: Path) -> None:
    make_private(tmp_path / "there" / "state")
    (tmp_path / "way").symlink_to("there")
    with PrivateDirectory(tmp_path / "way" / "state") as state:
        assert state.names() == []
    with pytest.raises(InvalidInput, match="not a directory"):
        PrivateDirectory(tmp_path / "way")


@root_only
def test_root_uses_no_state_below_a_directory_of_another_user(open_host: Path) -> None:
    """As `sudo` leads it there, which may keep HOME. They could swap it at any moment."""
    home = directory(open_host / "alice", uid=ALICE)
    roots = directory(home / "state")
    record = file(roots / "record", "root's")
    with pytest.raises(InvalidInput, match=f"user {ALICE} may replace it") as caught:
        PrivateDirectory(roots, make=True)
    assert "XDG_STATE_HOME" in str(caught.value.hint)
    with pytest.raises(InvalidInput, match="another user may have written it"):
        read_own(record, cap=10)
    with pytest.raises(InvalidInput, match=f"user {ALICE} may replace it"):
        PrivateDirectory(home)


@root_only
@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_directories_that_are_made_belong_to_the_user_of_the_place_and_have_one_mode(
    open_host: Path, umask: int
) -> None:
    home = directory(open_host / "alice", uid=ALICE)
    before = os.umask(umask)
    try:
        make_private(home / "a" / "b")
        as_user(ALICE, lambda: make_private(home / "c" / "d"), groups=(), umask=umask)
    finally:
        os.umask(before)
    found = {each.name: each.stat() for each in home.rglob("*")}
    assert sorted(found) == ["a", "b", "c", "d"]
    assert {(status.st_uid, stat.S_IMODE(status.st_mode)) for status in found.values()} == {(ALICE, 0o700)}


@root_only
def test_a_swapped_directory_that_was_just_made_gets_no_mode(open_host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = directory(open_host / "alice", uid=ALICE)
    secret = directory(open_host / "secret", mode=0o711)
    make = os.mkdir

    def swapped(name: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        make(name, mode, dir_fd=dir_fd)
        os.rmdir(name, dir_fd=dir_fd)
        os.symlink(secret, name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", swapped)
    with pytest.raises(InvalidInput, match="not a directory"):
        make_private(home / "state")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o711


@root_only
@pytest.mark.parametrize("sticky", [False, True])
def test_no_link_of_others_chooses_where_root_makes_directories(open_host: Path, *, sticky: bool) -> None:
    secret = directory(open_host / "secret", mode=0o700)
    home = directory(open_host / "home", uid=0 if sticky else ALICE, mode=0o1777 if sticky else 0o700)
    link(home / ".local", secret, uid=ALICE)
    with pytest.raises(InvalidInput, match="permission denied to user"):
        make_private(home / ".local" / "state")
    assert not list(secret.iterdir())
