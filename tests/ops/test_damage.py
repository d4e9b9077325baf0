"""Packs that are missing, short or altered: what the image still has is stored again, and damage does not spread.

One pack of a repository at a time, in each way, found out about by `verify` or not; then it is shipped to.  Afterwards
every point whose bytes an image still has restores exactly, and what is lost is named: never wrong bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from snapchain.errors import Corrupt
from snapchain.model.retention import Policy
from snapchain.objects.local import LocalStore
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import ObjectStore
from snapchain.ops import gc
from snapchain.ops.merge_repository import RepositoryMerge
from snapchain.ops.verify import verify
from snapchain.repository import packs, sweep
from snapchain.repository.crypto import AES
from snapchain.repository.repository import Repository
from tests.ops.shipping import DISK, MiB, restore, ship
from tests.ops.stacks import Layer, build, flat, write
from tests.repository.second_reader import Reader
from tests.repository.synthetic import again, repository

WAYS = ("gone", "empty", "half", "short", "long", "head", "blob", "tail", "other")
SIZE = 2 * MiB
BLOCK = 64 * 1024


@dataclass(frozen=True)
class World:
    """A repository with three points of a disk and two of a related one, and the images that they are of.

    shown[disk][n]: the bytes of point n + 1
    """

    repo: Repository
    files: list[Path]
    related: Path
    shown: dict[str, list[bytes]]

    def copy(self) -> Repository:
        store = MemoryStore()
        for info in self.repo.store.list(""):
            store.put(info.name, self.repo.store.get(info.name))
        return again(self.repo, store)


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "PACK_BYTES", 300)
    monkeypatch.setattr(sweep, "LEAST_WASTE", 250)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "PACK_BYTES", 300)
        directory = tmp_path_factory.mktemp("damage")
        repo = repository(MemoryStore(), suite=AES, block_size=BLOCK)
        layers = [
            Layer(SIZE, [f"write -P {n + 1} {n * 64}k 64k" for n in range(8)]),
            Layer(SIZE, ["write -P 20 0 64k", "write -P 21 1M 192k", "write -z 64k 64k", "write -P 5 512k 3k"]),
            Layer(SIZE, ["write -P 30 1M 64k", "write -P 31 1536k 128k"]),
        ]
        files = build(directory / "chain", layers)
        for path in files:
            ship(path, repo)
        shown = [flat(path, directory / f"{path.name}.flat").read_bytes() for path in files]
        (related,) = build(directory / "related", [Layer(SIZE, [*layers[0].writes, "write -P 77 1M 64k"])])
        ship(related, repo, disk="related")
        first = flat(related, directory / "related.1").read_bytes()
        write(related, "write -P 78 1088k 64k")
        ship(related, repo, disk="related")
        second = flat(related, directory / "related.2").read_bytes()
        return World(repo, files, related, {DISK: shown, "related": [first, second]})


def damage(store: ObjectStore, name: str, how: str) -> None:
    """Do it to one object."""
    body = store.get(name)
    store.delete(name)
    at = {"head": 3, "blob": 30, "tail": len(body) - 9}.get(how)
    if at is not None:
        store.put(name, body[:at] + bytes([body[at] ^ 4]) + body[at + 1 :])
    elif how == "other":
        others = [info.name for info in store.list("packs/") if info.name != name]
        store.put(name, store.get(max(others)))
    elif how != "gone":
        changed = {"empty": b"", "half": body[: len(body) // 2], "short": body[:-1], "long": body + b"\0"}
        store.put(name, changed[how])


def whole(repo: Repository, tmp_path: Path, disk: str, shown: list[bytes]) -> set[int]:
    """The points that restore, each of which must be right; the others must name what is lost."""
    found = set()
    for number, expected in enumerate(shown, start=1):
        out = tmp_path / f"{number}.raw"
        out.unlink(missing_ok=True)
        try:
            restore(repo, out, number, disk=disk)
        except Corrupt as error:
            assert "guest bytes" in error.message or error.subject.startswith("layers/"), error
            assert not out.exists()
        else:
            assert out.read_bytes() == expected
            found.add(number)
    return found


def names(repo: Repository) -> list[str]:
    return [info.name for info in repo.store.list("packs/")]


@pytest.mark.parametrize("verified", [True, False], ids=["verified", "unnoticed"])
@pytest.mark.parametrize("how", WAYS)
def test_shipping_the_disk_again_makes_every_point_whole(
    world: World, tmp_path: Path, how: str, verified: bool
) -> None:
    """All layers of the disk are sealed files that are still there, so nothing of it may stay lost."""
    if not verified and how in {"head", "blob", "tail"}:
        pytest.skip("nobody knows")
    for name in names(world.repo):
        repo = world.copy()
        damage(repo.store, name, how)
        if verified:
            assert not verify(again(repo), share=1.0).ok
        report = ship(world.files[-1], repo)
        assert report.damaged == ()
        assert whole(repo, tmp_path, DISK, [*world.shown[DISK], world.shown[DISK][-1]]) == {1, 2, 3, 4}, name
        assert verify(again(repo), disk=DISK, share=1.0).findings == ()
        ship(world.related, repo, disk="related")
        left = whole(repo, tmp_path, "related", world.shown["related"])
        assert 2 in left
        found = verify(again(repo), share=1.0)
        assert found.ok == (left == {1, 2}), (name, found.findings)
