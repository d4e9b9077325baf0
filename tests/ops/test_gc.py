"""gc: nothing that a point needs goes, everything else does, and a crash at any moment changes neither."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from snapchain.errors import Busy, Conflict, Corrupt
from snapchain.model.retention import Policy
from snapchain.objects.exclusive import CLAIM_LIFE
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data, Refused, StoreWrapper
from snapchain.repository import collecting as gc, packs, sweep
from snapchain.repository.catalogue import is_generation
from snapchain.repository.eras import newest
from snapchain.repository.format import pack_name
from snapchain.repository.leases import Lease, Mode
from snapchain.repository.mark import KEPT_GENERATIONS, mark, wasteful
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from snapchain.testing.faults import crash_points
from tests.ops.shipping import DISK, MiB, ship
from tests.ops.stacks import Layer, build, flat
from tests.ops.test_crash import copied, reads, sound
from tests.repository.synthetic import again, repository


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four files that overwrite half of each other."""
    layers = [
        Layer(2 * MiB, [f"write -P {9 * n + at + 1} {(2 * n + at) * 64}k 64k" for at in range(4)]) for n in range(4)
    ]
    return build(tmp_path_factory.mktemp("gc") / "chain", layers)


@pytest.fixture(scope="module")
def shown(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    directory = tmp_path_factory.mktemp("shown")
    return [flat(path, directory / path.name).read_bytes() for path in files]


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of a few blobs, so that some are wasted in part."""
    monkeypatch.setattr(packs, "PACK_BYTES", 1000)
    monkeypatch.setattr(sweep, "LEAST_WASTE", 250)


def full(files: list[Path]) -> Repository:
    repo = repository(MemoryStore(), block_size=64 * 1024)
    for path in files:
        ship(path, repo)
    return repo


def keep(repo: Repository, last: int) -> Repository:
    RepositoryMerge(repo, DISK, Policy(last=last)).run()
    return again(repo)


def stored(repo: Repository) -> int:
    return sum(info.size for info in repo.store.list(""))


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_kept_points_stay_and_the_space_of_the_others_comes_back(
    files: list[Path], shown: list[bytes], last: int
) -> None:
    repo = keep(full(files), last)
    before = stored(repo)
    report = gc.run(repo)
    assert before - stored(repo) == report.bytes_freed
    sound(again(repo), {point: shown[point - 1] for point in range(5 - last, 5)})
    if last < 4:
        assert report.bytes_freed > 0


def test_a_dry_run_deletes_nothing(files: list[Path]) -> None:
    repo = keep(full(files), 1)
    before = {info.name for info in repo.store.list("")}
    plan = gc.plan(repo)
    assert plan.objects_deleted > 0
    assert {info.name for info in repo.store.list("")} == before


def test_a_second_run_finds_nothing(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "LEAST_WASTE", 64 * 1024)
    repo = keep(full(files), 2)
    gc.run(repo)
    names = {info.name for info in repo.store.list("")}
    report = gc.run(again(repo))
    assert (report.packs_deleted, report.bytes_moved) == (0, 0)
    assert len(names) == len(list(repo.store.list("")))


def test_what_crashed_shipments_left_goes(files: list[Path], shown: list[bytes]) -> None:
    repo = full(files)
    gc.run(repo)
    repo.store.put("packs/aa/" + "a" * 32, b"half a pack")
    repo.store.put("layers/" + "b" * 32, b"half a layer")
    gc.run(again(repo))
    assert "packs/aa/" + "a" * 32 not in {info.name for info in repo.store.list("packs/")}
    assert "layers/" + "b" * 32 not in {info.name for info in repo.store.list("layers/")}
    sound(again(repo), dict(enumerate(shown, 1)))


def test_a_blob_that_another_disk_uses_stays(files: list[Path], shown: list[bytes]) -> None:
    repo = full(files)
    from tests.ops.shipping import shipment

    with shipment(files[0], repo, "other") as work:
        work.run()
    repo = keep(again(repo), 1)
    gc.run(repo)
    sound(again(repo), {4: shown[3]})


def test_nothing_is_collected_where_a_catalogue_is_damaged(files: list[Path]) -> None:
    repo = keep(full(files), 2)
    needed = max(info.name for info in repo.store.list("disks/"))
    repo.store.put(needed, b"rot" + repo.store.get(needed)[3:])
    before = {info.name for info in repo.store.list("")}
    with pytest.raises(Corrupt, match="snapchain object") as error:
        gc.run(again(repo))
    assert error.value.subject == needed
    assert {info.name for info in repo.store.list("")} == before


def test_no_pack_goes_where_nobody_knows_what_a_layer_needs(files: list[Path], shown: list[bytes]) -> None:
    """The record of a layer is lost: what is known to be waste of records goes, and no pack."""
    repo = keep(full(files), 2)
    top = f"layers/{repo.catalogue(DISK).points[-1].layer}"
    body = repo.store.get(top)
    repo.store.delete(top)
    before = {info.name for info in repo.store.list("packs/")}
    report = gc.run(again(repo))
    assert [(each.subject, each.points) for each in report.findings] == [(top, (4,))]
    assert report.objects_deleted > 0
    assert {info.name for info in repo.store.list("packs/")} == before
    assert reads(again(repo), 3) == shown[2]
    repo.store.put(top, body)
    assert gc.run(again(repo)).findings == ()
    sound(again(repo), {3: shown[2], 4: shown[3]})
    assert len(list(repo.store.list("packs/"))) < len(before)


def test_all_packs_are_lost(files: list[Path]) -> None:
    repo = keep(full(files), 2)
    for info in list(repo.store.list("packs/")):
        repo.store.delete(info.name)
    report = gc.run(again(repo))
    assert {point for each in report.findings for point in each.points} == {3, 4}
    assert {each.kind for each in report.findings} == {"corrupt"}
    ship(files[-1], repo)
    assert verify(again(repo), share=1.0).findings == ()


def test_a_crash_at_every_moment(files: list[Path], shown: list[bytes]) -> None:
    before = keep(full(files), 2)
    expected = {3: shown[2], 4: shown[3]}
    clean = again(before, copied(before))
    gc.run(clean)
    moments = 0
    for moment, store in crash_points(lambda: copied(before), lambda store: gc.run(again(before, store))):
        moments = moment + 1
        for info in list(store.list("leases/")):  # half an hour passes
            store.delete(info.name)
        left = again(before, store)
        sound(left, expected)
        gc.run(again(before, store))
        done = again(before, store)
        sound(done, expected)
        assert len(list(store.list("packs/"))) == len(list(clean.store.list("packs/")))
    assert moments > 10


def test_history_is_kept_for_a_while(files: list[Path]) -> None:
    repo = full(files)
    for _ in range(KEPT_GENERATIONS):
        repo.hold(DISK, 1, "x")
        repo.release(DISK, 1, "x")
    gc.run(again(repo))
    left = [int(info.name[-20:]) for info in repo.store.list("disks/") if is_generation(info.name)]
    assert len(left) == KEPT_GENERATIONS
    assert left == list(range(left[0], left[0] + len(left)))
    assert left[-1] == repo.catalogue(DISK).generation
    assert verify(again(repo), share=1.0).ok


def test_claims_of_dead_writers_go_and_those_of_living_ones_stay(files: list[Path]) -> None:
    now = [1e9]
    repo = full(files[:2])
    store = MemoryStore(clock=lambda: now[0])
    for info in repo.store.list(""):
        store.put(info.name, repo.store.get(info.name))
    folder = next(iter(store.list("disks/"))).name
    dead, living = f"{folder}.claim.{'0' * 16}", f"{folder}.claim.{'1' * 16}"
    for name in (dead, f"config.claim.{'0' * 16}"):
        store.put(name, b"")
    now[0] += CLAIM_LIFE + 1
    store.put(living, b"")
    gc.run(again(repo, store))
    assert [info.name for info in store.list("") if ".claim." in info.name] == [living]
    assert verify(again(repo, store)).ok


def test_an_index_that_names_a_lost_pack_is_cured(files: list[Path], shown: list[bytes]) -> None:
    """A pack that no point needs is lost: what an index says of it would be believed by the next shipment."""
    repo = keep(full(files), 1)
    used = {name for usage in mark(repo).usage if len(usage.offsets) for name in [pack_name(usage.pack)]}
    lost = next(info.name for info in repo.store.list("packs/") if info.name not in used)
    repo.store.delete(lost)
    assert not verify(again(repo)).ok
    gc.run(again(repo))
    sound(again(repo), {4: shown[3]})
    for path in files:
        ship(path, repo, disk="again")
    assert verify(again(repo), share=1.0).ok


def test_an_index_that_is_damaged_is_made_anew_from_the_packs(files: list[Path], shown: list[bytes]) -> None:
    repo = keep(full(files), 2)
    for info in list(repo.store.list("index/")):
        repo.store.put(info.name, repo.store.get(info.name)[:-3] + b"rot")
    assert not verify(again(repo)).ok
    assert ship(files[-1], again(repo), disk="other").point == 1, "all of it is stored again"
    assert gc.run(again(repo)).findings == ()
    sound(again(repo), {3: shown[2], 4: shown[3]})
    assert ship(files[-1], repo, disk="again").bytes_stored < 1000, "what is there is known to be there"


def test_many_indexes_become_one(files: list[Path], shown: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    repo = full(files)
    gc.run(again(repo))
    many = newest(repo.store)
    assert len(many[1]) > 1
    monkeypatch.setattr(sweep, "MOST_INDEXES", 1)
    gc.run(again(repo))
    assert newest(repo.store)[0] == many[0] + 1
    assert len(list(repo.store.list("index/"))) == 3  # one, and those that begin and end the era
    for path in files:
        assert ship(path, repo, disk="again").bytes_stored < 4000, "what is there is known to be there"
    assert verify(again(repo), share=1.0).ok


def test_rot_in_a_pack_that_would_be_moved_is_not_passed_on(files: list[Path], shown: list[bytes]) -> None:
    repo = keep(full(files), 2)
    (usage, *_) = wasteful(mark(repo).usage, sweep.WASTE, least=sweep.LEAST_WASTE)
    name, at = pack_name(usage.pack), int(usage.offsets[0]) + 5
    body = repo.store.get(name)
    repo.store.put(name, body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])
    lost = [each.subject for each in gc.run(again(repo)).findings]
    assert lost == [f"{name} at {at - 5}"]
    assert repo.store.get(name) != body, "it may be wanted by somebody who can read more of it"
    with pytest.raises(Corrupt, match="altered"):
        reads(again(repo), 4)
    repo.store.put(name, body)
    assert gc.run(again(repo)).findings == ()
    sound(again(repo), {3: shown[2], 4: shown[3]})


def test_a_store_that_takes_no_lease_of_a_reader_is_read_all_the_same(files: list[Path], shown: list[bytes]) -> None:
    class ReadOnly(StoreWrapper):
        def put(self, name: str, data: Data) -> None:  # noqa: ARG002
            raise Refused("this store is read only", subject=name)

        def delete(self, name: str) -> None:
            raise Refused("this store is read only", subject=name)

    repo = full(files)
    watched = again(repo, ReadOnly(repo.store))
    said: list[str] = []
    point = watched.catalogue(DISK).points[0]
    with watched.reading({DISK: [point.layer]}, "a test", on_wait=said.append):
        assert reads(watched, 1) == shown[0]
    assert "without a lease" in said[0]


def lease(repo: Repository, mode: Mode, *, patience: float = 0) -> Lease:
    return repo.lease(mode, "a test", patience=patience, on_wait=print)


def test_writers_and_a_collector_work_side_by_side_and_collectors_by_turns(files: list[Path]) -> None:
    repo = full(files[:1])
    with (
        lease(repo, Mode.WRITE),
        lease(repo, Mode.COLLECT) as collects,
        lease(repo, Mode.WRITE),
        lease(repo, Mode.READ),
    ):
        collects.survey()
        assert sorted(str(holder)[:9] for holder in collects.writers.values()) == ["a test on"] * 2
        with pytest.raises(Busy, match=r"a test on .* is at work"), lease(repo, Mode.COLLECT):
            pass
    assert list(repo.store.list("leases/")) == []


def test_a_collector_waits_for_a_writer_that_knows_collectors_as_working_alone(files: list[Path]) -> None:
    repo = full(files[:1])
    theirs = f"leases/w-{'0' * 32}"
    repo.store.put(theirs, b"sealed by whomever")
    with pytest.raises(Busy, match="another snapchain is at work"), lease(repo, Mode.COLLECT):
        pass
    assert [info.name for info in repo.store.list("leases/")] == [theirs]


@pytest.mark.parametrize("mode", [Mode.WRITE, Mode.READ])
def test_a_collector_without_room_for_its_lease_works_alone(files: list[Path], mode: Mode) -> None:
    """Its lease is empty, so that nobody can tell what it is."""
    repo = full(files[:1])
    with lease(repo, Mode.COLLECT) as collects:
        collects.shut_out_writers(0)
        with pytest.raises(Busy, match="another snapchain is at work"), lease(repo, mode):
            pass
    with (
        lease(repo, Mode.COLLECT) as collects,
        lease(repo, Mode.WRITE),
        pytest.raises(Busy, match=r"a test on .* is at work"),
    ):
        collects.shut_out_writers(0)


def test_a_writer_whose_lease_was_taken_for_dead_must_not_publish(files: list[Path]) -> None:
    repo = full(files[:1])
    with lease(repo, Mode.WRITE) as mine:
        mine.check()
        for info in list(repo.store.list("leases/")):
            repo.store.delete(info.name)
        with pytest.raises(Conflict, match="stood still"):
            mine.check()


def test_a_killed_process_of_this_machine_holds_up_nobody(tmp_path: Path) -> None:
    place = tmp_path / "repo"
    program = (
        "import os, sys; from snapchain.repository.opening import create_repository as make;"
        "from snapchain.repository.leases import Mode;"
        "repo = make(sys.argv[1], passphrase=lambda: None, encryption='none');"
        "repo.lease(Mode.COLLECT, 'gc', on_wait=print).__enter__(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(place)], check=False, env=dict(os.environ))
    assert list((place / "leases").iterdir())
    from snapchain.repository.opening import open_repository

    repo = open_repository(str(place), passphrase=lambda: None, writing=True)
    with lease(repo, Mode.WRITE):
        pass
    gc.run(repo)


def test_a_layer_that_another_hides_wholly_leaves_no_trace_that_verify_misses(tmp_path: Path) -> None:
    chain = build(tmp_path / "chain", [Layer(MiB, ["write -P 1 0 256k"]), Layer(MiB, ["write -P 2 0 256k"])])
    repo = repository(MemoryStore(), block_size=64 * 1024)
    for path in chain:
        ship(path, repo)
    repo = keep(repo, 1)
    gc.run(repo)
    sound(again(repo), {2: flat(chain[-1], tmp_path / "flat").read_bytes()})


def test_a_plan_counts_what_the_run_then_deletes(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without packs to be moved, which make new records: to the object; and in bytes but for the new index."""
    monkeypatch.setattr(sweep, "LEAST_WASTE", 1 << 20)
    repo = keep(full(files), 1)
    plan = gc.plan(again(repo))
    done = gc.run(again(repo))
    assert plan.packs_moved == 0
    assert plan.packs_deleted == done.packs_deleted > 0
    assert plan.objects_deleted == done.objects_deleted
    assert abs(plan.bytes_freed - done.bytes_freed) <= 0.1 * done.bytes_freed + 1000


def test_gc_every_night_comes_to_rest_and_frees_no_negative_sum(files: list[Path]) -> None:
    """Its own new generations are not deleted by its next run, which would make new ones."""
    repo = repository(MemoryStore(), block_size=64 * 1024)
    for number in range(40):
        ship(files[number % 4], repo, each_layer=False)
    reports = [gc.run(again(repo)) for _ in range(5)]
    assert all(report.bytes_freed >= 0 and report.bytes_added >= 0 for report in reports)
    assert [report.objects_deleted for report in reports[2:]] == [0, 0, 0]
    assert gc.plan(again(repo)).objects_deleted == 0
    names = {info.name for info in repo.store.list("disks/")}
    gc.run(again(repo))
    assert {info.name for info in repo.store.list("disks/")} == names
