"""Points go to another repository: exact bytes, the same content ids and numbers, whatever happens meanwhile."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from hypothesis import given, settings, strategies as st

from snapchain.destination.reading import Sink
from snapchain.errors import Corrupt, InvalidInput, NotFound, Unavailable
from snapchain.model.retention import DropPoints
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data, ObjectStore, Refused, StoreWrapper
from snapchain.ops.copy.plan import plan
from snapchain.ops.copy.request import CopyReport, CopyRequest
from snapchain.ops.copy.run import run
from snapchain.repository import collecting, copying, packs
from snapchain.repository.catalogue import Hold, Point
from snapchain.repository.chain import ChainView
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from snapchain.testing.faults import Fault, FaultStore, On, crash_points
from tests.exhaustive import chosen, examples, some
from tests.repository.synthetic import LEAF, Drawn, Run, again, drawn, repository, ship, stacks

DISK = "web1/vda"
BEGIN = datetime(2026, 11, 1, 22, tzinfo=UTC)


@dataclass
class Source:
    """A repository with points of synthetic layers. shown: by disk and number, what each point must show."""

    repository: Repository = field(default_factory=repository)
    shown: dict[tuple[str, int], bytes] = field(default_factory=dict)

    begin: datetime = BEGIN

    def publish(self, stack: Sequence[Drawn], *, disk: str = DISK, of: Collection[int] | None = None) -> None:
        """A point of each layer of a new chain, or of the layers of these places."""
        layers = ship(stack, self.repository).layers
        catalogues = again(self.repository).disk(disk)
        current = catalogues.read()
        points, parents = (current[0].points, dict(current[0].parents)) if current else ((), {})
        number = current[0].next_point if current else 1
        for place, layer in enumerate(layers):
            parents[layer.id] = layers[place - 1].id if place else None
            if of is not None and place not in of:
                continue
            point = Point(
                point=number,
                time=self.begin + timedelta(hours=number),
                labels=(f"p{number}",),
                layer=layer.id,
                size=layer.size,
                content_id=layer.header.content_id,
                holds=(Hold(tag="legal", since=BEGIN, reason="a lawsuit"),) if number % 3 == 0 else (),
            )
            points = (*points, point)
            self.shown[disk, number] = stack[place].shown
            number += 1
        catalogues.advance(current, time=BEGIN, points=points, parents=parents, next_point=number)

    def drop(self, *numbers: int, disk: str = DISK) -> None:
        RepositoryMerge(again(self.repository), disk, DropPoints(frozenset(numbers))).run()
        left = {point.point for point in again(self.repository).catalogue(disk).points}  # the newest one stays
        for number in set(numbers) - left:
            del self.shown[disk, number]

    def opened(self, store: ObjectStore | None = None) -> RepositoryDestination:
        return RepositoryDestination(again(self.repository, store))


def copy(source: Source, to: Repository, *names: str, **asked: object) -> CopyReport:
    return run(CopyRequest(names=names, **asked), source.opened(), RepositoryDestination(again(to)))  # type: ignore[arg-type]


def content(repo: Repository, disk: str, number: int) -> bytes:
    """What a point shows, by a repository opened afresh; its content id is that of the record."""
    with RepositoryDestination(again(repo)).reader(disk, str(number), clusters=False) as reader:
        shown = bytearray(reader.point.virtual_size)

        class Into:
            @staticmethod
            def write(pieces: Sequence[tuple[int, memoryview]]) -> None:
                for offset, data in pieces:
                    shown[offset : offset + len(data)] = data

        for layer in reader.layers():
            assert layer.copy(Sink(Into.write), on_copied=lambda *_: None) == reader.point.content_id
    return bytes(shown)


def check_same(source: Source, to: Repository, disk: str = DISK) -> None:
    """Each point of the source is there: the same number, bytes, content id, time, labels and holds."""
    ours = RepositoryDestination(again(source.repository)).disks(disk)[0].points
    theirs = {point.point: point for point in RepositoryDestination(again(to)).disks(disk)[0].points}
    for point in ours:
        copied = theirs[point.point]
        assert copied.model_copy(update={"layers": point.layers}) == point
        assert content(to, disk, point.point) == source.shown[disk, point.point]
    assert verify(again(to), share=1.0).ok


def grown(count: int, *, leaves: int = 4) -> list[Drawn]:
    """A stack in which each layer overwrites one leaf and a few bytes of another."""
    stack = [drawn(leaves * LEAF, [Run(0, leaves * LEAF, 2000)], b"")]
    for number in range(1, count):
        runs = [Run(number % leaves * LEAF, LEAF, 3000 + number), Run((number + 1) % leaves * LEAF + 512, 4096, number)]
        stack.append(drawn(leaves * LEAF, runs, stack[-1].shown))
    return stack


def test_all_points_are_copied_with_their_numbers() -> None:
    source, to = Source(), repository()
    source.publish(grown(5))
    for number in (7, 5):  # other chains
        source.publish([drawn(8 * LEAF, [Run(number * LEAF, LEAF, 7000 + number)], b"")])
    source.drop(2)
    report = copy(source, to)
    assert report.ok
    assert [(point.point, point.point_there) for point in report.disks[0].points] == [
        (n, n) for n in (1, 3, 4, 5, 6, 7)
    ]
    check_same(source, to)
    again_report = copy(source, to)
    assert (again_report.points, again_report.bytes_read, again_report.bytes_stored) == (0, 0, 0)
    assert again_report.disks[0].present == 6


@pytest.mark.sampled
@settings(max_examples=examples(10))
@given(st.lists(stacks(max_layers=4), min_size=1, max_size=3), st.data())
def test_chains_copied_in_instalments(chains: list[list[Drawn]], data: st.DataObject) -> None:
    source, to = Source(), repository(block_size=2 * LEAF)
    for stack in chains:
        source.publish(stack, of=data.draw(st.sets(st.integers(0, len(stack) - 1), min_size=1)))
        numbers = [number for _, number in source.shown]
        for _ in range(data.draw(st.integers(0, 2))):
            step = data.draw(st.sampled_from(["copy", "newest", "since", "drop", "gc", "drop there"]))
            if step == "copy":
                assert copy(source, to).ok
            elif step == "newest":
                assert copy(source, to, newest=True).ok
            elif step == "since":
                assert copy(source, to, since=str(data.draw(st.sampled_from(numbers)))).ok
            elif step == "drop" and len(numbers) > 1:
                source.drop(data.draw(st.sampled_from(numbers)))
                numbers = [number for _, number in source.shown]
            elif step == "gc":
                collecting.run(again(source.repository))
            elif step == "drop there" and to.disk(DISK).read():
                there = again(to).catalogue(DISK).points
                if len(there) > 1:
                    chosen = data.draw(st.sampled_from([point.point for point in there]))
                    RepositoryMerge(again(to), DISK, DropPoints(frozenset([chosen]))).run()
    assert copy(source, to).ok
    check_same(source, to)
    assert copy(source, to).points == 0


# --- what goes wrong at either side


@pytest.fixture
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several packs, so that there are moments between them."""
    monkeypatch.setattr(packs, "PACK_BYTES", 100_000)


