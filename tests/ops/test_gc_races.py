"""gc against everything else, one standing still at each of its store calls in turn while the other runs as a whole.

Two kinds: `asleep`, the lease is kept up, as of a busy process; `frozen`, half an hour passes on the store's clock and
none on the sleeper's own, as of a stopped virtual machine: others take it for dead, and it wakes up and goes on.

Whatever happens: a point that was reported as published, or was there and not dropped, reads right; verify finds
nothing; who must give up says so by a Conflict.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from snapchain.errors import Busy, Conflict, NotFound
from snapchain.model.retention import DropPoints, Policy
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data, ObjectInfo, ObjectStore, StoreWrapper
from snapchain.repository import collecting as gc, packs, repository as repositories, sweep
from snapchain.repository.leases import DEAD_SECONDS
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.renaming import renaming
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from tests.exhaustive import EXHAUSTIVE, some
from tests.ops.large_indexes import as_if_large
from tests.ops.shipping import DISK, MiB, ship
from tests.ops.stacks import Layer, build, flat
from tests.ops.test_crash import reads
from tests.repository.synthetic import again, repository

pytestmark = pytest.mark.sampled

Job = Callable[[Repository], object]


class Standing(StoreWrapper):
    """Stands still before its call number `moment`, and lets something happen meanwhile."""

    def __init__(self, inner: ObjectStore, moment: int, meanwhile: Callable[[], object]) -> None:
        super().__init__(inner)
        self.stood = False
        self._moment = moment
        self._meanwhile = meanwhile
        self._count = itertools.count()
        self._lock = threading.Lock()

    def _arrive(self) -> None:
        with self._lock:  # the process stands still, not one thread of it
            if next(self._count) == self._moment:
                self.stood = True
                self._meanwhile()

    def put(self, name: str, data: Data) -> None:
        self._arrive()
        self.inner.put(name, data)

    def create(self, name: str, data: Data) -> bool:
        self._arrive()
        return self.inner.create(name, data)

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        self._arrive()
        return self.inner.get(name, offset=offset, length=length)

    def size(self, name: str) -> int | None:
        self._arrive()
        return self.inner.size(name)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._arrive()
        return self.inner.list(prefix)

    def list_dirs(self, prefix: str) -> Iterator[str]:
        self._arrive()
        return self.inner.list_dirs(prefix)

    def delete(self, name: str) -> None:
        self._arrive()
        self.inner.delete(name)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files that overwrite half of each other."""
    layers = [Layer(MiB, [f"write -P {9 * n + at + 1} {(2 * n + at) * 64}k 64k" for at in range(4)]) for n in range(3)]
    return build(tmp_path_factory.mktemp("races") / "chain", layers)


