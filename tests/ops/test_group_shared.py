"""A repository in a setgid directory that a group may write to: every member ships, merges, collects and restores."""

from __future__ import annotations

import os
import stat
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from snapchain.errors import NotFound
from snapchain.model.retention import Policy
from snapchain.objects.local import LocalStore
from snapchain.objects.store import Refused
from snapchain.repository import collecting as gc
from snapchain.repository.leases import Mode
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from tests.ops.shipping import DISK, MiB, shipment
from tests.ops.stacks import Layer, build

GROUP = 54_321
ANNA, BERT, EVE = 54_001, 54_002, 54_003


def as_user(uid: int, work: Callable[[], object], *, groups: tuple[int, ...] = (GROUP,), umask: int = 0o077) -> None:
    """Do something in a child that is another user. Raises AssertionError with its traceback when it fails."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups(groups)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.umask(umask)
            work()
            status = 0
        except BaseException:  # noqa: BLE001 -- told to the parent
            os.write(write, traceback.format_exc().encode()[-8000:])
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as said:
        words = said.read().decode()
    _, status = os.waitpid(child, 0)
    assert status == 0, words


@pytest.fixture
def open_tmp(tmp_path: Path) -> Path:
    """A directory that other users may pass through. pytest's own are private."""
    for place in (tmp_path, *tmp_path.parents[:3]):
        if place.stat().st_mode & 0o077 == 0 and place.owner() == tmp_path.owner():
            place.chmod(place.stat().st_mode | 0o011)
    return tmp_path


@pytest.fixture
def shared(open_tmp: Path) -> Path:
    root = open_tmp / "shared"
    root.mkdir()
    os.chown(root, 0, GROUP)
    root.chmod(0o2770)
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    layers = [Layer(MiB, [f"write -P {n + 1} {n * 64}k 64k"]) for n in range(3)]
    chain = build(tmp_path_factory.mktemp("group") / "chain", layers)
    for path in chain:
        path.chmod(0o644)
        for place in (path.parent, *path.parents[1:4]):
            place.chmod(place.stat().st_mode | 0o011)
    return chain


def opened(root: Path) -> Repository:
    return Repository.open(LocalStore(root), passphrase=lambda: None, writing=True)


def created(root: Path) -> None:
    Repository.create(LocalStore(root, make=True), passphrase=lambda: None, encryption="none")


def warmed(folder: Path, files: list[Path]) -> None:
    """Everything once as root, so that no child has to import what it may not read."""
    created(folder)
    work_of_all(folder, files[0], "warm")


def work_of_all(root: Path, image: Path, disk: str) -> None:
    for _ in range(2):
        with shipment(image, opened(root), disk) as work:
            work.run()
    RepositoryMerge(opened(root), disk, Policy(last=1)).run()
    last = opened(root).catalogue(disk).points[-1].point
    opened(root).hold(disk, last, "tag")
    opened(root).release(disk, last, "tag")
    gc.run(opened(root))
    assert verify(opened(root), share=1.0).findings == ()
    with opened(root).lease(Mode.WRITE, "a test", on_wait=print) as lease:
        lease._put()
        lease.check()


def modes(root: Path) -> set[tuple[bool, int, int]]:
    """(is a directory, mode, group) of all below a root."""
    found = [path.stat() for path in root.rglob("*")]
    return {(stat.S_ISDIR(each.st_mode), stat.S_IMODE(each.st_mode), each.st_gid) for each in found}


def test_two_users_of_one_group_do_everything_in_turn(open_tmp: Path, shared: Path, files: list[Path]) -> None:
    warmed(open_tmp / "warm", files)
    as_user(ANNA, lambda: created(shared))
    for turn, (user, umask) in enumerate([(ANNA, 0o077), (BERT, 0o022), (ANNA, 0o002), (BERT, 0o077)]):
        as_user(user, partial(work_of_all, shared, files[turn % 3], DISK), umask=umask)
    assert modes(shared) == {(True, 0o2770, GROUP), (False, 0o660, GROUP)}
    (shared / "tmp" / "1-left").write_bytes(b"")
    os.chown(shared / "tmp" / "1-left", ANNA, GROUP)
    os.utime(shared / "tmp" / "1-left", (0, 0))
    as_user(BERT, lambda: LocalStore(shared).put("x", b""))
    assert not (shared / "tmp" / "1-left").exists()