def twin(repo: Repository) -> Repository:
    """The same repository in a store of its own."""
    store = MemoryStore()
    for info in repo.store.list(""):
        store.put(info.name, repo.store.get(info.name))
    return again(repo, store)


@pytest.mark.sampled
@pytest.mark.usefixtures("_small_packs")
def test_a_crash_at_each_step_loses_nothing_and_the_next_run_finishes() -> None:
    source, empty = Source(), repository()
    source.publish(grown(3))
    deaths = most = 0

    def job(store: ObjectStore) -> object:
        return run(CopyRequest(), source.opened(), RepositoryDestination(again(empty, store)))

    undisturbed = twin(empty)
    job(undisturbed.store)
    whole = sum(info.size for info in undisturbed.store.list("packs/"))
    for _, left in crash_points(lambda: twin(empty).store, job):
        deaths += 1
        if not chosen(deaths, each=3):
            continue
        there = again(empty, left)
        if there.disk(DISK).read():
            for point in there.catalogue(DISK).points:
                assert content(there, DISK, point.point) == source.shown[DISK, point.point]
        listed = sum(again(empty, left).index().sizes.values())
        before = {info.name for info in left.list("packs/")}
        report = job(left)
        assert isinstance(report, CopyReport)
        assert report.ok
        check_same(source, there)
        # What a run has stored and listed, the next one does not send again.
        sent = sum(info.size for info in left.list("packs/") if info.name not in before)
        assert listed + sent <= whole + 4096
        most = max(most, listed)
    assert deaths > 20
    assert most > whole // 2


