"""Several hosts at work on one repository, each stopped before every call of its store: hypothesis says who goes on.

Writers ship to disks that are there and to new ones, drop points, and collect; readers read.  Any of them may die, lose
a reply, or stand still while half an hour passes on the store's clock, and the clocks of their hosts are wrong by up to
an hour.  All of it is the real code.

Whatever happens: no point that was reported is lost but by who was told to drop it, every point that is there reads
right, nobody reads wrong bytes, and nobody meets damage.  Once all have ended, two collections leave nothing behind
that is not in use.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from snapchain.errors import Busy, Conflict, NotFound, Unavailable
from snapchain.model.retention import Policy
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data, ObjectInfo, ObjectStore, StoreWrapper
from snapchain.repository import collecting, leases, packs, repository as repositories, sweep
from snapchain.repository.chain import ChainView
from snapchain.repository.leases import DEAD_SECONDS
from snapchain.repository.mark import mark
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from snapchain.testing.faults import Crash
from tests.exhaustive import examples
from tests.ops.large_indexes import as_if_large
from tests.ops.shipping import MiB, ship
from tests.ops.stacks import Layer, build, flat
from tests.repository.synthetic import again, repository
from tests.waiting import HANG

pytestmark = pytest.mark.sampled

DISKS = ("a", "b", "new")
Result = TypeVar("Result")


class Gate(StoreWrapper):
    """Each call waits until it is let through, by the test alone."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self._changed = threading.Condition()
        self._granted = 0
        self._waiting = 0
        self._ended = self._dead = self._free = self._loses = False

    def _call(self, effect: Callable[[], Result], *, changes: bool = False) -> Result:
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._granted or self._dead or self._free)
            self._waiting -= 1
            if self._dead:
                raise Crash
            self._granted -= not self._free
            loses, self._loses = self._loses and changes, self._loses and not changes
            self._changed.notify_all()
        result = effect()
        with self._changed:
            if self._dead:
                raise Crash
        if loses:
            raise Unavailable("the reply was lost")
        return result

    def let(self, count: int) -> None:
        """Let so many calls through, and wait for the next one, or the end."""
        with self._changed:
            self._granted = count
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or (not self._granted and self._waiting))
            self._granted = 0

    def lose_a_reply(self) -> None:
        """The next change happens, and is said not to have happened."""
        self._loses = True

    def kill(self) -> None:
        """No call has an effect from now on."""
        with self._changed:
            self._dead = True
            self._changed.notify_all()

    def open(self) -> None:
        """Let all calls through from now on."""
        with self._changed:
            self._free = True
            self._changed.notify_all()

    def end(self) -> None:
        """Nobody calls any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def has_ended(self) -> bool:
        return self._ended

    def put(self, name: str, data: Data) -> None:
        self._call(lambda: self.inner.put(name, data), changes=True)

    def create(self, name: str, data: Data) -> bool:
        return self._call(lambda: self.inner.create(name, data), changes=True)

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        return self._call(lambda: self.inner.get(name, offset=offset, length=length))

    def size(self, name: str) -> int | None:
        return self._call(lambda: self.inner.size(name))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(self._call(lambda: list(self.inner.list(prefix))))

    def list_dirs(self, prefix: str) -> Iterator[str]:
        return iter(self._call(lambda: list(self.inner.list_dirs(prefix))))

    def delete(self, name: str) -> None:
        self._call(lambda: self.inner.delete(name), changes=True)


@dataclass
class Actor:
    """A process on a host. error: what it ended with; dropped: points that it may have dropped, by disk."""

    gate: Gate
    thread: threading.Thread
    error: BaseException | None = None
    dropped: dict[str, set[int]] = field(default_factory=dict)


class Skewed(datetime):
    """Clocks of hosts that are wrong by up to an hour."""

    draw = random.Random(1)

    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        assert tz is UTC
        return datetime.now(UTC) + timedelta(seconds=cls.draw.uniform(-3600, 3600))


@dataclass(frozen=True)
class Files:
    """What can be shipped, and what each shows, by its content id."""

    paths: list[Path]
    shown: dict[str, bytes]
    origin: Repository


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Five files, each of which overwrites half of the one below it, and a repository with two points of two disks."""
    directory = tmp_path_factory.mktemp("model")
    layers = [Layer(MiB, [f"write -P {9 * n + at + 1} {(2 * n + at) * 64}k 64k" for at in range(4)]) for n in range(5)]
    paths = build(directory / "chain", layers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "PACK_BYTES", 1000)
        origin = repository(MemoryStore(), block_size=64 * 1024)
        for disk in ("a", "b"):
            for path in paths[:2]:
                ship(path, origin, disk=disk)
        other = repository(MemoryStore(), block_size=64 * 1024)
        reports = [ship(path, other, disk="x") for path in paths]
    shown = {
        report.content_id: flat(path, directory / path.name).read_bytes()
        for path, report in zip(paths, reports, strict=True)
    }
    return Files(paths, shown, origin)


