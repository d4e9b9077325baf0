"""Directories by descriptor, with the rights of whoever may write to them."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from snapchain.errors import Conflict, InvalidInput, SnapchainError, Unsupported
from snapchain.host import files
from snapchain.host.directory import Directory, open_behind
from snapchain.host.path_resolution import resolve
from snapchain.host.rights import EVERYBODY, DeniedToOther, Rights
from tests.host.others import ALICE, BOB, KVM, directory, file, link, root_only

NO_ID = 0xFFFFFFFF


def rights_in(path: Path) -> Rights | None:
    with Directory.open(path) as opened:
        return opened.rights


# --- whose rights


@root_only
@pytest.mark.parametrize(
    ("uid", "gid", "mode", "expected"),
    [
        (0, 0, 0o755, None),
        (0, 0, 0o711, None),
        (0, 0, 0o775, None),  # group 0 is root's
        (0, KVM, 0o755, None),
        (0, KVM, 0o775, Rights.of_group(KVM)),
        (0, KVM, 0o2770, Rights.of_group(KVM)),
        (0, KVM, 0o1775, None),
        (0, 0, 0o777, EVERYBODY),
        (0, KVM, 0o777, EVERYBODY),
        (0, 0, 0o1777, None),
        (ALICE, 0, 0o755, Rights.of_user(ALICE)),
        (ALICE, ALICE, 0o700, Rights.of_user(ALICE)),
        (ALICE, KVM, 0o1777, Rights.of_user(ALICE)),
    ],
)
def test_whose_rights_a_directory_is_used_with(
    open_host: Path, uid: int, gid: int, mode: int, expected: Rights | None
) -> None:
    outer = directory(open_host / "outer", uid=uid, gid=gid, mode=mode)
    assert rights_in(outer) == expected
    if expected is None or expected.uid == ALICE:
        assert rights_in(directory(outer / "root's")) == expected
    assert rights_in(open_host) is None


def access_list(*entries: tuple[int, int, int], mask: int = 7) -> bytes:
    whole = [(1, 7, NO_ID), *entries, (16, mask, NO_ID), (32, 5, NO_ID)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in sorted(whole))


@root_only
@pytest.mark.parametrize(
    ("entries", "mask", "expected"),
    [
        ([(4, 5, NO_ID), (2, 7, ALICE)], 7, Rights.of_user(ALICE)),
        ([(4, 5, NO_ID), (2, 7, ALICE)], 5, None),
        ([(4, 5, NO_ID), (2, 5, ALICE)], 7, None),
        ([(4, 5, NO_ID), (8, 7, KVM)], 7, Rights.of_group(KVM)),
        ([(4, 7, NO_ID)], 7, None),
    ],
)
def test_access_lists_name_who_may_write(
    open_host: Path, entries: list[tuple[int, int, int]], mask: int, expected: Rights | None
) -> None:
    made = directory(open_host / "d")
    os.setxattr(made, "system.posix_acl_access", access_list(*entries, mask=mask))
    assert rights_in(made) == expected


@root_only
def test_two_users_on_one_path_are_refused(open_host: Path) -> None:
    alices = directory(open_host / "alice", uid=ALICE)
    for name, uid, gid, mode in (("b", BOB, BOB, 0o755), ("g", 0, KVM, 0o775), ("w", 0, 0, 0o777)):
        with pytest.raises(Unsupported, match=f"user {ALICE} and .* could use root against each other") as raised:
            rights_in(directory(alices / name, uid=uid, gid=gid, mode=mode))
        assert raised.value.subject == str(alices / name)
    both = directory(open_host / "both")
    os.setxattr(both, "system.posix_acl_access", access_list((4, 5, NO_ID), (2, 7, ALICE), (2, 7, BOB)))
    with pytest.raises(Unsupported, match=f"user {ALICE} and user {BOB}"):
        rights_in(both)


@root_only
@pytest.mark.parametrize("kind", ["absolute", "relative", "above"])
def test_links_are_followed_with_the_rights_where_they_lie(open_host: Path, kind: str) -> None:
    secret = directory(open_host / "secret", mode=0o700)
    file(secret / "disk")
    alices = directory(open_host / "alice", uid=ALICE)
    targets: dict[str, str | Path] = {"absolute": secret, "relative": "../secret", "above": "../alice/../secret"}
    target = targets[kind]
    link(alices / "vms", target, uid=ALICE)
    with Directory.open(alices / "vms") as opened:
        assert opened.rights == Rights.of_user(ALICE)
        for use in (opened.names, lambda: opened.open_file("disk"), lambda: opened.create("new")):
            with pytest.raises(DeniedToOther, match="Permission denied"):
                use()
        changes: list[Callable[[], object]] = [
            lambda: opened.remove("disk"),
            lambda: opened.rename("disk", "d"),
            lambda: opened.link("disk", "d"),
        ]
        for change in changes:
            with pytest.raises(DeniedToOther, match="Permission denied"):
                change()
    link(open_host / "trusted", secret)
    assert rights_in(open_host / "trusted") is None
    assert sorted(path.name for path in secret.iterdir()) == ["disk"]


@root_only
def test_a_link_in_a_sticky_directory_is_its_owners(open_host: Path) -> None:
    secret = directory(open_host / "secret", mode=0o700)
    shared = directory(open_host / "shared", mode=0o1777)
    link(shared / "alices", secret, uid=ALICE)
    link(shared / "roots", secret)
    assert rights_in(shared / "alices") == Rights.of_user(ALICE)
    assert rights_in(shared / "roots") is None
    os.link(shared / "roots", shared / "second", follow_symlinks=False)  # as anybody could
    assert rights_in(shared / "second") == EVERYBODY
    assert rights_in(directory(shared / "d", uid=ALICE)) == Rights.of_user(ALICE)


@pytest.mark.parametrize("path", ["loop", "file/x", "file/..", "none/x", "dangling/x"])
def test_paths_that_lead_nowhere(tmp_path: Path, path: str) -> None:
    link(tmp_path / "loop", "loop", uid=os.geteuid())
    link(tmp_path / "dangling", "nowhere", uid=os.geteuid())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Too many|Not a dir|No such") as ours:
        Directory.open(tmp_path / path)
    with pytest.raises(OSError, match=r"Too many|Not a dir|No such") as theirs:
        os.open(tmp_path / path, os.O_PATH | os.O_DIRECTORY)
    assert ours.value.errno == theirs.value.errno


@pytest.mark.parametrize(
    "path", ["a/b", "a/../a/b/..", "to-b", "to-b/..", "to-b/none/deeper", "absolute/b", "up/a/b", "b/to-file", "../x"]
)
def test_resolving_is_what_realpath_does(tmp_path: Path, path: str) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "file").touch()
    for name, target in {"to-b": "a/b", "absolute": f"{tmp_path}/a", "up": "..", "b/to-file": "../a/file"}.items():
        (tmp_path / name).symlink_to(target)
    assert resolve(tmp_path / path).real == Path(os.path.realpath(tmp_path / path))


@root_only
def test_resolving_says_who_has_chosen_the_place(open_host: Path) -> None:
    secret = directory(open_host / "secret", mode=0o755)
    alices = directory(open_host / "alice", uid=ALICE)
    file(alices / "own", uid=ALICE)
    file(secret / "disk")
    link(alices / "there", secret / "disk", uid=ALICE)
    link(alices / "here", "own", uid=ALICE)
    link(open_host / "into", alices / "own")
    assert resolve(alices / "there").chosen_by == Rights.of_user(ALICE)
    assert resolve(alices / "there").real == secret / "disk"
    for path in (alices / "here", alices / "own", open_host / "into", secret / "disk"):
        assert resolve(path).chosen_by is None


# --- files


@root_only
def test_a_file_in_somebodys_directory_is_opened_with_their_rights(open_host: Path) -> None:
    alices = directory(open_host / "alice", uid=ALICE)
    elsewhere = file(open_host / "secret", "secret")
    file(alices / "own", uid=ALICE)
    file(alices / "libvirt's", uid=BOB)
    os.link(elsewhere, alices / "hard")
    link(alices / "soft", elsewhere, uid=ALICE)
    with Directory.open(alices) as opened:
        for name in ("own", "libvirt's"):
            os.close(opened.open_file(name, writing=True))
        with pytest.raises(DeniedToOther, match="Permission denied"):
            opened.open_file("hard")
        with pytest.raises(InvalidInput, match="soft: a symbolic link, not a regular file"):
            opened.open_file("soft")


@root_only
@pytest.mark.parametrize("names", [1, 2, 3])
def test_a_file_with_several_names_in_one_directory_is_opened_for_root(open_host: Path, names: int) -> None:
    """Two of them is what a killed snapshot leaves."""
    alices = directory(open_host / "alice", uid=ALICE)
    qemus = file(alices / "disk", uid=BOB)
    for number in range(1, names):
        os.link(qemus, alices / f"disk.{number}")
    with Directory.open(alices) as opened:
        os.close(opened.open_file("disk"))
        files.set_mode(qemus, 0o440)
        os.link(qemus, open_host / "elsewhere")
        with pytest.raises(DeniedToOther, match="Permission denied"):
            opened.open_file("disk")
        with pytest.raises(InvalidInput, match=f"permission denied to user {ALICE}"):
            files.set_mode(qemus, 0o666)


@root_only
def test_a_link_that_is_removed_while_it_is_judged_is_not_opened_for_root(open_host: Path) -> None:
    """Then the one name that is left is the one elsewhere."""
    alices = directory(open_host / "alice", uid=ALICE)
    os.link(file(open_host / "secret"), alices / "disk")
    with Directory.open(alices) as opened, pytest.raises(DeniedToOther, match="Permission denied"):
        opened.open_file("disk", check=lambda _: (alices / "disk").unlink())
    readable = file(open_host / "passwd", mode=0o644)
    os.link(readable, alices / "disk")
    with Directory.open(alices) as opened:
        fd = opened.open_file("disk")
        (alices / "disk").unlink()
        with pytest.raises(DeniedToOther, match="not permitted"), opened.changing(fd):
            os.fchmod(fd, 0o666)
        os.close(fd)


@root_only
def test_a_link_that_is_made_while_names_are_counted_does_not_count(
    open_host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alices = directory(open_host / "alice", uid=ALICE)
    os.link(file(open_host / "secret"), alices / "disk")
    names, is_name_of = Directory.names, Directory._is_name_of

    def more(opened: Directory) -> list[str]:
        os.link(alices / "disk", alices / "more")
        return names(opened)

    def looked_at(opened: Directory, name: str, status: os.stat_result) -> bool:
        found = is_name_of(opened, name, status)
        if name == "more":
            (alices / "more").unlink()
        return found

    monkeypatch.setattr(Directory, "names", more)
    monkeypatch.setattr(Directory, "_is_name_of", looked_at)
    with Directory.open(alices) as opened, pytest.raises(DeniedToOther, match="Permission denied"):
        opened.open_file("disk")
    assert not (alices / "more").exists()


@root_only
def test_a_file_that_somebody_moved_into_another_directory_is_not_opened_for_root(open_host: Path) -> None:
    """Only where it lies in their own; a swapped directory is no such place."""
    alices = directory(open_host / "alice", uid=ALICE)
    roots = directory(open_host / "roots")
    file(roots / "disk")
    link(alices / "vms", roots, uid=ALICE)
    with Directory.open(alices / "vms") as opened, pytest.raises(DeniedToOther, match="Permission denied"):
        opened.open_file("disk")


@root_only
def test_files_in_a_sticky_directory(open_host: Path) -> None:
    shared = directory(open_host / "shared", mode=0o1777)
    secret = file(open_host / "secret")
    file(shared / "roots")
    file(shared / "alices", uid=ALICE)
    os.link(secret, shared / "hard")
    os.link(file(open_host / "bobs", uid=BOB), shared / "bobs")
    with Directory.open(shared) as opened:
        for name in ("roots", "alices", "bobs"):
            os.close(opened.open_file(name))
        with pytest.raises(DeniedToOther, match="Permission denied"):
            opened.open_file("hard")


def test_nothing_but_files_and_devices_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("/dev/null")
    with Directory.open(tmp_path) as opened:
        for name, kind in (("fifo", "a FIFO"), ("directory", "a directory"), ("link", "a symbolic link")):
            with pytest.raises(Unsupported, match=f"{name}: {kind}, not a regular file or block device"):
                opened.open_file(name, refusal=Unsupported)
    with Directory.open(Path("/dev")) as opened, pytest.raises(InvalidInput, match="null: a character device"):
        opened.open_file("null")


@root_only
def test_a_new_file_is_roots_whoever_owns_the_directory(open_host: Path) -> None:
    for name, uid, mode in (("alice", ALICE, 0o755), ("all", 0, 0o777), ("sticky", 0, 0o1777)):
        with Directory.open(directory(open_host / name, uid=uid, mode=mode)) as opened:
            fd = opened.create("new", mode=0o7777)
            status = os.fstat(fd)
            os.close(fd)
            assert (status.st_uid, status.st_mode & 0o7777 & ~0o666) == (0, 0)
            link(open_host / name / "dangling", "nowhere", uid=ALICE)
            with pytest.raises(FileExistsError, match="File exists"):
                opened.create("dangling")


@root_only
def test_changes_of_a_file_are_made_with_the_rights_of_its_directory(open_host: Path) -> None:
    """A hard link leads root to a file of root's: what its user could not do to it is not done."""
    readable = file(open_host / "passwd", mode=0o644)
    alices = directory(open_host / "alice", uid=ALICE)
    os.link(readable, alices / "disk")
    with pytest.raises(InvalidInput, match=f"disk: permission denied to user {ALICE}"):
        files.set_mode(alices / "disk", 0o666)
    assert readable.stat().st_mode & 0o7777 == 0o644
    for name, uid in (("own", ALICE), ("libvirt's", BOB), ("roots", 0)):
        files.set_mode(file(alices / name, uid=uid), 0o440)
        assert (alices / name).stat().st_mode & 0o7777 == 0o440