@pytest.mark.sampled
@pytest.mark.usefixtures("_small_packs")
@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.TRUNCATED, Fault.BIT_FLIP])
def test_whatever_read_of_the_source_fails_nothing_wrong_is_published(fault: Fault) -> None:
    origin = Source()
    origin.publish(grown(3))
    failed = refused = 0
    expected = Unavailable if fault is Fault.UNAVAILABLE else Corrupt
    for number in some(itertools.count(1), each=3):
        source = Source(twin(origin.repository), origin.shown)
        store, to = FaultStore(source.repository.store, [On(number, fault, operation="get")]), repository()
        try:
            report = run(CopyRequest(), source.opened(store), RepositoryDestination(again(to)))
        except expected:
            failed += 1
        else:
            refused += not report.ok
        if to.disk(DISK).read():
            for point in again(to).catalogue(DISK).points:
                assert content(to, DISK, point.point) == source.shown[DISK, point.point]
        assert copy(source, to).ok
        check_same(source, to)
        if sum(call.operation == "get" for call in store.calls) < number:
            break
    assert failed
    assert refused or fault is Fault.UNAVAILABLE


@pytest.mark.sampled
@pytest.mark.usefixtures("_small_packs")
def test_damage_at_the_destination_is_no_fault_of_the_source() -> None:
    """A reader there gets one bit wrong: the run fails, or gets over it."""
    source, there = Source(), repository()
    source.publish(grown(2))
    copy(source, there)
    source.publish(grown(3))
    for number in some(itertools.count(1), each=3):
        to = twin(there)
        store = FaultStore(to.store, [On(number, Fault.BIT_FLIP, operation="get")])
        try:
            (disk,) = run(CopyRequest(), source.opened(), RepositoryDestination(again(to, store))).disks
        except Corrupt:
            pass
        else:
            assert disk.refused == ()
        for point in again(to).catalogue(DISK).points:
            assert content(to, DISK, point.point) == source.shown[DISK, point.point]
        assert copy(source, to).ok
        if sum(call.operation == "get" for call in store.calls) < number:
            break


class Meanwhile(StoreWrapper):
    """A store in which something happens before the nth read of an object."""

    def __init__(self, inner: ObjectStore, number: int, happens: Callable[[], object]) -> None:
        super().__init__(inner)
        self._left, self._happens = number, happens
        self._lock = threading.Lock()

    @property
    def has_happened(self) -> bool:
        return self._left <= 0

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        with self._lock:
            self._left -= 1
            now = self._left == 0
        if now:
            self._happens()
        return self.inner.get(name, offset=offset, length=length)


class ReadOnly(StoreWrapper):
    """What a key for reading alone allows: no lease can be placed, so a collector spares nothing."""

    def put(self, name: str, data: Data) -> None:
        _ = data
        raise Refused("access denied (AccessDenied)", subject=name)


@pytest.mark.sampled
@pytest.mark.parametrize("leases", [True, False])
def test_points_that_are_dropped_merged_and_collected_meanwhile(*, leases: bool) -> None:
    origin = Source()
    origin.publish(grown(5))
    seen: set[tuple[int, ...]] = set()
    for number in some(itertools.count(1), each=4):
        source, to = Source(twin(origin.repository), dict(origin.shown)), repository()

        def happens(source: Source = source) -> None:
            source.drop(1, 2, 4)
            collecting.run(again(source.repository))

        store = Meanwhile(source.repository.store, number, happens)
        read = source.opened(store if leases else ReadOnly(store))
        report = run(CopyRequest(), read, RepositoryDestination(again(to)))
        assert report.ok, (number, report.disks)
        for point in again(to).catalogue(DISK).points:
            assert content(to, DISK, point.point) == origin.shown[DISK, point.point]
        check_same(source, to)
        seen.add(tuple(point.point for point in again(to).catalogue(DISK).points))
        if not store.has_happened:
            break
    assert {(3, 5), (1, 2, 3, 4, 5)} <= seen
    assert leases == (len(seen) == 2)  # what is read under a lease stays until it was copied