class Hosts(RuleBasedStateMachine):
    """See above."""

    files: Files

    def __init__(self) -> None:
        super().__init__()
        self.now = 1e9
        self.store = MemoryStore(clock=lambda: self.now)
        self.actors: list[Actor] = []
        self.reported: dict[str, set[int]] = {"a": {1, 2}, "b": {1, 2}, "new": set()}
        self.dropped: dict[str, set[int]] = {disk: set() for disk in DISKS}

    @initialize()
    def begin(self) -> None:
        origin = self.files.origin
        for info in origin.store.list(""):
            self.store.put(info.name, origin.store.get(info.name))

    def _open(self, store: ObjectStore) -> Repository:
        return again(self.files.origin, store)

    def _start(self, job: Callable[[Actor, Repository], None]) -> None:
        gate = Gate(self.store)

        def run() -> None:
            try:
                job(actor, self._open(gate))
            except BaseException as error:  # noqa: BLE001 -- looked at by the test
                actor.error = error
            finally:
                gate.end()

        actor = Actor(gate, threading.Thread(target=run, daemon=True))
        self.actors.append(actor)
        actor.thread.start()
        gate.let(0)

    # --- Who begins what.

    @precondition(lambda self: len(self.actors) < 5)
    @rule(disk=st.sampled_from(DISKS), number=st.integers(0, 4))
    def ships(self, disk: str, number: int) -> None:
        def job(actor: Actor, repo: Repository) -> None:
            report = ship(self.files.paths[number], repo, disk=disk, store=repo.store)
            assert report.point is not None
            self.reported[disk].add(report.point)

        self._start(job)

    @precondition(lambda self: len(self.actors) < 5)
    @rule(disk=st.sampled_from(DISKS))
    def drops(self, disk: str) -> None:
        def job(actor: Actor, repo: Repository) -> None:
            if not repo.catalogue(disk).points:
                return  # fenced before its first shipment had ended
            work = RepositoryMerge(repo, disk, Policy(last=1))
            actor.dropped[disk] = {each.point for each in work.plan().points if not each.kept}
            work.run()

        self._start(job)

    @precondition(lambda self: len(self.actors) < 5)
    @rule()
    def collects(self) -> None:
        self._start(lambda _actor, repo: self._collect(repo))

    @staticmethod
    def _collect(repo: Repository) -> None:
        assert collecting.run(repo).findings == ()

    @precondition(lambda self: len(self.actors) < 5)
    @rule(disk=st.sampled_from(DISKS), newest=st.booleans())
    def reads(self, disk: str, newest: bool) -> None:
        def job(_actor: Actor, repo: Repository) -> None:
            catalogue = repo.catalogue(disk)
            if not catalogue.points:
                return
            point = catalogue.points[-1 if newest else 0]
            chain = repo.chain(catalogue, point.layer)
            with repo.reading({disk: [layer.id for layer in chain]}, f"restore {disk}"):
                assert _read(repo, ChainView(chain, repo.blobs)) == self.files.shown[point.content_id]

        self._start(job)

    # --- What happens to them.

    @precondition(lambda self: self.actors)
    @rule(data=st.data(), count=st.sampled_from([1, 1, 2, 3, 5, 8, 13, 21]))
    def goes_on(self, data: st.DataObject, count: int) -> None:
        actor = data.draw(st.sampled_from(self.actors))
        actor.gate.let(count)
        if actor.gate.has_ended:
            self._judge(actor)

    @precondition(lambda self: self.actors)
    @rule(data=st.data())
    def goes_to_its_end(self, data: st.DataObject) -> None:
        actor = data.draw(st.sampled_from(self.actors))
        actor.gate.open()
        actor.thread.join(HANG)
        self._judge(actor)

    @precondition(lambda self: self.actors)
    @rule(data=st.data())
    def dies(self, data: st.DataObject) -> None:
        actor = data.draw(st.sampled_from(self.actors))
        actor.gate.kill()
        self._judge(actor)

    @precondition(lambda self: self.actors)
    @rule(data=st.data())
    def loses_a_reply(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.actors)).gate.lose_a_reply()

    @rule()
    def half_an_hour_passes(self) -> None:
        """While nobody moves: everybody at work is taken for dead."""
        self.now += 2 * DEAD_SECONDS

    def _judge(self, actor: Actor) -> None:
        """What an actor that has ended may have ended with."""
        actor.thread.join(HANG)
        assert not actor.thread.is_alive()
        self.actors.remove(actor)
        for disk, points in actor.dropped.items():
            self.dropped[disk] |= points
        allowed = (Conflict, Busy, Unavailable, NotFound, Crash)
        if actor.error is not None and not isinstance(actor.error, allowed):
            raise actor.error
        if isinstance(actor.error, NotFound):
            assert "there is no disk 'new' here" in actor.error.message

    def teardown(self) -> None:
        try:
            for actor in list(self.actors):
                actor.gate.open()
                self._judge(actor)
            self.now += 2 * DEAD_SECONDS
            if self.store.size("config") is None and not list(self.store.list("disks/")):
                return
            self._check()
            for _ in range(3):
                self._collect(self._open(self.store))
            self._check()
            self._check_nothing_is_left()
        finally:
            for actor in self.actors:
                actor.gate.kill()

    def _check(self) -> None:
        for disk in DISKS:
            repo = self._open(self.store)
            try:
                catalogue = repo.catalogue(disk)
            except NotFound:
                assert not self.reported[disk]
                continue
            there = {point.point for point in catalogue.points}
            assert self.reported[disk] - self.dropped[disk] <= there
            for point in catalogue.points:
                view = ChainView(repo.chain(catalogue, point.layer), repo.blobs)
                assert _read(repo, view) == self.files.shown[point.content_id]
        report = verify(self._open(self.store), share=1.0)
        assert report.ok, report.findings

    def _check_nothing_is_left(self) -> None:
        found = mark(self._open(self.store))
        assert found.dead_layers == {}
        assert [pack.pack for pack in found.usage if not len(pack.offsets)] == []
        assert found.index.condemned.packs == {}
        assert [info.name for info in self.store.list("leases/") if not info.name.endswith(".ended")] == []


def _read(repo: Repository, view: ChainView) -> bytes:
    buffer = memoryview(bytearray(view.size))
    view.read_into(0, buffer)
    return bytes(buffer)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of a few blobs, so that some are wasted in part; nobody waits for others."""
    monkeypatch.setattr(packs, "PACK_BYTES", 1000)
    monkeypatch.setattr(sweep, "LEAST_WASTE", 250)
    monkeypatch.setattr(repositories, "PATIENCE", 0.0)
    monkeypatch.setattr(repositories, "READERS_PATIENCE", 0.0)
    monkeypatch.setattr(collecting, "PATIENCE", 0.0)
    monkeypatch.setattr(leases, "datetime", Skewed)


@pytest.mark.parametrize("indexes", ["small", "large"])
def test_whoever_goes_on_no_point_is_lost(files: Files, indexes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if indexes == "large":
        as_if_large(monkeypatch)

    class Machine(Hosts):
        pass

    Machine.files = files
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples(8, times=80),
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