def test_a_mode_beyond_reading_and_writing_is_not_given(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    for before, asked in itertools.product((0o600, 0o755, 0o640), (0o6777, 0o4755, 0o444, 0o000)):
        path.chmod(before)
        files.set_mode(path, asked)
        assert path.stat().st_mode & 0o7777 == asked & 0o666 | before & 0o111
        path.chmod(0o600)


# --- names


def test_names_are_of_this_directory_only(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    directory(tmp_path / "sub", uid=os.geteuid())
    with Directory.open(tmp_path / "sub") as opened:
        for name in ("", ".", "..", "../file", "/etc/passwd", "a/b", "nul\0"):
            for use in (
                opened.create, opened.make_directory, opened.open_file, opened.status, opened.has, opened.remove,
                lambda name: opened.rename(name, "x"), lambda name: opened.rename("x", name),
                lambda name: opened.link(name, "x"), lambda name: opened.link("x", name),
            ):  # fmt: skip
                with pytest.raises(InvalidInput, match="not the name of a file in a directory"):
                    use(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "sub"]


def test_renames_links_and_removals(tmp_path: Path) -> None:
    with Directory.open(tmp_path) as opened:
        os.close(opened.create("one"))
        one = opened.status("one")
        opened.link("one", "two")
        with pytest.raises(FileExistsError, match="File exists"):
            opened.link("one", "two")
        opened.rename("one", "three")
        assert opened.names() == ["three", "two"]
        os.close(opened.create("other"))
        assert not opened.remove("other", only=one)
        assert opened.remove("two", only=one)
        assert not opened.remove("two")
        opened.sync()
        assert opened.names() == ["other", "three"]


def test_a_pinned_directory_stays_the_same_when_its_name_is_swapped(tmp_path: Path) -> None:
    one, other = directory(tmp_path / "one", uid=os.geteuid()), directory(tmp_path / "other", uid=os.geteuid())
    with Directory.open(one) as opened:
        one.rename(tmp_path / "moved")
        other.rename(one)
        os.close(opened.create("new"))
    assert (tmp_path / "moved" / "new").exists()
    assert not (one / "new").exists()


def test_paths_without_links_may_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(".")
    with pytest.raises(OSError, match="Not a directory"):
        Directory.open(tmp_path / "link", follow=False)
    Directory.open(tmp_path, follow=False).close()


@root_only
def test_descriptors_are_given_back(open_host: Path) -> None:
    alices = directory(open_host / "alice", uid=ALICE)
    link(alices / "link", "/nowhere/deep", uid=ALICE)
    link(alices / "loop", "loop", uid=ALICE)
    directory(alices / "bob", uid=BOB)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in ("link", "loop", "bob", "none", "."):
        try:
            Directory.open(alices / name).close()
            resolve(alices / name)
        except (OSError, SnapchainError):
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@root_only
@pytest.mark.parametrize("moment", ["before", "between"])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_name_that_is_swapped_is_not_taken_for_ours(
    open_host: Path, monkeypatch: pytest.MonkeyPatch, moment: str, *, replacing: bool
) -> None:
    alices = directory(open_host / "alice", uid=ALICE)

    def swap() -> None:
        (alices / "temporary").unlink()
        file(alices / "temporary", "planted", uid=ALICE)

    with Directory.open(alices) as opened:
        old = file(alices / "final", uid=ALICE).stat() if replacing else None
        fd = opened.create("temporary")
        if moment == "before":
            swap()
        else:
            change = "rename" if replacing else "link"
            real = getattr(Directory, change)

            def swapped(self: Directory, one: str, other: str) -> None:
                swap()
                real(self, one, other)

            monkeypatch.setattr(Directory, change, swapped)
        with pytest.raises(Conflict, match="another file took its name meanwhile") as raised:
            opened.give_name(fd, "temporary", "final", replacing=old)
        os.close(fd)
    assert raised.value.subject == str(alices / ("temporary" if moment == "before" else "final"))
    assert raised.value.hint


@root_only
def test_a_file_is_not_even_opened_where_its_chooser_may_not_read_it(
    open_host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alices = directory(open_host / "alice", uid=ALICE)
    secret = file(open_host / "secret")
    link(alices / "disk", secret, uid=ALICE)
    opened: list[int] = []
    real = os.open

    def counted(path: str, flags: int, *more: int, **named: int) -> int:
        fd = real(path, flags, *more, **named)
        if not flags & os.O_PATH:
            opened.append(fd)
        return fd

    monkeypatch.setattr(os, "open", counted)
    with pytest.raises(DeniedToOther, match="Permission denied"):
        open_behind(alices / "disk")
    assert opened == []
