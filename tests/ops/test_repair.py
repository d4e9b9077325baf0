"""repair from each kind of source: a chain of images, a raw image, another repository, a replica."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path

import pytest

from snapchain.destinations import open_destination
from snapchain.errors import InvalidInput, NotFound
from snapchain.objects.local import LocalStore
from snapchain.objects.memory import MemoryStore
from snapchain.ops.repair import opened_sources
from snapchain.repository import packs
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.format import layer_name
from snapchain.repository.repair import Repair
from snapchain.repository.verification import verify
from tests.ops.shipping import DISK, MiB, delivery, ship
from tests.ops.stacks import Layer, build, flat
from tests.ops.test_damage import damage, shows, whole
from tests.repository.synthetic import again, repository

SIZE = 2 * MiB + 512


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    layers = [
        Layer(SIZE, [f"write -P {n + 1} {n * 64}k 64k" for n in range(12)]),
        Layer(SIZE, ["write -P 20 0 64k", "write -P 21 1M 192k", "write -z 64k 64k", "write -P 5 512k 3k"]),
        Layer(SIZE, ["write -P 30 1M 64k", "write -P 31 1536k 128k", "write -P 32 2M 512"]),
    ]
    return build(tmp_path_factory.mktemp("repair") / "chain", layers)


@pytest.fixture(scope="module")
def shown(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    folder = tmp_path_factory.mktemp("shown")
    return {at: flat(path, folder / path.name).read_bytes() for at, path in enumerate(files, 1)}


@pytest.mark.parametrize("kind", ["image", "raw", "repository", "point", "replica", "two"])
def test_each_kind_of_source_gives_what_it_has(
    files: list[Path], shown: dict[int, bytes], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "PACK_BYTES", 300)
    repo = repository(MemoryStore(), block_size=64 * 1024)
    for path in files:
        ship(path, repo)
    other = repository(LocalStore(tmp_path / "other", make=True))
    replica = f"dir:{tmp_path}/replica"
    if kind in {"repository", "point"}:
        for path in files:
            ship(path, other, disk="elsewhere")
    if kind == "replica":
        with delivery(open_destination(replica), files[-1], "web1", each_layer=True) as work:
            work.run()
    raw = tmp_path / "disk.raw"
    raw.write_bytes(shown[3])
    address = {
        "image": [str(files[-1])],
        "raw": [str(raw)],
        "repository": ["other::elsewhere"],
        "point": ["other::elsewhere@3"],
        "replica": [f"{replica}::web1"],
        "two": [str(files[0]), str(raw)],
    }[kind]
    draw = random.Random(1)
    names = [info.name for info in repo.store.list("packs/")]
    pages = {
        f"packs/{pack[:2]}/{pack}"
        for layer in repo.catalogue(DISK).parents
        for pack in (bytes(row["pack"]).hex() for row in again(repo).layer(layer).table)
    }
    for name in draw.sample(sorted(set(names) - pages), 6):
        damage(repo.store, name, draw.choice(["gone", "half", "blob"]))
    assert not verify(again(repo), share=1.0).ok
    with opened_sources(
        address, lambda url: RepositoryDestination(again(other)) if url == "other" else open_destination(url)
    ) as sources:
        plan = Repair(again(repo), sources).plan()
        report = Repair(again(repo), sources).run()
    assert report.lost == plan.lost
    left = {point for each in report.lost for point in each.points}
    assert whole(repo, DISK, shown) == {1, 2, 3} - left
    assert 3 not in left
    if kind in {"image", "repository", "replica"}:
        assert left == set()
        assert verify(again(repo), share=1.0).ok


def test_an_image_replaces_a_lost_record(files: list[Path], shown: dict[int, bytes]) -> None:
    for number in range(3):
        repo = repository(MemoryStore(), block_size=64 * 1024)
        for path in files:
            ship(path, repo)
        repo.store.delete(layer_name(repo.catalogue(DISK).points[number].layer))
        with opened_sources([str(files[number])], open_destination) as sources:
            assert Repair(again(repo), sources).run().ok
        assert whole(repo, DISK, shown) == {1, 2, 3}
        assert shows(repo, DISK, number + 1) == shown[number + 1]


def test_sources_that_are_not_there(files: list[Path], tmp_path: Path) -> None:
    repo = repository(LocalStore(tmp_path / "r", make=True))
    ship(files[0], repo)

    def opened(_: str) -> RepositoryDestination:
        return RepositoryDestination(again(repo))

    with ExitStack() as stack:
        with pytest.raises(NotFound, match="no such file"):
            stack.enter_context(opened_sources([str(tmp_path / "none.qcow2")], opened))
        with pytest.raises(NotFound, match="there is no disk 'none'"):
            stack.enter_context(opened_sources(["r::none"], opened))
        with pytest.raises(NotFound, match="point"):
            stack.enter_context(opened_sources([f"r::{DISK}@9"], opened))
    with pytest.raises(InvalidInput, match="this command takes a repository"):
        open_destination(f"dir:{tmp_path}/replica").repairing([])


def test_a_plan_changes_nothing(tmp_path: Path) -> None:
    """Also where it meets damage, and reads all data."""
    repo = repository(MemoryStore(), block_size=64 * 1024)
    (image,) = build(tmp_path / "chain", [Layer(MiB, ["write -P 7 0 512k"])])
    ship(image, repo)
    lost = next(info.name for info in repo.store.list("packs/"))
    repo.store.put(lost, repo.store.get(lost)[:-40] + bytes(40))
    before = {info.name: repo.store.get(info.name) for info in repo.store.list("")}
    RepositoryDestination(again(repo)).repairing((), read_data=True).plan()
    assert {info.name: repo.store.get(info.name) for info in repo.store.list("")} == before
