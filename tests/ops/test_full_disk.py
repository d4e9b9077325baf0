"""A repository whose disk is full: gc, merge and hold work by the reserve, and without one gc does what it can."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from snapchain.model.retention import Policy
from snapchain.objects.local import LocalStore
from snapchain.objects.reserve import LARGEST, NAME
from snapchain.objects.store import Refused
from snapchain.repository import collecting as gc, packs
from snapchain.repository.leases import DEAD_SECONDS, Mode
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from tests.image.mounts import mounted
from tests.ops.shipping import DISK, MiB, local, restore, ship
from tests.ops.stacks import Layer, build, flat
from tests.repository.synthetic import again

Work = Callable[[Repository], object]


def collecting(repo: Repository) -> object:
    return gc.run(repo)


def merging(repo: Repository) -> object:
    return RepositoryMerge(repo, DISK, Policy(last=1)).run()


def holding(repo: Repository) -> object:
    return repo.hold(DISK, 3, "audit")


WORK: dict[str, Work] = {"gc": collecting, "merge": merging, "hold": holding}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    layers = [Layer(MiB, [f"write -P {9 * n + at + 1} {(2 * n + at) * 64}k 64k" for at in range(4)]) for n in range(3)]
    return build(tmp_path_factory.mktemp("full") / "chain", layers)


@pytest.fixture
def repo(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """Three points, of which two are merged away, and packs that nobody needs."""
    monkeypatch.setattr(packs, "PACK_BYTES", 400)
    made = local(tmp_path / "repo")
    for path in files:
        ship(path, made)
    (passing,) = build(tmp_path / "passing", [Layer(MiB, ["write -P 99 0 256k"])])
    ship(passing, made, disk="other")
    ship(files[0], made, disk="other")
    RepositoryMerge(again(made), "other", Policy(last=1)).run()
    return made


def root(repo: Repository) -> Path:
    assert isinstance(repo.store, LocalStore)
    return repo.store.root


@contextmanager
def full(monkeypatch: pytest.MonkeyPatch, is_full: Callable[[], bool], number: int = errno.ENOSPC) -> Iterator[None]:
    """While `is_full`, nothing can be written to a file."""
    write = os.writev

    def writev(fd: int, views: list[memoryview]) -> int:
        if is_full():
            raise OSError(number, os.strerror(number))
        return write(fd, views)

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", writev)
        yield


def sound(repo: Repository, files: list[Path], tmp_path: Path) -> None:
    assert verify(again(repo), share=1.0).findings == ()
    out = tmp_path / "out.raw"
    out.unlink(missing_ok=True)
    restore(repo, out, 3)
    assert out.read_bytes() == flat(files[-1], tmp_path / "flat").read_bytes()
    assert list(repo.store.list("leases/")) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("work", WORK)
def test_a_full_disk_gives_up_the_reserve(
    repo: Repository, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str, number: int
) -> None:
    reserve = root(repo) / NAME
    assert reserve.stat().st_size == LARGEST
    before = sum(info.size for info in repo.store.list("packs/"))
    with full(monkeypatch, reserve.exists, number):
        WORK[work](again(repo))
    assert reserve.stat().st_size == LARGEST, "made again, where there is room"
    assert (sum(info.size for info in repo.store.list("packs/")) < before) == (work == "gc")
    sound(repo, files, tmp_path)


def test_what_adds_to_a_full_disk_leaves_the_reserve(
    repo: Repository, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = root(repo) / NAME
    with full(monkeypatch, reserve.exists), pytest.raises(Refused, match="no space left"):
        ship(files[-1], repo, disk="new")
    assert reserve.stat().st_size == LARGEST


def _refusal(job: Callable[[], object]) -> Refused | None:
    try:
        job()
    except Refused as error:
        return error
    return None


@pytest.mark.parametrize("reserved", [True, False], ids=["reserve", "none"])
@pytest.mark.parametrize("work", WORK)
def test_no_room_from_any_write_on(
    repo: Repository, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str, reserved: bool
) -> None:
    """However soon the reserve is not enough: what was there stays whole, and once there is room the work is done."""
    for after in range(0, 60, 3):
        twin = tmp_path / f"twin{after}"
        subprocess.run(["cp", "-a", root(repo), twin], check=True)
        if not reserved:
            (twin / NAME).unlink()
        left = [after]

        def is_full(left: list[int] = left) -> bool:
            left[0] -= 1
            return left[0] < 0

        store = LocalStore(twin)
        with full(monkeypatch, is_full):
            refused = _refusal(lambda store=store: WORK[work](again(repo, store)))  # type: ignore[misc]
        for info in list(store.list("leases/")):
            assert info.name.startswith("leases/g-"), "a lease that was not taken away is an empty one"
        sound(again(repo, store), files, tmp_path)
        WORK[work](again(repo, store))
        sound(again(repo, store), files, tmp_path)
        if refused is None:
            return
        assert "no space left" in refused.message
    raise AssertionError("it never came to its end")


def dead_writer(repo: Repository, store: LocalStore, *disks: str) -> str:
    """The name of a lease that nobody keeps up; whether its holder runs is not known."""
    lease = again(repo, store).lease(Mode.WRITE, "ship", on_wait=print, disks=disks)
    lease.__enter__()
    lease._done.set()
    path = store.root / lease.name
    os.utime(path, (time.time() - 2 * DEAD_SECONDS,) * 2)
    return lease.name


def test_the_dead_are_fenced_into_the_room_of_history(
    repo: Repository, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a reserve: nothing can be written until old generations are gone, and then little."""
    store = LocalStore(root(repo))
    name = dead_writer(repo, store, DISK)
    (store.root / NAME).unlink()
    history = [info.name for info in store.list("disks/")]
    disks = {each.rpartition("/")[0] for each in history}
    assert len(history) > len(disks)
    before = sum(info.size for info in store.list("packs/"))

    def is_full() -> bool:
        left = [info.name for info in store.list("disks/")]
        return bool({*left} & {*history} - {max(each for each in history if each.startswith(disk)) for disk in disks})

    with full(monkeypatch, is_full):
        gc.run(again(repo, store))
    assert store.size(name) is None
    assert store.size(f"{name}.ended") is not None
    assert sum(info.size for info in store.list("packs/")) < before
    store.delete(f"{name}.ended")
    sound(again(repo, store), files, tmp_path)


