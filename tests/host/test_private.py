"""Root's own state, where its directory is not root's alone: it is neither used nor made."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from snapchain.errors import InvalidInput
from snapchain.host.private import PrivateDirectory, make_private
from snapchain.ops.own_state import read_own, write_own
from snapchain.replica.store import Marker
from tests.host.others import ALICE, KVM, directory, link, open_host, root_only

__all__ = ["open_host"]


@root_only
@pytest.mark.parametrize(
    ("uid", "gid", "mode"), [(ALICE, 0, 0o700), (0, KVM, 0o775), (0, 0, 0o777)], ids=["owner", "group", "everybody"]
)
def test_a_directory_that_others_can_replace_is_neither_used_nor_made(
    open_host: Path, uid: int, gid: int, mode: int
) -> None:
    """As where HOME is still the user's who called sudo."""
    home = directory(open_host / "home", uid=uid, gid=gid, mode=mode)
    with pytest.raises(InvalidInput, match="can replace this directory"):
        PrivateDirectory(home / "state" / "snapchain", make=True)
    assert not list(home.iterdir())
    directory(home / "state").joinpath("snapchain").mkdir(mode=0o700)
    with pytest.raises(InvalidInput, match="can replace this directory") as caught:
        PrivateDirectory(home / "state" / "snapchain")
    assert "HOME" in (caught.value.hint or "")


@root_only
@pytest.mark.parametrize("sticky", [False, True])
def test_no_link_of_others_chooses_where_root_makes_directories(open_host: Path, *, sticky: bool) -> None:
    secret = directory(open_host / "secret", mode=0o700)
    home = directory(open_host / "home", uid=0 if sticky else ALICE, mode=0o1777 if sticky else 0o700)
    link(home / ".local", secret, uid=ALICE)
    with pytest.raises((InvalidInput, PermissionError)):
        make_private(home / ".local" / "state")
    assert not list(secret.iterdir())


def test_the_mode_goes_to_what_was_made(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(each.stat().st_mode) for each in (tmp_path / "a", tmp_path / "a" / "b")} == {0o700}


@root_only
def test_what_was_counted_is_neither_read_nor_written_there(open_host: Path) -> None:
    home = directory(open_host / "home", uid=ALICE)
    for name in ("snapchain", "snapchain/sums"):
        directory(home / name)
    (home / "snapchain/sums/1.json").write_text(Marker().model_dump_json())
    with pytest.raises(InvalidInput, match="can replace this directory"):
        read_own(home / "snapchain/sums/1.json", Marker, largest=1000)
    with pytest.raises(InvalidInput, match="can replace this directory"):
        write_own(home / "snapchain/sums/2.json", Marker())
    assert [each.name for each in (home / "snapchain/sums").iterdir()] == ["1.json"]