def test_who_is_not_of_the_group_is_told_what_to_do(shared: Path) -> None:
    as_user(ANNA, lambda: LocalStore(shared).put("a/b", b""))

    def refused() -> None:
        with pytest.raises(Refused, match=f"^{shared}: permission denied$") as caught:
            LocalStore(shared).get("a/b")
        assert "chmod" in str(caught.value.hint)

    as_user(EVE, refused, groups=())


@pytest.mark.parametrize("mode", [0o700, 0o2755, 0o2750, 0o770, 0o755, 0o2700])
def test_all_else_stays_private(open_tmp: Path, mode: int) -> None:
    root = open_tmp / "root"
    root.mkdir()
    os.chown(root, ANNA, GROUP)
    root.chmod(mode)
    as_user(ANNA, lambda: LocalStore(root).put("a/b", b""), umask=0)
    assert {(folder, each & 0o777) for folder, each, _ in modes(root)} == {(True, 0o700), (False, 0o600)}
    assert stat.S_IMODE(root.stat().st_mode) == mode


@pytest.mark.parametrize(("umask", "is_shared"), [(0o002, True), (0o007, True), (0o022, False), (0o077, False)])
def test_a_new_root_in_a_shared_directory_follows_the_umask(shared: Path, umask: int, is_shared: bool) -> None:
    as_user(ANNA, lambda: LocalStore(shared / "new" / "root", make=True).put("a/b", b""), umask=umask)
    folders, file_mode = (0o2770, 0o660) if is_shared else (0o2700, 0o600)
    assert modes(shared) == {(True, folders, GROUP), (False, file_mode, GROUP)}


def test_a_repository_that_is_shared_later_opens_what_is_its_user_s(shared: Path) -> None:
    shared.chmod(0o700)
    os.chown(shared, ANNA, GROUP)
    as_user(ANNA, lambda: LocalStore(shared).put("a/b", b""))
    shared.chmod(0o2770)
    as_user(ANNA, lambda: LocalStore(shared).put("a/c", b""))
    as_user(BERT, lambda: LocalStore(shared).put("a/d", b""))
    folder = (shared / "a").stat()
    assert stat.S_IMODE(folder.st_mode) & 0o2770 == 0o2770


def test_a_permission_names_what_is_there_and_no_random_name(open_tmp: Path) -> None:
    root = open_tmp / "root"
    LocalStore(root, make=True).put("packs/a", b"secret")
    root.chmod(0o755)

    def refused() -> None:
        with pytest.raises(Refused, match="permission denied") as caught:
            LocalStore(root)
        assert caught.value.subject == str(root)

    root.chmod(0o700)
    as_user(EVE, refused, groups=())
    for path, mode in [(root, 0o755), (root / "packs", 0o755), (root / "tmp", 0o777), (root / "packs/a", 0o600)]:
        path.chmod(mode)

    def read_and_write() -> None:
        store = LocalStore(root)
        calls: list[tuple[Callable[[], object], Path]] = [
            (lambda: store.get("packs/a"), root / "packs/a"),
            (lambda: store.put("packs/0123456789", b""), root / "packs"),
            (lambda: store.create("packs/0123456789", b""), root / "packs"),
            (lambda: store.delete("packs/a"), root / "packs/a"),
            (lambda: store.put("leases/w-0123", b""), root),
        ]
        for call, subject in calls:
            with pytest.raises(Refused, match=r"^[^ ]*: permission denied$") as caught:
                call()
            assert caught.value.subject == str(subject)
        with pytest.raises(NotFound, match="packs/none"):
            store.get("packs/none")

    as_user(EVE, read_and_write, groups=())