def test_what_is_damaged_is_named_and_the_other_points_are_copied() -> None:
    """A leaf of layer 2 is lost. Point 3 shows it too, point 4 has written over it."""
    source, to = Source(), repository()
    low = [drawn(2 * LEAF, [Run(0, 2 * LEAF, 2000)], b"")]
    for runs in ([Run(0, LEAF, 4001)], [Run(LEAF, LEAF, 4002)], [Run(0, LEAF, 4003)]):
        low.append(drawn(2 * LEAF, runs, low[-1].shown))
    source.publish(low)
    source.publish(grown(2), disk="db/vda")
    lost = source.repository.catalogue(DISK).points[1].layer
    page = source.repository.layer(lost).pages(0, LEAF)[0]
    source.repository.store.delete(f"packs/{page.packs[0][:2]}/{page.packs[0]}")
    report = copy(source, to)
    (db, web) = report.disks
    assert (len(db.points), [point.point for point in web.points]) == (2, [1, 4])
    assert [(each.point, each.kind) for each in web.refused] == [(2, "corrupt"), (3, "corrupt")]
    assert "the pack is missing from the store" in web.refused[0].message
    assert not report.ok
    for number in (1, 4):
        assert content(to, DISK, number) == source.shown[DISK, number]
    assert verify(again(to), share=1.0).ok
    assert [point.point for point in copy(source, to).disks[1].refused] == [2, 3]


def test_what_differs_from_the_content_id_of_the_source_is_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(ChainView):
        def read_pieces(self, pieces: Sequence[tuple[int, memoryview]], /) -> None:
            super().read_pieces(pieces)
            pieces[0][1][0] ^= 1

    source, to = Source(), repository()
    source.publish(grown(2))
    monkeypatch.setattr(copying, "ChainView", Wrong)
    (disk,) = copy(source, to).disks
    assert [(each.point, each.kind) for each in disk.refused] == [(1, "corrupt"), (2, "corrupt")]
    assert "what was read has the content id" in disk.refused[0].message
    assert to.disk(DISK).read() is None


def test_what_is_there_is_not_read_again() -> None:
    source, to = Source(), repository()
    stack = grown(6)
    source.publish(stack[:3])
    assert copy(source, to).bytes_read == 8 * LEAF
    source.publish(stack, of=[3])
    assert copy(source, to).bytes_read == 4 * LEAF  # another chain
    source.drop(1, 2)
    source.publish(stack[:3], of=[2])
    report = copy(source, to)
    assert (report.points, report.bytes_read, report.bytes_stored) == (1, 0, 0)


def test_a_lost_record_of_a_layer_is_named() -> None:
    source, to = Source(), repository()
    source.publish(grown(3))
    source.repository.store.delete(f"layers/{source.repository.catalogue(DISK).points[1].layer}")
    planned = plan(CopyRequest(), source.opened(), RepositoryDestination(to))
    assert [each.point for each in planned.disks[0].refused] == [2, 3]
    report = copy(source, to)
    assert [each.point for each in report.disks[0].points] == [1]
    assert [each.kind for each in report.disks[0].refused] == ["corrupt", "corrupt"]


def test_a_damaged_catalogue_stops_its_disk_alone() -> None:
    source, to = Source(), repository()
    for disk in ("a", "b"):
        source.publish(grown(1), disk=disk)
    (lost,) = source.repository.store.list(f"disks/{source.repository.keys.disk_key('a')}/")
    whole = source.repository.store.get(lost.name)
    source.repository.store.put(lost.name, whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Corrupt) as caught:
        copy(source, to)
    assert "name the other disks" in str(caught.value.hint)
    assert copy(source, to, "b").points == 1
    source.repository.store.put(lost.name, whole)
    there = next(iter(to.store.list(f"disks/{to.keys.disk_key('b')}/")))
    to.store.put(there.name, b"nothing")
    planned = plan(CopyRequest(), source.opened(), RepositoryDestination(again(to)))
    report = copy(source, to)
    for found in (planned, report):
        assert [disk.failed is None for disk in found.disks] == [True, False]
    assert report.points == 1