@pytest.fixture(scope="module")
def shown(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    directory = tmp_path_factory.mktemp("shown")
    return [flat(path, directory / path.name).read_bytes() for path in files]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of a few blobs, so that some are wasted in part; nobody waits for a lease."""
    monkeypatch.setattr(packs, "PACK_BYTES", 1000)
    monkeypatch.setattr(sweep, "LEAST_WASTE", 250)
    monkeypatch.setattr(repositories, "PATIENCE", 0.0)
    monkeypatch.setattr(gc, "PATIENCE", 0.0)
    monkeypatch.setattr(repositories, "READERS_PATIENCE", 0.0)


@dataclass
class World:
    """A repository on a clock of its own. expected: point -> what it shows."""

    origin: Repository
    shown: list[bytes]
    now: float = 1e9
    store: MemoryStore = field(init=False)

    def reset(self) -> None:
        self.store = MemoryStore(clock=lambda: self.now)
        for info in self.origin.store.list(""):
            self.store.put(info.name, self.origin.store.get(info.name))

    def open(self, store: ObjectStore | None = None) -> Repository:
        return again(self.origin, store or self.store)

    def check(self, *, reported: int | None = None) -> None:
        """All points read right, a reported one among them, and verify agrees."""
        opened = self.open()
        points = [point.point for point in opened.catalogue(DISK).points]
        assert reported is None or reported in points, "a published point is lost"
        for point in points:
            assert reads(opened, point) == self.shown[min(point, 3) - 1]
        report = verify(self.open(), share=1.0)
        assert report.ok, report.findings


@pytest.fixture
def world(files: list[Path], shown: list[bytes]) -> World:
    """Two points shipped; garbage left by merges."""
    repo = repository(MemoryStore(), block_size=64 * 1024)
    for path in files[:2]:
        ship(path, repo)
    for path in files[1:]:
        ship(path, repo, disk="other")
    RepositoryMerge(again(repo), "other", Policy(last=1)).run()
    return World(repo, shown)


def moments(world: World, job: Job, other: Job, *, frozen: bool, each: int = 2) -> Iterator[object]:
    """What `job` gave, or the Conflict that it gave up with, for each moment at which it may stand still.

    `make test` takes one moment in `each`: the odd ones of a job that is frozen, the even ones of others.
    """
    for moment in some(itertools.count(int(frozen) if not EXHAUSTIVE else 0), each=each):
        assert moment < 1000
        world.reset()

        def meanwhile() -> None:
            if frozen:
                world.now += 2 * DEAD_SECONDS
            try:
                other(world.open())
            except Busy:
                assert not frozen, "nobody waits for the dead"

        store = Standing(world.store, moment, meanwhile)
        try:
            outcome = job(world.open(store))
        except (Conflict, Busy) as error:
            outcome = error
        if not store.stood:
            assert not isinstance(outcome, Exception)
            assert moment > 5, "hardly anything was ever called"
            return
        world.now += 2 * DEAD_SECONDS  # whatever leases are left
        yield outcome


def collect(repo: Repository) -> None:
    gc.run(repo)


def forget(repo: Repository) -> None:
    """Drop what can be dropped, and collect."""
    for disk in (DISK, "other"):
        RepositoryMerge(repo, disk, Policy(last=1)).run()
    gc.run(repo)


def forget_the_newest(repo: Repository) -> None:
    """The shipment's base goes, and is collected."""
    RepositoryMerge(repo, DISK, DropPoints(frozenset({2}), newest=True)).run()
    gc.run(repo)


def wear_out(repo: Repository) -> None:
    """So many changes that old generations go, twice."""
    for _ in range(16):
        repo.hold(DISK, 2, "x")
        repo.release(DISK, 2, "x")
    gc.run(repo)
    repo.hold(DISK, 2, "x")
    gc.run(repo)


@pytest.fixture(params=[False, True], ids=["small", "large"])
def _indexes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        as_if_large(monkeypatch)


@pytest.mark.usefixtures("_indexes")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("other", [collect, forget, forget_the_newest])
def test_a_shipment(world: World, files: list[Path], other: Job, frozen: bool) -> None:
    ended = []
    for outcome in moments(world, lambda repo: ship(files[2], repo, store=repo.store), other, frozen=frozen):
        reported = None if isinstance(outcome, Conflict | Busy) else outcome.point  # type: ignore[attr-defined]
        ended.append(reported)
        world.check(reported=reported)
        gc.run(world.open())
        world.check(reported=reported)
    assert len(ended) > (15 if EXHAUSTIVE else 7)
    assert any(ended)


def test_a_shipment_that_finds_its_generation_collected(world: World, files: list[Path]) -> None:
    for outcome in moments(world, lambda repo: ship(files[2], repo, store=repo.store), wear_out, frozen=True):
        reported = None if isinstance(outcome, Conflict | Busy) else outcome.point  # type: ignore[attr-defined]
        world.check(reported=reported)


def test_a_shipment_of_nothing_new(world: World, files: list[Path]) -> None:
    for outcome in moments(world, lambda repo: ship(files[1], repo, store=repo.store), forget, frozen=True):
        if not isinstance(outcome, Conflict | Busy):
            number = outcome.point  # type: ignore[attr-defined]
            assert reads(world.open(), number) == world.shown[1]
        assert verify(world.open(), share=1.0).ok


def test_a_first_shipment_of_a_disk(world: World, files: list[Path]) -> None:
    """Nobody but its lease knows of it."""
    for outcome in moments(
        world, lambda repo: ship(files[2], repo, disk="new", store=repo.store), collect, frozen=True
    ):
        if not isinstance(outcome, Conflict | Busy):
            assert [point.point for point in world.open().catalogue("new").points] == [1]
        gc.run(world.open())
        assert verify(world.open(), share=1.0).ok


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("other", [collect, forget])
def test_a_merge(world: World, other: Job, frozen: bool) -> None:
    def job(repo: Repository) -> object:
        return RepositoryMerge(repo, DISK, Policy(last=1)).run()

    for _ in moments(world, job, other, frozen=frozen):
        world.check(reported=2)
        gc.run(world.open())
        world.check(reported=2)


@pytest.mark.parametrize("other", [collect, forget])
@pytest.mark.parametrize("frozen", [False, True])
def test_two_collections(world: World, other: Job, frozen: bool) -> None:
    for _ in moments(world, gc.run, other, frozen=frozen):
        world.check(reported=2)
        gc.run(world.open())
        world.check(reported=2)


@pytest.mark.usefixtures("_indexes")
@pytest.mark.parametrize("frozen", [False, True])
def test_a_collection_during_which_somebody_ships(world: World, files: list[Path], frozen: bool) -> None:
    numbers: list[int] = []

    def other(repo: Repository) -> None:
        numbers.append(ship(files[2], repo, store=repo.store).point or 0)

    for _ in moments(world, gc.run, other, frozen=frozen):
        world.check(reported=numbers.pop() if numbers else None)
        gc.run(world.open())
        world.check(reported=2)
        numbers.clear()


@pytest.mark.parametrize("other", ["a name", "zz"])
def test_a_collection_during_which_a_disk_gets_another_name(world: World, other: str) -> None:
    """Its layers go from one folder to another, which the collection may have looked at before, or not."""

    def rename(repo: Repository) -> None:
        renaming(repo, DISK, other).run()

    done = 0
    for _ in moments(world, gc.run, rename, frozen=False, each=1):
        repo = world.open()
        for point in repo.catalogue(other).points:
            assert reads(repo, point.point, disk=other) == world.shown[point.point - 1]
        report = verify(world.open(), share=1.0)
        assert report.ok, report.findings
        done += 1
    assert done > 15


class InPages(StoreWrapper):
    """Lists the disks in two requests, between which something happens the nth time: what is below `middle`, and the
    rest.
    """

    def __init__(self, inner: ObjectStore, middle: str, meanwhile: Callable[[], object], nth: int) -> None:
        super().__init__(inner)
        self._middle, self._meanwhile, self._left, self.stood = middle, meanwhile, nth, False

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._left -= prefix == "disks/"
        if self._left or self.stood:
            return self.inner.list(prefix)
        first = [info for info in self.inner.list(prefix) if info.name < self._middle]
        self.stood = True
        self._meanwhile()
        return iter([*first, *(info for info in self.inner.list(prefix) if info.name >= self._middle)])


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_disk_that_goes_from_where_a_collection_will_look_to_where_it_has_looked(
    world: World, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "LEAST_WASTE", 1 << 30)  # what is moved is marked once more
    world.reset()
    keys = world.open().keys
    new = next(name for name in map(str, itertools.count()) if keys.disk_key(name) < keys.disk_key(DISK))

    def rename() -> None:
        renaming(world.open(), DISK, new).run()

    store = InPages(world.store, f"disks/{keys.disk_key(DISK)}", rename, nth)
    gc.run(world.open(store))
    assert store.stood
    repo = world.open()
    assert [reads(repo, point.point, disk=new) for point in repo.catalogue(new).points] == world.shown[:2]
    assert verify(world.open(), share=1.0).findings == ()


def test_a_reader_finishes_what_it_began(world: World) -> None:
    """Its lease is alive: what it reads stays, though it is merged away and collected meanwhile."""

    expected: list[bytes] = []
    is_reading = False
    collected_while_reading: list[bool] = []

    def read(repo: Repository) -> object:
        nonlocal is_reading
        is_reading = False
        catalogue = repo.catalogue(DISK)
        layers = repo.chain(catalogue, catalogue.points[0].layer)
        expected.append(world.shown[catalogue.points[0].point - 1])
        with repo.reading({DISK: [layer.id for layer in layers]}, "a test"):
            is_reading = True
            return reads_chain(repo, layers)

    def others(repo: Repository) -> None:
        collected_while_reading.append(is_reading)
        before = repo.store.list("layers/")
        forget(repo)
        gone = {info.name for info in before} - {info.name for info in repo.store.list("layers/")}
        assert gone, "something was collected"

    given_up = 0
    for outcome in moments(world, read, others, frozen=False, each=1):
        if isinstance(outcome, Conflict):
            assert not is_reading, "it may give up before it has begun, and never later"
            assert re.search("collected before|old data collected, while", outcome.message)
            given_up += 1
        else:
            assert outcome == expected[-1]
    assert collected_while_reading.count(True) >= 2
    assert 0 < given_up < collected_while_reading.count(False), collected_while_reading
    world.reset()
    assert read(world.open()) == world.shown[0]


def reads_chain(repo: Repository, layers: object) -> bytes:
    from snapchain.repository.chain import ChainView

    view = ChainView(layers, repo.blobs)  # type: ignore[arg-type]
    buffer = memoryview(bytearray(view.size))
    view.read_into(0, buffer)
    return bytes(buffer)


def test_verify_raises_no_false_alarm(world: World) -> None:
    for outcome in moments(world, lambda repo: verify(repo, share=1.0), forget, frozen=False):
        assert outcome.ok, outcome.findings  # type: ignore[attr-defined]


def test_what_readers_spared_goes_the_next_time(world: World) -> None:
    world.reset()
    repo = world.open()
    catalogue = repo.catalogue(DISK)
    first = catalogue.points[0].layer
    with repo.reading({DISK: [first]}, "a test"):
        forget(world.open())
        assert repo.store.size(f"layers/{first}") is not None
    gc.run(world.open())
    assert repo.store.size(f"layers/{first}") is None
    with pytest.raises(Conflict, match="collected before"), repo.reading({DISK: [first]}, "a test"):
        pass


def test_a_lease_that_was_ended_stays_ended_when_it_is_put_once_more(world: World) -> None:
    """Its holder stood still between its look at the lease and the refresh."""
    world.reset()
    from snapchain.repository.fence import bury
    from snapchain.repository.leases import Mode

    repo = world.open()
    with repo.lease(Mode.WRITE, "ship", on_wait=print, disks=[DISK]) as lease:
        lease.check()
        world.now += 2 * DEAD_SECONDS
        with world.open().lease(Mode.COLLECT, "gc", on_wait=print) as collects:
            bury(world.open(), collects)
        lease._put()
        assert repo.store.size(lease.name) is not None
        with pytest.raises(Conflict, match="others took it for dead"):
            lease.check()


def test_what_a_living_writer_may_need_goes_the_next_time(world: World) -> None:
    from snapchain.repository.leases import Mode

    world.reset()
    RepositoryMerge(world.open(), DISK, Policy(last=1)).run()
    first = world.open()
    with first.lease(Mode.WRITE, "ship web9/vda", on_wait=print, disks=["web9/vda"]):
        world.now += 10
        report = gc.run(world.open())
        assert (report.packs_deleted, report.bytes_left > 0) == (0, True)
        assert "ship web9/vda on" in report.waits_for[0]
        with world.open().lease(Mode.WRITE, "ship web8/vda", on_wait=print, disks=["web8/vda"]):
            assert gc.run(world.open()).packs_deleted == 0
    with world.open().lease(Mode.WRITE, "ship web8/vda", on_wait=print, disks=["web8/vda"]):
        report = gc.run(world.open())
    assert (report.packs_deleted > 0, report.bytes_left, report.waits_for) == (True, 0, ())
    world.check(reported=2)


def test_a_disk_that_was_fenced_before_it_was_made_can_be_made(world: World, files: list[Path]) -> None:
    world.reset()
    repo = world.open()
    from snapchain.repository.leases import Mode

    lease = repo.lease(Mode.WRITE, "ship new", on_wait=print, disks=["new"])
    with lease:
        world.now += 2 * DEAD_SECONDS
        gc.run(world.open())
        with pytest.raises(Conflict, match="others took it for dead"):
            lease.check()
    assert world.open().catalogue("new").points == ()
    assert ship(files[0], world.open(), disk="new", store=world.store).point == 1
    with pytest.raises(NotFound, match="there is no disk 'none'"):
        world.open().catalogue("none")
