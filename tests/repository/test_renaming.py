"""Giving a disk another name: nothing is lost at any moment, and nobody writes to the old one unknowingly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import create_model

from snapchain.destination.guest_record import record_disk
from snapchain.destination.writing import Moment
from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, Unsupported
from snapchain.model.consistency import Consistency
from snapchain.model.guest_state import GuestChange, Transition
from snapchain.model.lease import Lease as GuestLease
from snapchain.model.retention import DropPoints, Policy
from snapchain.objects.memory import MemoryStore
from snapchain.ops import guest_points_merge, guest_verify
from snapchain.ops.guest_points import guest_named
from snapchain.ops.guest_points_merge import guest_at
from snapchain.ops.guest_records import read_record
from snapchain.ops.restore.guest import GuestRestoration, GuestRestoreRequest
from snapchain.ops.ship.run import ShipRequest, run
from snapchain.repository import (
    catalogue as catalogues,
    collecting as gc,
    guest_states,
    packs,
    repository as repositories,
    sweep,
)
from snapchain.repository.catalogue import Catalogue, Point
from snapchain.repository.chain import ChainView
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.envelope import StoredModel, parse, unseal
from snapchain.repository.format import generation_name
from snapchain.repository.leases import DEAD_SECONDS
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.renaming import renaming
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from snapchain.testing.faults import crash_points
from snapchain.testing.history import identical
from tests.exhaustive import EXHAUSTIVE, some
from tests.ops.guest_points import Guest, instant, missing_disks
from tests.ops.shipping import DISK, MiB, ship
from tests.ops.stacks import Layer, build, flat
from tests.ops.test_crash import copied
from tests.ops.test_gc_races import Standing
from tests.repository.synthetic import again, repository

NEW = "www/vda"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of a few blobs; nobody waits for a lease."""
    monkeypatch.setattr(packs, "PACK_BYTES", 1000)
    monkeypatch.setattr(sweep, "LEAST_WASTE", 250)
    monkeypatch.setattr(repositories, "PATIENCE", 0.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    layers = [Layer(MiB, [f"write -P {n + 1} {n * 128}k 192k"]) for n in range(4)]
    return build(tmp_path_factory.mktemp("renaming") / "chain", layers)


@pytest.fixture(scope="module")
def shown(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    directory = tmp_path_factory.mktemp("shown")
    return [flat(path, directory / path.name).read_bytes() for path in files]


@pytest.fixture(scope="module")
def origin(files: list[Path]) -> Repository:
    """Three points, the first one held."""
    repo = repository(MemoryStore(), block_size=64 * 1024)
    for path in files[:3]:
        ship(path, repo)
    repo.hold(DISK, 1, "audit")
    return repo


@pytest.fixture
def repo(origin: Repository) -> Repository:
    return again(origin, copied(origin))


def rename(repo: Repository, old: str = DISK, new: str = NEW) -> Any:
    return renaming(repo, old, new).run()


def reads(repo: Repository, disk: str) -> dict[int, bytes]:
    """What each point of a disk shows; nothing of one that is not there."""
    try:
        catalogue = repo.catalogue(disk)
    except NotFound:
        return {}
    return {point.point: _shown(repo, catalogue, point) for point in catalogue.points}


def _shown(repo: Repository, catalogue: Catalogue, point: Point) -> bytes:
    view = ChainView(repo.chain_of(catalogue, point), repo.blobs)
    buffer = memoryview(bytearray(view.size))
    view.read_into(0, buffer)
    return bytes(buffer)


def test_all_goes_along_and_the_old_name_is_refused(repo: Repository, files: list[Path], shown: list[bytes]) -> None:
    before = repo.catalogue(DISK)
    objects = {info.name for info in repo.store.list("packs/")} | {info.name for info in repo.store.list("layers/")}
    plan = renaming(repo, DISK, NEW).plan()
    assert (plan.points, plan.layers, plan.finishes) == (3, 3, False)
    assert [each.disk for each in repo.catalogues()] == [DISK], "a plan changes nothing"
    rename(repo)
    made = repo.catalogue(NEW)
    assert (made.points, made.parents, made.next_point) == (before.points, before.parents, before.next_point)
    assert (made.epoch, made.owner, made.renamed_from) == (before.epoch, before.owner, None)
    assert [each.disk for each in repo.catalogues()] == [NEW]
    assert reads(repo, NEW) == dict(enumerate(shown[:3], 1))
    after = {info.name for info in repo.store.list("packs/")} | {info.name for info in repo.store.list("layers/")}
    assert after == objects, "nothing is copied"
    with pytest.raises(NotFound, match=f"was renamed to '{NEW}'"):
        repo.catalogue(DISK)
    with pytest.raises(Conflict, match=f"was renamed to {NEW}") as refused:
        ship(files[3], repo)
    assert refused.value.hint == f"use the new name: DEST::{NEW}"
    for work in (lambda: repo.hold(DISK, 1, "x"), lambda: RepositoryMerge(repo, DISK, Policy(last=1)).run()):
        with pytest.raises(NotFound, match="was renamed"):
            work()
    gc.run(repo)
    again_shipped = ship(files[3], repo, disk=NEW)
    assert (again_shipped.point, again_shipped.layers_sent) == (4, 1)
    assert reads(repo, NEW) == dict(enumerate(shown, 1))
    assert verify(repo, share=1.0).ok


def test_and_back(repo: Repository, files: list[Path], shown: list[bytes]) -> None:
    rename(repo)
    assert ship(files[3], repo, disk=NEW).point == 4
    ship(files[0], repo, disk="other")
    with pytest.raises(InvalidInput, match="must never mean two points"):
        rename(repo, "other", DISK)
    rename(repo, NEW, DISK)
    assert reads(repo, DISK) == dict(enumerate(shown, 1))
    assert reads(repo, NEW) == {}
    assert repo.catalogue(DISK).next_point == 5
    rename(repo)
    rename(repo, NEW, "third")
    assert reads(repo, "third") == dict(enumerate(shown, 1))
    with pytest.raises(NotFound, match="was renamed to 'third'"):
        rename(repo, NEW, "fourth")
    with pytest.raises(NotFound, match=f"was renamed to '{NEW}'"):
        rename(repo)


def test_names_that_are_taken_or_wrong(repo: Repository, files: list[Path]) -> None:
    ship(files[0], repo, disk="other")
    RepositoryMerge(repo, "other", DropPoints(frozenset({1}), newest=True)).run()
    before = repo.disk(DISK).existing()
    for new, words in (
        ("other", "the name is used here, or was"),
        (DISK, "the new name is the old one"),
        ("web1/.guest", "hold the records of guests"),
        ("a::b", "cannot name a disk"),
    ):
        with pytest.raises(InvalidInput, match=words):
            rename(repo, DISK, new)
    with pytest.raises(NotFound, match="there is no disk or guest 'gone'"):
        rename(repo, "gone")
    assert repo.disk(DISK).existing() == before


def test_an_emptied_disk_keeps_its_next_number(repo: Repository, files: list[Path]) -> None:
    repo.release(DISK, 1, "audit")
    RepositoryMerge(repo, DISK, DropPoints(frozenset({1, 2, 3}), newest=True)).run()
    rename(repo)
    assert ship(files[0], repo, disk=NEW).point == 4
    with pytest.raises(Conflict, match="was renamed"):
        ship(files[0], repo)


def test_a_crash_at_every_moment(origin: Repository, files: list[Path], shown: list[bytes]) -> None:
    expected = dict(enumerate(shown[:3], 1))
    seen = set()
    now = [1e9]
    for moment, store in crash_points(lambda: _copied(origin, now), lambda store: rename(again(origin, store))):
        left = again(origin, store)
        old, new = reads(left, DISK), reads(left, NEW)
        assert expected in (old, new), f"moment {moment}: every point is there"
        assert {**old, **new} == expected
        for disk in (DISK, NEW):
            stands = left.disk(disk).read()
            seen.add((disk, stands and (stands[0].renamed_to, stands[0].renamed_from, bool(stands[0].points))))
        assert verify(left, share=1.0).ok
        frozen = left.disk(DISK).read()
        if frozen is not None and frozen[0].renamed_to is not None:
            with pytest.raises(Conflict, match=r"(is being|was) renamed to www/vda"):
                ship(files[3], left)
        now[0] += 2 * DEAD_SECONDS  # its lease is dead
        gc.run(left)
        assert {**reads(left, DISK), **reads(left, NEW)} == expected, f"moment {moment}: a collection took nothing"
        finished = _ended(rename, left)
        assert not isinstance(finished, Exception) or f"was renamed to '{NEW}'" in str(finished)
        assert (reads(left, DISK), reads(left, NEW)) == ({}, expected)
        assert left.catalogue(NEW).renamed_from is None
        assert ship(files[3], left, disk=NEW).point == 4
    assert seen == {
        (DISK, (None, None, True)),
        (DISK, (NEW, None, True)),
        (DISK, (NEW, None, False)),
        (NEW, None),
        (NEW, (None, DISK, True)),
        (NEW, (None, None, True)),
    }


def test_an_epoch_that_is_raised_meanwhile_goes_along(origin: Repository) -> None:
    """By a failover, of a disk whose renaming was killed: its old master stays refused under the new name."""
    tried = 0
    for _, store in crash_points(lambda: copied(origin), lambda store: rename(again(origin, store))):
        left = again(origin, store)
        old = left.disk(DISK).read()
        if old is None or old[0].renamed_to is None or not old[0].points:
            continue
        tried += 1
        with pytest.raises(Conflict, match="is being renamed"):
            left.hold(DISK, 2, "x")
        with pytest.raises(Conflict, match="is being renamed"):
            RepositoryMerge(left, DISK, Policy(last=1)).run()
        left.disk(DISK).update(lambda _: {"epoch": 5, "owner": "kvm2"}, time=datetime.now(UTC), check=lambda: None)
        rename(left)
        made = left.catalogue(NEW)
        assert (made.epoch, made.owner, len(made.points)) == (5, "kvm2", 3)
    assert tried > 1, "before and after the new disk is made"


def _copied(origin: Repository, now: list[float]) -> MemoryStore:
    """On a clock of its own."""
    store = MemoryStore(clock=lambda: now[0])
    for info in origin.store.list(""):
        store.put(info.name, origin.store.get(info.name))
    return store


def moments(origin: Repository, job: Any, other: Any, *, frozen: bool) -> Iterator[tuple[Repository, Any, Any]]:
    """(the repository, what the job ended with, what the other did), for each call at which the job stands still."""
    now = [1e9]
    for moment in some(itertools.count(int(frozen) if not EXHAUSTIVE else 0), each=3):
        store = _copied(origin, now)
        ended: list[Any] = []

        def meanwhile(store: MemoryStore = store, ended: list[Any] = ended) -> None:
            if frozen:
                now[0] += 2 * DEAD_SECONDS
            ended.append(_ended(other, again(origin, store)))

        standing = Standing(store, moment, meanwhile)
        outcome = _ended(job, again(origin, standing))
        if not standing.stood:
            assert moment > 5
            return
        now[0] += 2 * DEAD_SECONDS
        yield again(origin, store), outcome, ended[0]


def _ended(job: Any, repo: Repository) -> Any:
    try:
        return job(repo)
    except (Conflict, Busy, NotFound, InvalidInput) as error:
        return error


@pytest.mark.sampled
@pytest.mark.parametrize("frozen", [False, True], ids=["asleep", "frozen"])
@pytest.mark.parametrize("first", ["rename", "ship"])
def test_a_shipment_to_the_old_name_meanwhile(
    origin: Repository, files: list[Path], shown: list[bytes], first: str, frozen: bool
) -> None:
    """It is published and goes along, or it is refused."""

    def shipped(repo: Repository) -> Any:
        return ship(files[3], repo, store=repo.store).point

    jobs = (rename, shipped) if first == "rename" else (shipped, rename)
    outcomes = set()
    for repo, *ended in moments(origin, *jobs, frozen=frozen):
        renamed, point = ended if first == "rename" else reversed(ended)
        outcomes.add((isinstance(renamed, Exception), isinstance(point, Exception)))
        expected = dict(enumerate(shown if point == 4 else shown[:3], 1))
        assert {**reads(repo, DISK), **reads(repo, NEW)} == expected
        if not isinstance(renamed, Exception):
            assert reads(repo, NEW) == expected
            assert reads(repo, DISK) == {}
        gc.run(repo)
        _ended(rename, repo)
        assert (reads(repo, DISK), reads(repo, NEW)) == ({}, expected)
        assert verify(repo, share=1.0).ok
    assert {(False, False), (False, True)} <= outcomes


@pytest.mark.sampled
@pytest.mark.parametrize("frozen", [False, True], ids=["asleep", "frozen"])
def test_a_collection_or_another_disk_meanwhile(
    origin: Repository, files: list[Path], shown: list[bytes], frozen: bool
) -> None:
    """Nothing is collected; and where somebody makes a disk of the new name, both are as if nobody had renamed."""
    expected = dict(enumerate(shown[:3], 1))
    for repo, _, _ in moments(origin, rename, gc.run, frozen=frozen):
        assert {**reads(repo, DISK), **reads(repo, NEW)} == expected
        gc.run(repo)
        _ended(rename, repo)
        assert (reads(repo, DISK), reads(repo, NEW)) == ({}, expected)
    taken = 0
    for repo, ended, point in moments(
        origin, rename, lambda repo: ship(files[0], repo, disk=NEW, store=repo.store).point, frozen=frozen
    ):
        if point == 1:
            taken += 1
            assert isinstance(ended, InvalidInput | Conflict)
            if isinstance(ended, Conflict):  # taken for dead: the next run finds the name taken
                assert isinstance(_ended(rename, repo), InvalidInput)
            assert reads(repo, DISK) == expected
            assert reads(repo, NEW) == {1: shown[0]}
            assert ship(files[3], repo).point == 4, "it can be written again"
        elif point == 4:
            assert reads(repo, NEW) == {**expected, 4: shown[0]}
    assert taken


def test_an_older_program_refuses_the_old_name(repo: Repository, files: list[Path]) -> None:
    """It knows no field of a renaming. A disk that was never renamed, or has the new name, has none."""
    fields: dict[str, Any] = {
        name: (each.annotation, each)
        for name, each in Catalogue.model_fields.items()
        if not name.startswith("renamed_")
    }
    older: Any = create_model("Older", __base__=StoredModel, **fields)
    rename(repo)
    ship(files[0], repo, disk="other")

    def read(disk: str) -> Any:
        newest = catalogues.newest_generation(repo.store, repo.keys.disk_key(disk))
        name = generation_name(repo.keys.disk_key(disk), newest or 0)
        body = unseal(repo.keys, catalogues.KIND, name, repo.store.get(name))
        return parse(older, body, what="the catalogue", subject=disk)

    assert [len(read(disk).points) for disk in (NEW, "other")] == [3, 1]
    with pytest.raises(Unsupported, match="newer snapchain"):
        read(DISK)


def test_a_disk_of_a_guest_keeps_its_name(repo: Repository, files: list[Path]) -> None:
    destination = RepositoryDestination(repo)
    moment = Moment("ab" * 16, Consistency.CRASH)
    run(ShipRequest(image=files[0], disk="db/vda", moment=moment), destination)
    with pytest.raises(Unsupported, match="belongs to a guest") as refused:
        rename(repo, "db/vda")
    assert refused.value.hint == "rename the guest: DEST::db"


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Repository, Guest]:
    """Two guest points of two disks, and a disk of another guest."""
    found = Guest(tmp_path_factory.mktemp("guest"))
    destination = RepositoryDestination(repository(MemoryStore(), block_size=64 * 1024))
    for number in (1, 2):
        found.point(destination, number)
    return destination.repository, found


def whole(repo: Repository, name: str) -> list[int]:
    """Numbers of the guest points under a name that are there with all their disks."""
    destination = RepositoryDestination(repo)
    view = guest_named(destination.disks(), name)
    found = []
    for point in view.points if view is not None else ():
        record = read_record(destination, point, disk=record_disk(name))
        assert record.guest == name
        if not missing_disks(point, record):
            found.append(point.point)
    return found


def test_a_guest_gets_another_name(guest: tuple[Repository, Guest], tmp_path: Path) -> None:
    repo = again(guest[0], copied(guest[0]))
    names = ("web1/vda", "web1/vdb", "web1/.guest")
    plan = renaming(repo, "web1", "web2").plan()
    assert (plan.disks, plan.points, plan.finishes) == (names, 2, False)
    assert whole(repo, "web1") == [1, 2]
    rename(repo, "web1", "web2")
    assert [each.disk for each in repo.catalogues()] == ["web2/.guest", "web2/vda", "web2/vdb"]
    assert (whole(repo, "web1"), whole(repo, "web2")) == ([], [1, 2])
    destination = RepositoryDestination(repo)
    view = guest_at(destination, "web2")
    GuestRestoration(destination, view, GuestRestoreRequest(directory=tmp_path / "out", point="1")).run()
    for name in ("vda", "vdb"):
        assert identical(tmp_path / "out" / f"{name}.qcow2", guest[1].shown[instant(1), name])
    assert guest_verify.verify(destination, share=1.0).ok
    guest_points_merge.run(destination, "web2", Policy(last=1))
    assert whole(repo, "web2") == [2]
    with pytest.raises(Conflict, match="was renamed to web2/vda"):
        guest[1].ship(destination, 3)
    with pytest.raises(NotFound, match="the guest 'web1' was renamed to 'web2'"):
        rename(repo, "web1", "web3")
    rename(repo, "web2", "web1")
    assert whole(repo, "web1") == [2]
    guest[1].ship(destination, 3)
    assert whole(repo, "web1") == [2, 3]


def test_a_guest_whose_state_is_recorded_keeps_its_name(guest: tuple[Repository, Guest]) -> None:
    repo = again(guest[0], copied(guest[0]))
    lease = GuestLease(token="1" * 32, seconds=30, host="kvm1", epoch=1, witness="s3://bucket")
    asked = GuestChange(
        guest="web1", transition=Transition.LEASE, seen=0, token="1" * 32, by="kvm1", host="kvm1", lease=lease
    )
    guest_states.change(repo, asked)
    for old, new in (("web1", "web2"), ("web1/vda", "web2/vda")):
        with pytest.raises(Unsupported, match=r"record of who may run it|belongs to a guest"):
            rename(repo, old, new)
    assert whole(repo, "web1") == [1, 2]


def test_a_crash_while_a_guest_is_renamed(guest: tuple[Repository, Guest]) -> None:
    """Under the new name no guest point is torn; the next run finishes, and nothing is lost."""
    origin = guest[0]
    contents = {
        (each.disk.rpartition("/")[2], point.point, point.content_id)
        for each in origin.catalogues()
        for point in each.points
    }
    now = [1e9]
    moments = 0
    for moment, store in crash_points(
        lambda: _copied(origin, now), lambda store: rename(again(origin, store), "web1", "web2")
    ):
        moments = moment + 1
        left = again(origin, store)
        assert whole(left, "web2") in ([], [1, 2])
        view = guest_named(RepositoryDestination(left).disks(), "web2")
        assert view is None or not view.points or whole(left, "web2") == [1, 2], "a torn guest point is shown"
        now[0] += 2 * DEAD_SECONDS
        gc.run(left)
        ended = _ended(lambda repo: rename(repo, "web1", "web2"), left)
        assert not isinstance(ended, Exception) or "was renamed to 'web2'" in str(ended)
        assert [each.disk for each in left.catalogues()] == ["web2/.guest", "web2/vda", "web2/vdb"]
        assert all(each.renamed_from is None for each in left.catalogues())
        assert whole(left, "web2") == [1, 2]
        assert contents == {
            (each.disk.rpartition("/")[2], point.point, point.content_id)
            for each in left.catalogues()
            for point in each.points
        }
        assert verify(left, share=1.0).ok
    assert moments > 20, "four steps of three disks: before and after each"