def test_damage_at_the_destination_is_not_built_on() -> None:
    source, to = Source(), repository()
    source.publish(grown(2))
    copy(source, to, since="1")
    for info in list(to.store.list("packs/")):
        to.store.delete(info.name)
    more = grown(3)
    source.publish(more)
    assert copy(source, to).ok
    for number in (3, 4, 5):
        assert content(to, DISK, number) == source.shown[DISK, number]


def test_a_point_that_is_dropped_there_meanwhile_is_no_base() -> None:
    source, to = Source(), repository()
    source.publish(grown(2))
    copy(source, to)
    source.publish(grown(4))

    def happens() -> None:
        RepositoryMerge(again(to), DISK, DropPoints(frozenset([1]))).run()

    for number in range(1, 12, 3):
        store = Meanwhile(twin(to).store, number, happens)
        assert run(CopyRequest(), source.opened(), RepositoryDestination(again(to, store))).ok
        for point in again(to, store.inner).catalogue(DISK).points:
            assert content(again(to, store.inner), DISK, point.point) == source.shown[DISK, point.point]


# --- whose points they are


def points_there(repo: Repository, disk: str = DISK) -> list[tuple[int, bytes]]:
    return [(point.point, content(repo, disk, point.point)) for point in again(repo).catalogue(disk).points]


def test_newest_and_since() -> None:
    source, to = Source(), repository()
    source.publish(grown(5))
    assert [point.point for point in copy(source, to, newest=True).disks[0].points] == [5]
    for since, numbers in [("p4", [4]), ("3", [3]), ("2026-11-02T00:30:00Z", [2])]:
        assert [point.point for point in copy(source, to, since=since).disks[0].points] == numbers
    assert [point.point for point in copy(source, to, since="2020-01-01").disks[0].points] == [1]
    check_same(source, to)
    assert copy(source, to, since="nothing").disks[0].failed is not None
    with pytest.raises(InvalidInput, match="both given"):
        copy(source, to, newest=True, since="3")


def test_what_was_dropped_there_stays_dropped_with_newer() -> None:
    source, to = Source(), repository()
    source.publish(grown(4))
    copy(source, to)
    RepositoryMerge(again(to), DISK, DropPoints(frozenset([1, 2]))).run()
    source.publish(grown(2))
    assert [point.point for point in copy(source, to, newer=True).disks[0].points] == [5, 6]
    assert [point.point for point in copy(source, to).disks[0].points] == [1, 2]
    check_same(source, to)


def test_names_and_patterns() -> None:
    source, to = Source(), repository()
    for disk in ("web1/vda", "web1/vdb", "db/vda"):
        source.publish(grown(1), disk=disk)
    assert [disk.disk for disk in copy(source, to, "web*").disks] == ["web1/vda", "web1/vdb"]
    assert [disk.disk for disk in copy(source, to, "db/vda").disks] == ["db/vda"]
    with pytest.raises(NotFound, match="'mail' names no disk and no guest"):
        copy(source, to, "web1/vda", "mail")


def test_points_beside_those_of_another_origin_get_the_next_numbers() -> None:
    source, other, to = Source(), Source(), repository()
    other.publish([drawn(LEAF, [Run(0, LEAF, 5000 + n)], b"") for n in range(2)])
    source.publish(grown(5))
    copy(other, to)
    (disk,) = copy(source, to, newest=True).disks
    assert (disk.keeps_numbers, [(point.point, point.point_there) for point in disk.points]) == (False, [(5, 3)])
    # Those that are not newer than what is there would become `latest`.
    report = copy(source, to)
    assert not report.ok
    assert [(each.point, each.kind) for each in report.disks[0].refused] == [(n, "conflict") for n in (1, 2, 3, 4)]
    assert (report.disks[0].present, report.points) == (1, 0)
    source.publish([drawn(LEAF, [Run(0, LEAF, 6000)], b"")])
    assert [(point.point, point.point_there) for point in copy(source, to).disks[0].points] == [(6, 4)]
    assert points_there(to)[2:] == [(3, source.shown[DISK, 5]), (4, source.shown[DISK, 6])]


