"""gc beside one thing that somebody else does at the worst moment: each of these once lost data, or ended gc."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from snapchain.destination.records import GcLimits
from snapchain.errors import Busy, Conflict, Unavailable
from snapchain.model.retention import DropPoints, Policy
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data, ObjectInfo, ObjectStore, Refused, StoreWrapper, joined
from snapchain.repository import collecting as gc, damage, index as indexes, packs, unlisted
from snapchain.repository.format import layer_name
from snapchain.repository.index import IndexedPack
from snapchain.repository.leases import DEAD_SECONDS, Mode
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.renaming import renaming
from snapchain.repository.repair import Repair
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from tests.ops.shipping import DISK, ship
from tests.ops.test_gc_races import World, _quick, files, shown, world
from tests.repository import test_repair as repairs
from tests.repository.synthetic import LEAF, again, drawn, repository
from tests.repository.test_verified import DISK as WEB, noise, published
from tests.waiting import HANG

__all__ = ["_quick", "files", "shown", "world"]

When = Callable[[str, str], bool]
"""(operation, name of the object)"""


class Hook(StoreWrapper):
    """Does something before the first call for which `when` is true; `fails`: whether a call then fails."""

    def __init__(
        self,
        inner: ObjectStore,
        when: When = lambda _operation, _name: False,
        act: Callable[[], object] = lambda: None,
        *,
        fails: Callable[[str, str, bytes], None] = lambda _operation, _name, _body: None,
    ) -> None:
        super().__init__(inner)
        self._when, self._act, self._fails, self.done = when, act, fails, False

    def _before(self, operation: str, name: str, body: bytes = b"") -> None:
        if not self.done and self._when(operation, name):
            self.done = True
            self._act()
        self._fails(operation, name, body)

    def put(self, name: str, data: Data) -> None:
        self._before("put", name, joined(data))
        self.inner.put(name, data)

    def create(self, name: str, data: Data) -> bool:
        self._before("create", name, joined(data))
        return self.inner.create(name, data)

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        self._before("get", name)
        return self.inner.get(name, offset=offset, length=length)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._before("list", prefix)
        return self.inner.list(prefix)

    def delete(self, name: str) -> None:
        self._before("delete", name)
        self.inner.delete(name)


def begins_era(operation: str, name: str) -> bool:
    return operation == "create" and name.startswith("index/")


def publishes(operation: str, name: str) -> bool:
    return operation == "create" and name.startswith("disks/")


def drop_all(repo: Repository, disk: str) -> None:
    RepositoryMerge(repo, disk, DropPoints(frozenset({1, 2}), newest=True)).run()


def dropped(world: World, *disks: str) -> World:
    """Points of these disks are dropped, so that there is something to collect."""
    world.reset()
    for disk in disks:
        drop_all(world.open(), disk)
    world.now += 3 * 3600
    return world


def is_sound(repo: Repository) -> None:
    assert verify(again(repo), share=1.0).findings == ()


# ---- Packs that no index lists.


def test_a_shipment_uses_no_pack_of_a_collector_that_works_alone_and_stands_still(
    world: World, files: list[Path]
) -> None:
    """It could not say what is to go, as programs before this one never did."""
    dropped(world, "other")

    def full(operation: str, name: str, _body: bytes) -> None:
        if operation == "put" and ("condemned-" in name or "awaited-" in name):
            raise Refused("no space left", subject=name)

    def meanwhile() -> None:
        world.now += 2 * DEAD_SECONDS
        ship(files[2], world.open(), disk="third")

    store = Hook(world.store, lambda how, name: how == "delete" and name.startswith("packs/"), meanwhile, fails=full)
    gc.run(world.open(store))
    assert store.done
    assert [point.point for point in world.open().catalogue("third").points] == [1]
    is_sound(world.open())


# ---- Copies of what is damaged.


@pytest.fixture
def mended(monkeypatch: pytest.MonkeyPatch) -> tuple[Repository, Callable[[], None]]:
    """A repository that has lost a pack, and what repairs it from another one, by a copy that only an index lists."""
    monkeypatch.setattr(packs, "PACK_BYTES", 2 * LEAF + 4096)
    root = drawn(10 * LEAF, noise(*range(10)), b"")
    repo = published(repository(MemoryStore(), block_size=LEAF), [root])
    other = published(repository(MemoryStore()), [root], "elsewhere")
    repo.store.delete(repairs.data_packs(repo)[0])

    def repair() -> None:
        assert Repair(again(repo), [repairs.source(other, "elsewhere")]).run().ok

    return repo, repair


def test_a_repair_while_gc_writes_a_new_index(mended: tuple[Repository, Callable[[], None]]) -> None:
    repo, repair = mended
    store = Hook(repo.store, begins_era, repair)
    gc.run(again(repo, store))
    assert store.done
    is_sound(repo)
    gc.run(again(repo))
    is_sound(repo)


def test_a_repair_while_gc_marks(mended: tuple[Repository, Callable[[], None]]) -> None:
    """Between its look at the indexes and that at the packs."""
    repo, repair = mended
    for nth in (1, 2, 3):
        calls: list[str] = []

        def when(operation: str, name: str, calls: list[str] = calls, nth: int = nth) -> bool:
            calls += [name] * (operation == "list" and name == "layers/")
            return len(calls) == nth

        twin = again(repo, MemoryStore())
        for info in repo.store.list(""):
            twin.store.put(info.name, repo.store.get(info.name))
        other = [drawn(10 * LEAF, noise(*range(10)), b"")]
        source = published(repository(MemoryStore()), other, "elsewhere")

        def mend(twin: Repository = twin, source: Repository = source) -> None:
            assert Repair(again(twin), [repairs.source(source, "elsewhere")]).run().ok

        store = Hook(twin.store, when, mend)
        gc.run(again(twin, store))
        if store.done:
            is_sound(twin)
            gc.run(again(twin))
            is_sound(twin)
    repair()
    is_sound(repo)


def test_a_copy_that_was_in_doubt_for_a_while(mended: tuple[Repository, Callable[[], None]]) -> None:
    """The pack that repair made was away when somebody looked, and is back."""
    repo, repair = mended
    before = set(repairs.data_packs(repo))
    repair()
    fresh = {name.rpartition("/")[2] for name in set(repairs.data_packs(repo)) - before}
    damage.record(repo.store, repo.keys, fresh)
    is_sound(repo)
    for _ in range(3):
        gc.run(again(repo))
        is_sound(repo)
    assert damage.recorded(repo.store, repo.keys) == frozenset()


@pytest.mark.parametrize("disks", [[], [WEB]], ids=["any disk", "this disk"])
@pytest.mark.parametrize("most", [None, 0])
def test_the_only_copy_of_a_blob_lies_in_a_pack_that_is_to_go(
    disks: list[str], most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "PACK_BYTES", 2 * LEAF + 4096)
    store = MemoryStore(clock=lambda: 1e9)
    root = drawn(10 * LEAF, noise(*range(10)), b"")
    repo = published(repository(store, block_size=LEAF), [root])
    first = repairs.data_packs(repo)
    known = {info.name: store.get(info.name) for info in store.list("index/")}
    for name in known:
        store.delete(name)
    monkeypatch.setattr(unlisted, "MOST", 0)
    published(again(repo), [root], "two")  # a writer that did not know of the first
    for name, body in known.items():
        store.put(name, body)
    RepositoryMerge(again(repo), "two", DropPoints(frozenset({1}), newest=True)).run()
    limits = GcLimits(most_moved=most)
    with again(repo).lease(Mode.WRITE, "somebody", on_wait=print, disks=disks):
        gc.run(again(repo))
        store.delete(first[0])
        gc.run(again(repo), limits)
        is_sound(repo)
    gc.run(again(repo), limits)
    is_sound(repo)


# ---- Leases.


def test_a_generation_that_is_created_after_its_writer_gave_up(world: World, files: list[Path]) -> None:
    """The request was on its way."""
    world.reset()
    late: list[tuple[str, bytes]] = []

    class Late(Hook):
        def create(self, name: str, data: Data) -> bool:
            if name.startswith("disks/"):
                late.append((name, joined(data)))
                raise Unavailable("timed out", subject=name)
            return super().create(name, data)

    with pytest.raises(Unavailable, match="timed out"):
        ship(files[2], world.open(), store=Late(world.store))
    gc.run(world.open())
    assert len(late) == 1
    world.now += 2 * DEAD_SECONDS
    gc.run(world.open())
    assert not any(world.store.create(*each) for each in late)
    is_sound(world.open())


def test_a_reader_whose_lease_is_damaged(world: World) -> None:
    """Nobody knows what it reads: gc does not begin, or deletes neither layers nor packs."""
    world.reset()
    repo = world.open()
    catalogue = repo.catalogue(DISK)
    with repo.reading({DISK: list(catalogue.parents)}, "restore"):
        drop_all(world.open(), DISK)
        (name,) = [info.name for info in world.store.list("leases/r-")]
        body = world.store.get(name)
        world.store.put(name, body[:-1] + b"x")
        with pytest.raises(Busy, match="another snapchain is at work"):
            gc.run(world.open())
        world.store.delete(name)

        def appears() -> None:
            world.store.put(name, body[:-1] + b"x")

        store = Hook(world.store, lambda how, name: how == "put" and "condemned-" in name, appears)
        assert gc.run(world.open(store)).packs_deleted == 0
        assert store.done
        assert all(world.store.size(layer_name(layer)) is not None for layer in catalogue.parents)
    assert gc.run(world.open()).packs_deleted > 0


def test_a_dead_writer_of_a_new_disk_whose_lease_cannot_be_read(world: World, files: list[Path]) -> None:
    dropped(world, DISK, "other")

    def unread(operation: str, name: str, _body: bytes) -> None:
        if operation == "get" and name.startswith("leases/v-"):
            raise Unavailable("503", subject=name)

    def meanwhile() -> None:
        world.now += 2 * DEAD_SECONDS
        with pytest.raises(Unavailable, match="503"):
            gc.run(world.open(Hook(world.store, fails=unread)))

    store = Hook(world.store, publishes, meanwhile)
    ship(files[1], world.open(), store=store, disk="third")
    assert store.done
    is_sound(world.open())


@pytest.mark.parametrize("nth", range(1, 12))
def test_a_listing_that_misses_a_lease(world: World, files: list[Path], nth: int) -> None:
    dropped(world, DISK, "other")

    class Missing(Hook):
        looks = 0

        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            found = super().list(prefix)
            if prefix != "leases/":
                return found
            self.looks += 1
            return (info for info in found if self.looks != nth or not info.name.startswith("leases/v-"))

    store = Hook(world.store, publishes, lambda: gc.run(world.open(Missing(world.store))))
    ship(files[1], world.open(), store=store)
    assert store.done
    is_sound(world.open())


def test_a_reader_that_begins_before_the_deletions(world: World) -> None:
    world.reset()
    repo = world.open()
    catalogue = repo.catalogue(DISK)
    drop_all(world.open(), DISK)
    with ExitStack() as stack:

        def read() -> None:
            stack.enter_context(repo.reading({DISK: list(catalogue.parents)}, "restore"))

        store = Hook(world.store, begins_era, read)
        gc.run(world.open(store))
        assert store.done
        assert all(world.store.size(layer_name(layer)) is not None for layer in catalogue.parents)


def test_leases_are_read_once_by_a_collector_that_waits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped(world, DISK)
    monkeypatch.setattr(gc, "PATIENCE", 3.0)
    reads: list[str] = []

    def count(operation: str, name: str, _body: bytes) -> None:
        reads.extend([name] * (operation == "get" and name.startswith("leases/")))

    with ExitStack() as stack:
        for number in range(5):
            stack.enter_context(world.open().lease(Mode.WRITE, "ship", on_wait=print, disks=[f"d{number}"]))
        gc.run(world.open(Hook(world.store, fails=count)))
    assert len(reads) == len(set(reads)) >= 5


# ---- What others do while gc moves, and writes indexes.


def test_a_shipment_that_puts_its_small_indexes_together(world: World) -> None:
    dropped(world, "other")
    first = next(world.store.list("index/")).name

    def together() -> None:
        repo = world.open()
        there, ids, rows = indexes.parse(repo.keys, first, world.store.get(first))
        some = [
            IndexedPack(pack, size, ids[rows["pack"] == place], rows[np.flatnonzero(rows["pack"] == place)])
            for place, (pack, size) in enumerate(there.items())
        ]
        indexes.write(world.store, repo.keys, some, era=0)
        world.store.delete(first)

    store = Hook(world.store, begins_era, together)
    assert gc.run(world.open(store)).packs_deleted > 0
    assert store.done
    repo = world.open()
    assert set(indexes.load(world.store, repo.keys).sizes) == {info.name[-32:] for info in world.store.list("packs/")}


def test_a_shipment_that_begins_while_gc_moves(world: World, files: list[Path]) -> None:
    world.reset()
    for disk in (DISK, "other"):
        RepositoryMerge(world.open(), disk, Policy(last=1)).run()
    begun, may_end = threading.Event(), threading.Event()
    ended: list[object] = []

    def shipping() -> None:
        def wait() -> None:
            begun.set()
            assert may_end.wait(HANG)

        try:
            ended.append(ship(files[2], world.open(), store=Hook(world.store, publishes, wait), disk="other").point)
        finally:
            begun.set()

    thread = threading.Thread(target=shipping)

    def begin() -> None:
        thread.start()
        assert begun.wait(HANG)

    store = Hook(world.store, lambda how, name: how == "put" and name.startswith("packs/"), begin)
    try:
        gc.run(world.open(store))
    finally:
        may_end.set()
        thread.join()
    assert store.done, "something was moved"
    assert ended == [3]
    is_sound(world.open())


def test_a_disk_that_gets_another_name_while_gc_moves(world: World) -> None:
    world.reset()
    for disk in (DISK, "other"):
        RepositoryMerge(world.open(), disk, Policy(last=1)).run()

    def rename() -> None:
        renaming(world.open(), "other", "another").run()

    store = Hook(world.store, lambda how, name: how == "put" and name.startswith("packs/"), rename)
    gc.run(world.open(store))
    assert store.done
    is_sound(world.open())


def test_a_collector_without_room_for_its_first_lease_does_not_wait_for_itself(world: World) -> None:
    dropped(world, "other")
    refused: list[str] = []

    def full(operation: str, name: str, body: bytes) -> None:
        if operation == "put" and name.startswith("leases/g-") and body and not refused:
            refused.append(name)
            raise Refused("no space left", subject=name)

    assert gc.run(world.open(Hook(world.store, fails=full))).packs_deleted > 0
    assert refused


def test_verify_while_gc_collects(world: World) -> None:
    for nth in range(1, 100):
        dropped(world, "other")
        calls: list[str] = []

        def when(_operation: str, name: str, calls: list[str] = calls, nth: int = nth) -> bool:
            calls.append(name)
            return len(calls) == nth

        store = Hook(world.store, when, lambda: gc.run(world.open()))
        try:
            found = verify(world.open(store), share=1.0).findings
        except Conflict as error:
            pytest.fail(str(error))
        assert found == ()
        if not store.done:
            assert nth > 20
            return
    raise AssertionError("it never ends")