def test_where_no_room_can_be_made_gc_says_what_to_do(
    repo: Repository, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(root(repo))
    name = dead_writer(repo, store)
    (store.root / NAME).unlink()
    before = sorted(info.name for info in store.list("packs/"))
    with full(monkeypatch, lambda: True), pytest.raises(Refused, match="no space left") as caught:
        gc.run(again(repo, store))
    assert "make room for 1 MiB outside of the repository" in (caught.value.hint or "")
    assert sorted(info.name for info in store.list("packs/")) == before
    assert store.size(name) is not None
    gc.run(again(repo, store))
    store.delete(f"{name}.ended")
    sound(again(repo, store), files, tmp_path)


def test_an_older_repository_gets_a_reserve_when_it_is_shipped_to(repo: Repository, files: list[Path]) -> None:
    reserve = root(repo) / NAME
    reserve.unlink()
    ship(files[-1], repo)
    assert reserve.stat().st_size == LARGEST
    assert reserve.stat().st_blocks * 512 >= LARGEST
    assert NAME not in {info.name for info in repo.store.list("")}


@contextmanager
def small(kind: str, directory: Path) -> Iterator[Path]:
    if kind != "tmpfs":
        with mounted(kind, directory, size=(400 if kind == "xfs" else 40) * MiB) as place:
            yield place
        return
    place = directory / kind
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", place], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"no tmpfs: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.root
@pytest.mark.parametrize("reserved", [True, False], ids=["reserve", "none"])
@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "xfs"])
def test_nothing_is_left_on_a_real_file_system(tmp_path: Path, kind: str, reserved: bool) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(os.urandom(4 * MiB))
    files = build(tmp_path / "chain", [Layer(4 * MiB, [f"write -s {noise} 0 4M"]), Layer(4 * MiB, ["write -P 7 0 4M"])])
    with small(kind, tmp_path) as place:
        repo = local(place / "repo")
        for path in files:
            ship(path, repo)
        if not reserved:
            (place / "repo" / NAME).unlink()
        with (place / "fill").open("wb", buffering=0) as fill:
            for size in (1 << 20, 4096, 512):
                try:
                    while fill.write(b"x" * size):
                        pass
                except OSError:
                    continue
        if reserved:
            RepositoryMerge(again(repo), DISK, Policy(last=1)).run()
            assert gc.run(again(repo)).bytes_freed > 3 * MiB
            assert verify(again(repo), share=1.0).findings == ()
        else:
            with pytest.raises(Refused, match="no space left"):
                RepositoryMerge(again(repo), DISK, Policy(last=1)).run()
            assert isinstance(repo.store, LocalStore)
            # A killed merge has room for a name. What it leaves is fenced into the room of older generations.
            name = f"leases/v-{'0' * 32}"
            with suppress(Refused):  # XFS has no room for a name, so neither for a lease of gc
                repo.store.put(name, b"")
                os.utime(repo.store.root / name, (time.time() - 2 * DEAD_SECONDS,) * 2)
                gc.run(again(repo))
            assert repo.store.size(name) is None
            assert verify(again(repo), share=1.0).findings == ()
        repo.store.close()
