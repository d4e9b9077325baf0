"""repair: what some source still has is whole again, byte for byte, and what stays lost is told exactly."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from snapchain.destination.reading import LeafSource, WholeDisk
from snapchain.destination.records import LostRange, RepairReport
from snapchain.errors import Corrupt, Unavailable
from snapchain.model.content import LEAF_BYTES, leaf_hash
from snapchain.model.retention import Policy
from snapchain.objects.local import LocalStore
from snapchain.objects.memory import MemoryStore
from snapchain.ops.repair import PointSource
from snapchain.repository import collecting as gc, packs
from snapchain.repository.chain import ChainView
from snapchain.repository.crypto import NONE
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.format import layer_name, pack_name
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repair import Repair
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from snapchain.testing.faults import crash_points
from tests.repository.second_reader import Reader
from tests.repository.synthetic import LEAF, Drawn, Run, again, content_id_of, drawn, repository, stacks
from tests.repository.test_verified import DISK, Bad, Cut, copied, noise, published


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "PACK_BYTES", 2 * LEAF + 4096)


def page_packs(repo: Repository) -> set[str]:
    opened = again(repo)
    return {
        pack_name(bytes(row["pack"]).hex())
        for catalogue in opened.catalogues()
        for layer in catalogue.parents
        for row in opened.layer(layer).table
    }


def data_packs(repo: Repository) -> list[str]:
    return sorted({info.name for info in repo.store.list("packs/")} - page_packs(repo))


def damage(repo: Repository, names: Sequence[str], draw: random.Random) -> None:
    """Some of it is only found by reading."""
    for name in names:
        body = repo.store.get(name)
        how = draw.randrange(3)
        repo.store.delete(name)
        if how == 1:
            repo.store.put(name, body[: draw.randrange(len(body))])
        elif how == 2:
            at = draw.randrange(16, len(body) - 16)
            repo.store.put(name, body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])


def source(repo: Repository, disk: str = DISK, point: str | None = None) -> PointSource:
    return PointSource("other", RepositoryDestination(again(repo)), disk, point, kept=ExitStack())


def repaired(repo: Repository, *sources: LeafSource, read_data: bool = True) -> RepairReport:
    return Repair(again(repo), sources, read_data=read_data).run()


def leaf_at(view: ChainView, at: int) -> bytes:
    buffer = memoryview(bytearray(min(LEAF, view.size - at)))
    view.read_into(at, buffer)
    return bytes(buffer)


def leaves_lost(repo: Repository, shown: Sequence[bytes], disk: str = DISK) -> dict[int, set[int]]:
    """point -> leaves that cannot be read; all others must be right."""
    found: dict[int, set[int]] = {}
    opened = again(repo)
    catalogue = opened.catalogue(disk)
    for point in catalogue.points:
        view = ChainView(opened.chain(catalogue, point.layer), opened.blobs)
        for at in range(0, view.size, LEAF):
            try:
                assert leaf_at(view, at) == shown[point.point - 1][at : at + LEAF]
            except Corrupt:
                found.setdefault(point.point, set()).add(at // LEAF)
    return found


def leaves_of(ranges: Sequence[LostRange], disk: str = DISK) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for each in ranges:
        if each.disk == disk:
            for point in each.points:
                leaves = range(each.offset // LEAF, -(-(each.offset + each.length) // LEAF))
                found.setdefault(point, set()).update(leaves)
    return found


def hashes_of(content: bytes) -> set[bytes]:
    return {leaf_hash(content[at : at + LEAF]) for at in range(0, len(content), LEAF)}


@given(stacks(units=(512, 4096, LEAF)), st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_what_a_source_has_is_whole_again_and_the_rest_is_told_exactly(stack: list[Drawn], draw: random.Random) -> None:
    repo = published(repository(MemoryStore(), block_size=draw.choice([1, 4]) * LEAF), stack)
    if draw.random() < 0.4:
        RepositoryMerge(again(repo), DISK, Policy(last=draw.randrange(1, 3))).run()
    there = stack[: draw.randrange(len(stack) + 1)]
    sources = [source(published(repository(MemoryStore()), there, "elsewhere"), "elsewhere")] if there else []
    names = data_packs(repo)
    damage(repo, draw.sample(names, draw.randrange(len(names) + 1)), draw)
    shown = [layer.shown for layer in stack]
    plan = Repair(again(repo), sources, read_data=True).plan()
    before = leaves_lost(repo, shown)
    assert leaves_of(plan.damaged) == before
    points = repo.catalogue(DISK).points
    report = repaired(repo, *sources)
    left = leaves_lost(repo, shown)
    assert leaves_of(report.damaged) == before
    assert leaves_of(report.lost) == left
    assert report.ok == (not left)
    known = {leaf for each in there for leaf in hashes_of(each.shown)}
    for point, leaves in left.items():
        for leaf in leaves:
            assert leaf_hash(shown[point - 1][leaf * LEAF : (leaf + 1) * LEAF]) not in known, "a source had it"
            assert leaf in leaves_of(plan.lost)[point]
    after = repo.catalogue(DISK).points
    assert [each.model_copy(update={"layer": ""}) for each in after] == [
        each.model_copy(update={"layer": ""}) for each in points
    ]
    assert repaired(repo, *sources).lost == report.lost
    findings = verify(again(repo), share=1.0).findings
    assert bool(findings) == bool(left)
    collected = gc.run(again(repo))
    assert bool(collected.findings) == bool(left)
    assert leaves_lost(repo, shown) == left


def made() -> tuple[Repository, list[Drawn]]:
    """Three points: noise, parts of it overwritten, and a shorter one."""
    root = drawn(10 * LEAF, noise(*range(10)), b"")
    top = drawn(10 * LEAF, [Run(512, 4096, 7), Run(3 * LEAF, LEAF, None), Run(5 * LEAF, 2 * LEAF, 2000)], root.shown)
    last = drawn(9 * LEAF + 512, [Run(LEAF, 1024, 9), Run(8 * LEAF, LEAF, 3000)], top.shown)
    stack = [root, top, last]
    return published(repository(MemoryStore()), stack), stack


def whole_disk(body: bytes) -> Drawn:
    """All of it DATA."""
    return Drawn(drawn(len(body), [Run(0, len(body), 0)], b"").extents, body)


class Memory:
    """Bytes as a LeafSource: what an image is, without the image."""

    name = "memory"

    def __init__(self, *contents: bytes) -> None:
        self.contents = contents
        self.leaves = {
            leaf_hash(body[at : at + LEAF]): body[at : at + LEAF].ljust(LEAF, b"\0")
            for body in contents
            for at in range(0, len(body), LEAF)
        }

    def locate(self, wanted: Collection[bytes]) -> Collection[bytes]:
        return [leaf for leaf in wanted if leaf in self.leaves]

    def read(self, located: Collection[bytes]) -> Iterator[tuple[bytes, bytes]]:
        return ((leaf, self.leaves[leaf]) for leaf in located)

    def whole(self, size: int, content_id: str) -> WholeDisk | None:
        for body in self.contents:
            if len(body) == size and content_id_of(body) == content_id:
                return whole_disk(body)
        return None


class Liar(Memory):
    """Says that it has everything, and gives other bytes."""

    def locate(self, wanted: Collection[bytes]) -> Collection[bytes]:
        return wanted

    def read(self, located: Collection[bytes]) -> Iterator[tuple[bytes, bytes]]:
        return ((leaf, bytes(LEAF)) for leaf in located)

    def whole(self, size: int, content_id: str) -> WholeDisk | None:
        _ = content_id
        return whole_disk(bytes(size))


def test_a_source_that_gives_other_bytes_is_not_believed() -> None:
    repo, stack = made()
    shown = [layer.shown for layer in stack]
    damage(repo, data_packs(repo)[:3], random.Random(1))
    report = repaired(repo, Liar())
    assert report.blobs_stored == 0
    assert leaves_lost(repo, shown) == leaves_of(report.lost) != {}
    points = repo.catalogue(DISK).points
    repo.store.delete(layer_name(points[0].layer))
    assert not repaired(repo, Liar()).ok
    assert repo.catalogue(DISK).points == points


def test_parts_of_blobs_are_stored_by_themselves() -> None:
    """A merge has dropped the rest of the blob: nobody can make it again, but what the point shows is known."""
    size = 8 * LEAF + 512
    root = drawn(size, [Run(0, size, 5000)], b"")
    top = drawn(size, [Run(LEAF, 4096, 9), Run(2 * LEAF, LEAF, 6000), Run(8 * LEAF, 100, 6001)], root.shown)
    repo = published(repository(MemoryStore(), block_size=4 * LEAF), [root, top])
    RepositoryMerge(again(repo), DISK, Policy(last=1)).run()
    gc.run(again(repo))
    shown = [root.shown, top.shown]
    away = {name: repo.store.get(name) for name in data_packs(repo)}
    for name in away:
        repo.store.delete(name)
    assert leaves_lost(repo, shown) == {2: set(range(9))}
    half = repaired(repo, Memory(top.shown[: 3 * LEAF], top.shown[5 * LEAF : 6 * LEAF]))
    assert leaves_of(half.lost) == leaves_lost(repo, shown) == {2: {3, 4, 6, 7, 8}}
    assert half.layers_replaced == 1
    other = again(repo, copied(repo))
    for name, body in away.items():
        other.store.put(name, body)
    assert leaves_lost(other, shown) == {}, "what is named as before is right, when it comes back"
    assert repaired(repo, Memory(top.shown)).ok
    assert leaves_lost(repo, shown) == {}
    assert verify(again(repo), share=1.0).ok
    assert gc.run(again(repo)).findings == ()
    assert leaves_lost(repo, shown) == {}


@pytest.mark.parametrize("what", ["page", "record"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_lost_map_is_replaced_by_a_layer_of_the_same_content(what: str, number: int) -> None:
    """From an image, or from a point of another repository that was cut in another way."""
    repo, stack = made()
    shown = [layer.shown for layer in stack]
    other = published(repository(MemoryStore(), block_size=4 * LEAF), stack, "other")
    sources: list[LeafSource] = [Memory(shown[number - 1]), source(other, "other", str(number))]
    points = repo.catalogue(DISK).points
    layer = points[number - 1].layer
    lost = layer_name(layer) if what == "record" else pack_name(bytes(again(repo).layer(layer).table[0]["pack"]).hex())
    repo.store.delete(lost)
    nothing = repaired(repo)
    assert {point for each in nothing.lost for point in each.points} == set(range(number, 4))
    assert repo.catalogue(DISK).points == points, "no point is dropped, and none is changed"
    damaged = copied(repo)
    for each in sources:
        repo = again(repo, MemoryStore())
        for info in damaged.list(""):
            repo.store.put(info.name, damaged.get(info.name))
        plan = Repair(again(repo), [each]).plan()
        assert (plan.lost, bool(plan.damaged)) == ((), True)
        assert Repair(again(repo), [each]).run().ok
        assert leaves_lost(repo, shown) == {}
        assert verify(again(repo), share=1.0).ok
        assert layer not in repo.catalogue(DISK).parents
        assert gc.run(again(repo)).findings == ()
        assert leaves_lost(repo, shown) == {}


def test_a_crash_anywhere_leaves_what_was_whole_whole_and_running_again_finishes() -> None:
    whole, stack = made()
    shown = [layer.shown for layer in stack]
    RepositoryMerge(again(whole), DISK, Policy(last=2)).run()
    damage(whole, data_packs(whole)[1:4], random.Random(2))
    verify(again(whole), share=1.0)
    before = leaves_lost(whole, shown)
    assert before
    memory = Memory(*shown)
    deaths = 0
    for _moment, inner in crash_points(
        lambda: copied(whole), lambda store: Repair(again(whole, store), [memory]).run()
    ):
        repo = again(whole, inner)
        left = leaves_lost(repo, shown)
        assert all(leaves <= before[point] for point, leaves in left.items())
        report = Repair(again(repo), [memory]).run()
        assert report.ok
        assert leaves_lost(repo, shown) == {}
        deaths += 1
    assert deaths > 6


def test_a_second_reader_reads_what_was_repaired(tmp_path: Path) -> None:
    """From docs/format.md alone: a blob under its id, a leaf in a new record, and what was verified."""
    root = drawn(8 * LEAF + 512, [Run(0, 8 * LEAF + 512, 5000)], b"")
    top = drawn(root.size, [Run(2 * LEAF, LEAF, 6000)], root.shown)
    for dropped in (True, False):
        place = tmp_path / str(dropped)
        repo = Repository.create(LocalStore(place, make=True), passphrase=lambda: None, encryption=NONE)
        published(repo, [root, top])
        if dropped:
            RepositoryMerge(again(repo), DISK, Policy(last=1)).run()
            gc.run(again(repo))
        for name in data_packs(repo):
            repo.store.delete(name)
        report = repaired(repo, Memory(root.shown, top.shown))
        assert (report.ok, report.layers_replaced) == (True, int(dropped))
        assert Reader(place).restore(DISK, 2) == top.shown
        assert verify(again(repo), share=1.0).ok
        everything = {info.name.rpartition("/")[2] for info in repo.store.list("packs/")}
        assert Reader(place).verified().keys() >= everything | repo.catalogue(DISK).parents.keys()
        repo.store.close()


def test_a_bad_sector_is_repaired_and_a_store_that_does_not_answer_is_no_damage() -> None:
    repo, stack = made()
    shown = [layer.shown for layer in stack]
    name = data_packs(repo)[0]
    report = Repair(again(repo, Bad(repo.store, name)), [Memory(*shown)], read_data=True).run()
    assert report.damaged
    assert report.ok
    with pytest.raises(Unavailable, match="the network is gone"):
        Repair(again(repo, Cut(repo.store, 0)), [Memory(*shown)]).run()


def test_a_dry_run_stores_nothing_but_what_is_known_of_the_damage() -> None:
    repo, stack = made()
    repo.store.delete(data_packs(repo)[0])
    before = {info.name for info in repo.store.list("") if not info.name.startswith("index/damaged-")}
    assert Repair(again(repo), [Memory(stack[0].shown)]).plan().damaged
    assert {info.name for info in repo.store.list("") if not info.name.startswith("index/damaged-")} == before


def test_a_sound_repository_is_left_alone() -> None:
    repo, _ = made()
    before: Mapping[str, bytes] = {info.name: repo.store.get(info.name) for info in repo.store.list("")}
    report = Repair(again(repo), []).run()
    assert (report.ok, report.damaged, report.blobs_stored, report.layers_replaced) == (True, (), 0, 0)
    assert {info.name: repo.store.get(info.name) for info in repo.store.list("")} == before


def test_a_catalogue_that_cannot_be_read_is_a_finding() -> None:
    repo, _ = made()
    newest = max(info.name for info in repo.store.list(f"disks/{repo.keys.disk_key(DISK)}/"))
    repo.store.put(newest, repo.store.get(newest)[:-1])
    report = Repair(again(repo), []).run()
    assert (report.ok, [each.subject for each in report.findings]) == (False, [newest])


def test_data_of_one_disk_heals_another_one() -> None:
    """Content decides: at another place of another disk."""
    repo, stack = made()
    shown = [layer.shown for layer in stack]
    moved = drawn(20 * LEAF, [Run((19 - at) * LEAF, LEAF, 1000 + at) for at in range(10)], b"")
    other = published(repository(MemoryStore()), [moved], "other")
    names = data_packs(repo)
    root = again(repo).layer(next(iter(repo.catalogue(DISK).parents))).pages(0, 10 * LEAF_BYTES)[0]
    repo.store.delete(pack_name(root.packs[0]))
    assert pack_name(root.packs[0]) in names
    before = repo.catalogue(DISK)
    assert repaired(repo, source(other, "other")).ok
    assert leaves_lost(repo, shown) == {}
    assert repo.catalogue(DISK) == before, "records find whole blobs as they are"