def test_a_disk_that_follows_on_older_points_keeps_its_numbers() -> None:
    source, to = Source(), repository()
    source.publish(grown(2))
    copy(source, to)
    source.publish(grown(3))
    source.drop(1, 2)
    assert [(point.point, point.point_there) for point in copy(source, to).disks[0].points] == [(3, 3), (4, 4), (5, 5)]


def test_newer_points_of_another_origin_stay_above() -> None:
    """No number is that of two points, and yet those of the source would come above newer ones."""
    source, other, to = Source(), Source(begin=BEGIN + timedelta(days=9)), repository()
    other.publish(grown(2))
    copy(other, to)
    source.publish(grown(4))
    source.drop(1, 2)
    assert [each.point for each in copy(source, to).disks[0].refused] == [3, 4]
    assert [number for number, _ in points_there(to)] == [1, 2]


@pytest.mark.sampled
def test_a_number_that_another_writer_takes_meanwhile() -> None:
    outcomes: set[tuple[int, ...]] = set()
    for number in some(itertools.count(1), each=2):
        source, to = Source(), repository()
        source.publish(grown(2))
        copy(source, to)
        source.publish(grown(2))
        other = Source(to, begin=BEGIN - timedelta(minutes=1))
        store = Meanwhile(to.store, number, lambda other=other: other.publish(grown(1)))  # type: ignore[misc]
        report = run(CopyRequest(), source.opened(), RepositoryDestination(again(to, store)))
        (disk,) = report.disks
        assert disk.failed is None
        there = dict(points_there(to))
        for point in disk.points:
            assert there[point.point_there] == source.shown[DISK, point.point]
        for each in disk.refused:
            assert each.kind == "conflict"
        assert len(disk.points) + len(disk.refused) == 2
        outcomes.add(tuple(point.point_there for point in disk.points))
        if not store.has_happened:
            break
    assert {(3, 4), (3, 5), (4, 5)} <= outcomes


@pytest.mark.sampled
@pytest.mark.parametrize("keeps_numbers", [True, False])
def test_two_copies_at_once_publish_each_point_once(*, keeps_numbers: bool) -> None:
    for number in some(itertools.count(1), each=4):
        source, to = Source(begin=BEGIN + timedelta(days=1)), repository()
        source.publish(grown(3))
        if not keeps_numbers:
            copy(other_origin(), to)
        store = Meanwhile(to.store, number, partial(copy, source, to))
        report = run(CopyRequest(), source.opened(), RepositoryDestination(again(to, store)))
        assert report.ok, report
        shown = [content for _, content in points_there(to)]
        assert shown[-3:] == [source.shown[DISK, number] for number in (1, 2, 3)]
        assert len(shown) == (3 if keeps_numbers else 4)
        if not store.has_happened:
            break


def other_origin() -> Source:
    other = Source()
    other.publish([drawn(LEAF, [Run(0, LEAF, 5000)], b"")])
    return other


def test_the_same_place_is_refused() -> None:
    source = Source()
    source.publish(grown(1))
    with pytest.raises(InvalidInput, match="both have the id"):
        copy(source, source.repository)
    with pytest.raises(InvalidInput, match="both have the id"):
        plan(CopyRequest(), source.opened(), RepositoryDestination(twin(source.repository)))


def test_a_later_epoch_goes_along_and_an_earlier_one_is_refused() -> None:
    source, to = Source(), repository()
    source.publish(grown(2))
    copy(source, to)
    disk = again(source.repository).disk(DISK)
    disk.advance(disk.read(), time=BEGIN, epoch=2, owner="kvm2")
    report = copy(source, to)
    there = again(to).catalogue(DISK)
    assert (report.ok, there.epoch, there.owner) == (True, 2, "kvm2")
    # The copy was taken over: what the source gets from now on is another disk.
    disk = again(to).disk(DISK)
    disk.advance(disk.read(), time=BEGIN, epoch=3, owner="kvm3")
    source.publish(grown(1))
    for found in (
        plan(CopyRequest(), source.opened(), RepositoryDestination(again(to))),
        copy(source, to),
    ):
        assert "epoch 2 in the source, and in epoch 3 there" in str(found.disks[0].failed)
    assert len(again(to).catalogue(DISK).points) == 2
