"""Packs that are missing, short or altered: what the image still has is stored again, and damage does not spread.

One pack of a repository at a time, in each way, found out about by `verify` or not; then it is shipped to.  Afterwards
every point whose bytes an image still has restores exactly, and what is lost is named: never wrong bytes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from snapchain.destination.reading import Sink
from snapchain.errors import Corrupt
from snapchain.model.retention import Policy
from snapchain.objects.local import LocalStore
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import ObjectStore
from snapchain.repository import collecting as gc, packs, sweep
from snapchain.repository.catalogue import find_point
from snapchain.repository.chain import ChainView
from snapchain.repository.crypto import AES, NONE
from snapchain.repository.format import is_damage, layer_name
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.replay import Replay
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from tests.exhaustive import some
from tests.ops.shipping import DISK, MiB, restore, ship
from tests.ops.stacks import Layer, build, flat, write
from tests.repository.second_reader import Reader
from tests.repository.synthetic import again, repository

pytestmark = pytest.mark.sampled

SEEN_BY_SIZE = ("gone", "half", "long")
WAYS = (*SEEN_BY_SIZE, "empty", "short", "head", "blob", "tail", "other")
ALL = {DISK: {1, 2, 3}, "related": {1, 2}}
SIZE = 2 * MiB
BLOCK = 64 * 1024


@dataclass(frozen=True)
class World:
    """A repository with three points of a disk and two of a related one, and the images that they are of.

    shown[disk][n]: the bytes of point n
    """

    repo: Repository
    files: list[Path]
    related: Path
    shown: dict[str, dict[int, bytes]]

    def copy(self) -> Repository:
        store = MemoryStore()
        for info in self.repo.store.list(""):
            store.put(info.name, self.repo.store.get(info.name))
        return again(self.repo, store)


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "PACK_BYTES", 300)
    monkeypatch.setattr(sweep, "LEAST_WASTE", 600)


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
        return World(repo, files, related, {DISK: dict(enumerate(shown, start=1)), "related": {1: first, 2: second}})


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


def marks(repo: Repository) -> list[str]:
    """Records of damage."""
    return [info.name for info in repo.store.list("index/") if is_damage(info.name)]


def shows(repo: Repository, disk: str, point: int) -> bytes:
    """The bytes of a point, proven as a restore proves them. Raises Corrupt."""
    opened = again(repo)
    catalogue = opened.catalogue(disk)
    found = find_point(catalogue, str(point))
    layers = opened.chain(catalogue, found.layer)
    view = ChainView(layers, opened.blobs)
    body = bytearray(view.size)

    def keep(pieces: Sequence[tuple[int, memoryview]]) -> None:
        for offset, piece in pieces:
            body[offset : offset + len(piece)] = piece

    Replay(view, view.extents.owned_by(0), Sink(keep)).run(lambda _offset, _count: None)
    assert layers[-1].header.content_id == found.content_id
    return bytes(body)


def whole(repo: Repository, disk: str, shown: Mapping[int, bytes]) -> set[int]:
    """The points that restore, each of which must be right; the others must name what is lost."""
    found = set()
    for number, expected in shown.items():
        try:
            body = shows(repo, disk, number)
        except Corrupt as error:
            if not (re.search(r"guest bytes \d+ to \d+ are lost", error.message) and "packs/" in str(error.subject)):
                raise
        else:
            assert body == expected
            found.add(number)
    return found


def names(repo: Repository) -> list[str]:
    return [info.name for info in repo.store.list("packs/")]


def damaged(world: World, how: str, *, noticed: bool = True) -> Iterator[tuple[str, Repository]]:
    """(name of the pack, repository) for each pack, or one in three. noticed: `verify --read-data` has found out."""
    for name in some(names(world.repo), each=3):
        repo = world.copy()
        damage(repo.store, name, how)
        if noticed:
            assert not verify(again(repo), share=1.0).ok, name
        yield name, repo


CASES = [(how, True) for how in WAYS] + [(how, False) for how in SEEN_BY_SIZE]


@pytest.mark.parametrize(("how", "noticed"), CASES)
def test_shipping_a_disk_again_makes_all_its_points_whole(world: World, how: str, noticed: bool) -> None:
    """Its layers are sealed files, which are all still there: nothing of it may stay lost. Nor of one that is related
    but what the related image no longer has. And gc puts the records in order.
    """
    for name, repo in damaged(world, how, noticed=noticed):
        assert ship(world.files[-1], repo).damaged == (), name
        assert whole(repo, DISK, world.shown[DISK] | {4: world.shown[DISK][3]}) == {1, 2, 3, 4}, name
        assert verify(again(repo), disk=DISK, share=1.0).findings == ()
        report = ship(world.related, repo, disk="related")
        left = whole(repo, "related", world.shown["related"])
        assert 2 in left
        assert report.damaged == tuple({1, 2} - left)
        lost = verify(again(repo), share=1.0).findings
        assert {point for each in lost for point in each.points if each.disk == "related"} == {1, 2} - left
        collected = gc.run(again(repo))
        assert bool(collected.findings) == bool(lost), name
        assert whole(repo, DISK, world.shown[DISK]) == {1, 2, 3}
        assert whole(repo, "related", world.shown["related"]) == left
        if not lost:
            assert marks(repo) == []
            assert name not in names(repo)
            assert gc.run(again(repo)).objects_deleted == 0
            assert verify(again(repo), share=1.0).ok


def test_data_that_another_disk_brings_again_mends_old_points(world: World) -> None:
    """Their records name the damaged pack as before: what they cannot read there they find by the index, and `gc` lets
    them name it.
    """
    maps = {
        f"packs/{pack[:2]}/{pack}"
        for catalogue in world.repo.catalogues()
        for layer in catalogue.parents
        for pack in (bytes(row["pack"]).hex() for row in world.repo.layer(layer).table)
    }
    for name, repo in damaged(world, "gone"):
        if name in maps:
            continue
        before = repo.catalogue(DISK)
        ship(world.files[-1], repo, disk="new", each_layer=True)
        assert repo.catalogue(DISK) == before
        assert whole(repo, DISK, world.shown[DISK]) == {1, 2, 3}, name
        assert verify(again(repo), disk=DISK, share=1.0).ok
        gc.run(again(repo))
        assert whole(repo, DISK, world.shown[DISK]) == {1, 2, 3}, name


def test_a_lost_record_of_a_layer_is_made_good(world: World) -> None:
    """Nobody knows what it said; but a layer with the same content takes its place, in the older points as well."""
    for layer in world.repo.catalogue(DISK).parents:
        repo = world.copy()
        repo.store.delete(layer_name(layer))
        assert ship(world.files[-1], repo).damaged == ()
        assert layer not in repo.catalogue(DISK).parents
        assert whole(repo, DISK, world.shown[DISK]) == {1, 2, 3}
        assert verify(again(repo), disk=DISK, share=1.0).ok


@pytest.mark.parametrize("how", ["gone", "half", "blob"])
def test_without_any_index_the_image_makes_all_points_whole(world: World, how: str) -> None:
    """What no index lists counts as absent; a pack that is damaged besides is found by reading."""
    for name in names(world.repo)[::5]:
        repo = world.copy()
        for info in list(repo.store.list("index/")):
            repo.store.delete(info.name)
        assert whole(repo, DISK, world.shown[DISK]) == {1, 2, 3}
        damage(repo.store, name, how)
        verify(again(repo), share=1.0)
        assert ship(world.files[-1], repo).damaged == ()
        assert whole(repo, DISK, world.shown[DISK] | {4: world.shown[DISK][3]}) == {1, 2, 3, 4}, name
        assert verify(again(repo), disk=DISK, share=1.0).ok


def test_damage_that_comes_to_light_while_shipping_is_mended_by_the_same_shipment(world: World) -> None:
    """A page of a layer below is read to count the new content: the shipment begins again, and knows."""
    made = repository(MemoryStore(), suite=AES, block_size=BLOCK)
    for path in world.files[:2]:
        ship(path, made)
    met = 0
    for name in names(made):
        repo = again(made, MemoryStore())
        for info in made.store.list(""):
            repo.store.put(info.name, made.store.get(info.name))
        damage(repo.store, name, "blob")
        ship(world.files[2], repo)
        if marks(repo):
            met += 1
            assert whole(repo, DISK, world.shown[DISK]) == {1, 2, 3}
            assert verify(again(repo), share=1.0).ok
    assert met


@pytest.mark.parametrize("how", ["gone", "blob"])
def test_a_second_reader_reads_what_was_mended(world: World, tmp_path: Path, how: str) -> None:
    """From docs/format.md alone; in a directory."""
    whole = tmp_path / "whole"
    made = Repository.create(LocalStore(whole, make=True), passphrase=lambda: None, encryption=NONE)
    for path in world.files:
        ship(path, made)
    for number, name in enumerate(names(made)):
        place = tmp_path / str(number)
        shutil.copytree(whole, place)
        repo = again(made, LocalStore(place))
        damage(repo.store, name, how)
        verify(again(repo), share=1.0)
        assert Reader(place).damaged() == {name.rpartition("/")[2]}
        ship(world.files[-1], repo)
        assert {point: Reader(place).restore(DISK, point) for point in world.shown[DISK]} == world.shown[DISK]
        repo.store.close()


@pytest.mark.parametrize("how", ["blob", "gone"])
def test_under_another_name_nothing_damaged_is_relied_on(world: World, how: str) -> None:
    for name, repo in damaged(world, how):
        ship(world.files[-1], repo, disk="new")
        assert whole(repo, "new", {1: world.shown[DISK][3]}) == {1}, name


@pytest.mark.parametrize("how", ["head", "blob", "tail"])
def test_what_nobody_has_noticed_never_gives_wrong_bytes(world: World, how: str) -> None:
    """A shipment relies on what is there, without reading it. But what reads finds out, and the next one mends it."""
    for name, repo in damaged(world, how, noticed=False):
        ship(world.files[-1], repo)
        ship(world.files[-1], repo, disk="new")
        whole(repo, DISK, world.shown[DISK])
        verify(again(repo), share=1.0)
        ship(world.files[-1], repo)
        ship(world.files[-1], repo, disk="new")
        assert whole(repo, DISK, world.shown[DISK]) == {1, 2, 3}, name
        assert whole(repo, "new", dict.fromkeys((1, 2), world.shown[DISK][3])) == {1, 2}, name


def test_a_restore_that_meets_damage_lets_the_next_shipment_mend_it(world: World, tmp_path: Path) -> None:
    for number, (name, repo) in enumerate(damaged(world, "blob", noticed=False)):
        try:
            restore(again(repo), tmp_path / f"{number}.raw", 3)
        except Corrupt:
            assert len(marks(repo)) == 1
            ship(world.files[-1], repo)
            assert whole(repo, DISK, world.shown[DISK]) == {1, 2, 3}, name
        else:
            assert marks(repo) == []


@pytest.mark.parametrize("how", ["gone", "half", "blob"])
def test_gc_and_merge_work_around_what_is_lost(world: World, how: str) -> None:
    """Nothing is shipped: gc frees what nobody needs, keeps what is whole, and names the rest; dropping the damaged
    points ends it.
    """
    for name, repo in damaged(world, how):
        before = {disk: whole(repo, disk, shown) for disk, shown in world.shown.items()}
        dead = f"layers/{'0' * 32}"
        repo.store.put(dead, b"nobody needs this")
        report = gc.run(again(repo))
        assert repo.store.size(dead) is None, name
        assert {each.disk: True for each in report.findings} == {
            disk: True for disk in before if before[disk] != ALL[disk]
        }
        assert {disk: whole(repo, disk, shown) for disk, shown in world.shown.items()} == before
        RepositoryMerge(again(repo), DISK, Policy(last=1)).run()
        assert (3 in before[DISK]) == (whole(repo, DISK, {3: world.shown[DISK][3]}) == {3})
        RepositoryMerge(again(repo), "related", Policy(last=1)).run()
        gc.run(again(repo))
        ship(world.files[-1], repo)
        ship(world.related, repo, disk="related")
        for disk in world.shown:
            RepositoryMerge(again(repo), disk, Policy(last=1)).run()
        assert gc.run(again(repo)).findings == (), name
        assert verify(again(repo), share=1.0).ok
