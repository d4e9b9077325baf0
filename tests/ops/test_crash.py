"""A crash at every moment: what was published before stays whole, and running again gives what one run had given.

Over a store in memory, every put, create and delete has a moment before and one after its effect; the process dies at
each of them in turn, and, by itself, a reply is lost at each of them in turn.  Then the same by kill -9 of a real
process at every system call that changes a file.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from snapchain.errors import SnapchainError, Unavailable
from snapchain.model.retention import Policy
from snapchain.objects.memory import MemoryStore
from snapchain.repository import packs
from snapchain.repository.chain import ChainView
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from snapchain.testing.faults import Fault, FaultStore, On, crash_points
from tests.exhaustive import EXHAUSTIVE
from tests.ops.shipping import DISK, MiB, ship, shipment
from tests.ops.stacks import Layer, build, flat
from tests.repository.synthetic import again, repository

Job = Callable[[Repository], object]


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several packs, so that there are moments between them."""
    monkeypatch.setattr(packs, "PACK_BYTES", 1000)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four files with different data in each."""
    directory = tmp_path_factory.mktemp("crash")
    layers = [
        Layer(2 * MiB, [f"write -P {9 * n + at + 1} {(3 * n + at) * 64}k 64k" for at in range(4)]) for n in range(4)
    ]
    files = build(directory / "chain", layers)
    time.sleep(0.02)
    return files


@pytest.fixture(scope="module")
def shown(chain: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    directory = tmp_path_factory.mktemp("shown")
    return [flat(path, directory / path.name).read_bytes() for path in chain]


def copied(repo: Repository) -> MemoryStore:
    store = MemoryStore()
    for info in repo.store.list(""):
        store.put(info.name, repo.store.get(info.name))
    return store


def reads(repo: Repository, point: int, disk: str = DISK) -> bytes:
    catalogue = repo.catalogue(disk)
    (wanted,) = (each for each in catalogue.points if each.point == point)
    view = ChainView(repo.chain(catalogue, wanted.layer), repo.blobs)
    buffer = memoryview(bytearray(view.size))
    view.read_into(0, buffer)
    return bytes(buffer)


def sound(repo: Repository, expected: dict[int, bytes], *, whole: bool = True) -> None:
    """Every expected point reads what it should, and verify agrees."""
    for point, content in expected.items():
        assert reads(repo, point) == content
    report = verify(repo, share=1.0)
    assert report.findings == ()
    if whole:
        assert list(repo.store.list("leases/")) == []


def facts(repo: Repository) -> list[tuple[object, ...]]:
    """What a user can tell of a disk: its points, and how their chains lie on each other."""
    catalogue = repo.catalogue(DISK)
    return [
        (point.labels, point.size, point.content_id, len(catalogue.chain(point.layer))) for point in catalogue.points
    ]


def shipping(path: Path) -> Job:
    def job(repo: Repository) -> None:
        with shipment(path, repo, DISK, labels=["job"], each_layer=True) as work:
            work.run()

    return job


def merging(repo: Repository) -> object:
    return RepositoryMerge(repo, DISK, Policy(last=1)).run()


def prepared(chain: list[Path], points: int) -> Repository:
    repo = repository(MemoryStore(), block_size=64 * 1024)
    for path in chain[:points]:
        ship(path, repo)
    return repo


# ---- in memory, at every store call


@pytest.mark.parametrize("work", ["first ship", "later ship", "merge"])
def test_a_crash_at_every_moment(chain: list[Path], shown: list[bytes], work: str) -> None:
    points = {"first ship": 0, "later ship": 2, "merge": 4}[work]
    job = merging if work == "merge" else shipping(chain[points + 1])
    before = prepared(chain, points)
    clean = again(before, copied(before))
    job(clean)
    expected = dict(zip(range(1, points + 1), shown, strict=False))
    moments = 0
    for moment, store in crash_points(lambda: copied(before), lambda store: job(again(before, store))):
        moments = moment + 1
        left = again(before, store)
        current = left.disk(DISK).read()
        there = {point.point for point in current[0].points} if current else set[int]()
        if work == "merge" and there == {4}:
            expected = {4: shown[3]}
        sound(left, expected, whole=False)
        for point in there - expected.keys():
            assert reads(left, point) in shown
        resumed = again(before, store)
        if not (work == "merge" and there == {4}):
            job(resumed)
        done = facts(resumed)
        if work == "merge":
            assert done == facts(clean)
        else:
            # A run that died between two points published the first; the second run adds what is missing.
            assert _without_repeats(done) == _without_repeats(facts(clean))
        last = resumed.catalogue(DISK).points[-1].point
        sound(again(before, store), {last: shown[3 if work == "merge" else points + 1]}, whole=False)
        expected = dict(zip(range(1, points + 1), shown, strict=False))
    assert moments >= 12, "lease, packs, index, layers, catalogue: before and after each"


def _without_repeats(rows: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    return list(dict.fromkeys(rows))


@pytest.mark.parametrize("work", ["ship", "merge"])
@pytest.mark.parametrize("fault", [Fault.LOST_REPLY, Fault.UNAVAILABLE])
def test_a_reply_lost_at_every_call(chain: list[Path], shown: list[bytes], work: str, fault: Fault) -> None:
    """The caller is told that a call failed; it had its effect, or none. The run fails or succeeds; nothing is lost."""
    points = 2 if work == "ship" else 4
    job = merging if work == "merge" else shipping(chain[points])
    before = prepared(chain, points)
    failed = succeeded = 0
    for nth in count(1):
        inner = copied(before)
        store = FaultStore(inner, [On(nth, fault)])
        try:
            job(again(before, store))
        except SnapchainError as error:
            failed += 1
            assert isinstance(error, Unavailable), error  # noqa: PT017
        else:
            succeeded += 1
        left = again(before, inner)
        there = {point.point for point in left.catalogue(DISK).points}
        merged = work == "merge" and there == {4}
        sound(left, {4: shown[3]} if merged else dict(zip(range(1, points + 1), shown, strict=False)), whole=False)
        if not merged:
            job(again(before, inner))
        last = left.catalogue(DISK).points[-1].point
        sound(again(before, inner), {last: shown[3 if work == "merge" else points]}, whole=False)
        if len(store.calls) < nth:
            break
    assert failed > 5
    assert succeeded >= 1


def test_leftovers_of_crashes_do_not_grow_without_end(chain: list[Path]) -> None:
    """Data that was durable before a crash, and listed, is not sent again by the next run."""
    before = prepared(chain, 0)
    sizes = []
    for _, store in crash_points(lambda: copied(before), lambda store: shipping(chain[1])(again(before, store))):
        shipping(chain[1])(again(before, store))
        sizes.append(sum(info.size for info in store.list("packs/")))
    once = again(before, copied(before))
    shipping(chain[1])(once)
    whole = sum(info.size for info in once.store.list("packs/"))
    assert max(sizes) < 2.5 * whole


@pytest.mark.sampled
@pytest.mark.parametrize("job", ["ship", "merge", "restore", "chain"])
def test_kill_nine_at_every_system_call(tmp_path: Path, job: str) -> None:
    argv = [sys.executable, "-m", "tests.ops.kill_nine", job, str(tmp_path)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-2]) >= (8 if EXHAUSTIVE else 4)
