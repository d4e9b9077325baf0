"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from snapchain.errors import Conflict, InvalidInput, NotFound, Unavailable
from snapchain.host import files
from snapchain.host.temporary_names import temporary_beside

ACCESS_LIST = "system.posix_acl_access"
NO_ID = 0xFFFFFFFF


def test_a_new_file_is_ours_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        os.close(files.open_or_make(tmp_path / "new"))
    finally:
        os.umask(old)
    assert (tmp_path / "new").stat().st_mode & 0o7777 == 0o600
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    for taken in ("new", "dangling"):
        with pytest.raises(Conflict, match=f"{taken}: it exists already"), files.directory_of(tmp_path / taken) as home:
            home.create(taken)
    assert not (tmp_path / "elsewhere").exists()


def test_write_atomically_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "record"
    files.write_atomically(path, b"one")
    files.write_atomically(path, b"two")
    assert files.read_small(path) == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["record"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failed_write_leaves_the_old_bytes(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "record"
    files.write_atomically(path, b"one")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(Unavailable, match="no space"):
            files.write_atomically(path, b"two")
    assert path.read_bytes() == b"one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["record"]


def test_read_small_is_bounded_and_follows_nothing(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(11))
    with pytest.raises(InvalidInput, match="big: larger than the 10 bytes"):
        files.read_small(tmp_path / "big", cap=10)
    (tmp_path / "link").symlink_to("big")
    with pytest.raises(InvalidInput, match="link: a symbolic link"):
        files.read_small(tmp_path / "link")
    with pytest.raises(NotFound, match="none: no such file"):
        files.read_small(tmp_path / "none")


def test_standing_is_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"")
    os.close(files.open_or_make(target))
    source.chmod(0o640)
    os.setxattr(source, "user.note", b"kept")
    if os.geteuid() == 0:
        os.chown(source, 1234, 4321)
    files.copy_standing(*opened(source, target), subject=target)
    assert target.stat().st_mode == source.stat().st_mode
    assert (target.stat().st_uid, target.stat().st_gid) == (source.stat().st_uid, source.stat().st_gid)
    assert os.getxattr(target, "user.note") == b"kept"


def access_list(group_mask: int) -> bytes:
    """A POSIX access list, as the kernel keeps it: read and write for user 65534, as far as the mask lets him."""
    entries = [(1, 6, NO_ID), (2, 6, 65534), (4, 0, NO_ID), (16, group_mask, NO_ID), (32, 0, NO_ID)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@pytest.mark.parametrize("old", ["list", "none"])
@pytest.mark.parametrize("new", ["list", "none"])
def test_access_lists_are_those_of_the_old_file(tmp_path: Path, old: str, new: str) -> None:
    """Also where the directory has given the new file one, which the old file has not."""
    source, target = tmp_path / "source", tmp_path / "target"
    for path, has, mask in ((source, old, 6), (target, new, 4)):
        os.close(files.open_or_make(path))
        if has == "list":
            try:
                os.setxattr(path, ACCESS_LIST, access_list(mask))
            except OSError:
                pytest.skip("this filesystem has no access lists")
    source.chmod(0o660 if old == "list" else 0o640)
    files.copy_standing(*opened(source, target), subject=target)
    assert target.stat().st_mode == source.stat().st_mode
    assert os.listxattr(target) == os.listxattr(source)
    if old == "list":
        assert os.getxattr(target, ACCESS_LIST) == os.getxattr(source, ACCESS_LIST)


def test_a_temporary_name_fits(tmp_path: Path) -> None:
    for name in ("disk.qcow2", "ä" * 127, "x" * 255):
        temporary = temporary_beside(tmp_path / name, purpose="merge")
        os.close(files.open_or_make(temporary))
        assert temporary.name.startswith(".")


def test_a_name_is_removed_once(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x")
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    files.remove(tmp_path / "two")
    files.remove(tmp_path / "two")
    assert [entry.name for entry in tmp_path.iterdir()] == ["one"]


FOREIGN = 54321


def opened(*paths: Path) -> list[int]:
    return [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in paths]


def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, mode: int, uid: int | None = None) -> tuple[int, int]:
    """An image of another group (or user), and the file to take its place, of somebody who can give it neither."""
    image, fresh = opened(tmp_path / "image", tmp_path / "fresh")
    os.fchmod(image, mode)
    fstat = os.fstat

    def standing(fd: int) -> os.stat_result:
        fields = list(fstat(fd))
        if fd == image:
            fields[4:6] = [fields[4] if uid is None else uid, FOREIGN]
        return os.stat_result(fields)

    def chown(_fd: int, _uid: int, _gid: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fstat", standing)
    monkeypatch.setattr(os, "fchown", chown)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    return image, fresh


def refusals(image: int, fresh: int) -> list[Callable[[], object]]:
    return [
        lambda: files.copy_standing(image, fresh, subject="image"),
        lambda: files.check_standing(os.fstat(image), os.fstat(fresh), subject="image"),
    ]


@pytest.mark.parametrize("mode", range(0o400, 0o1000, 0o11))
def test_a_group_that_cannot_be_given_matters_where_the_mode_names_it(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, fresh = foreign(tmp_path, monkeypatch, mode=mode)
    if mode >> 3 & 7 == mode & 7:
        lost = files.copy_standing(image, fresh, subject="image")
        assert lost is not None
        assert str(FOREIGN) in lost
        assert os.fstat(fresh).st_mode & 0o7777 == mode & 0o666
        return
    for refuse in refusals(image, fresh):
        with pytest.raises(InvalidInput, match=f"the group of the old one, {FOREIGN}") as raised:
            refuse()
        assert raised.value.subject == "image"
        assert "member of the group" in str(raised.value.hint)


def test_an_owner_that_cannot_be_given_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for refuse in refusals(*foreign(tmp_path, monkeypatch, mode=0o600, uid=FOREIGN)):
        with pytest.raises(InvalidInput, match=f"the owner of the old one, {FOREIGN}") as raised:
            refuse()
        assert raised.value.subject == "image"


def test_nothing_is_said_where_all_was_given(tmp_path: Path) -> None:
    image, fresh = opened(tmp_path / "image", tmp_path / "fresh")
    files.check_standing(os.fstat(image), os.fstat(fresh), subject="image")
    assert files.copy_standing(image, fresh, subject="image") is None


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6777, 0o1777, 0o700])
def test_nobody_gets_the_right_to_run_a_file(tmp_path: Path, mode: int) -> None:
    image, fresh = opened(tmp_path / "image", tmp_path / "fresh")
    os.fchmod(image, mode)
    files.copy_standing(image, fresh, subject="image")
    assert os.fstat(fresh).st_mode & 0o7777 == mode & 0o666
