"""merge DEST::DISK: kept points restore as before, dropped ones are gone, and no guest data moves."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from snapchain.errors import Conflict, NotFound
from snapchain.model.retention import Duration, Policy
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data, ObjectStore, StoreWrapper
from snapchain.ops.log import log
from snapchain.repository import collecting as gc
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.layers import leaves_shown
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from tests.bench.days import record
from tests.ops.shipping import DISK, MiB, Stack, random_stack, restore, same_bytes, ship
from tests.ops.stacks import Layer, build, clean, flat, qemu_img, same, write
from tests.repository.counting import CountingStore
from tests.repository.synthetic import again, repository


def shipped(tmp_path: Path, seed: int, *, layers: int = 6) -> tuple[Repository, Stack]:
    """Every layer a point; the even ones labelled."""
    repo = repository(MemoryStore(), block_size=256 * 1024)
    numbers = iter(range(1, 99))

    def grown(path: Path) -> None:
        number = next(numbers)
        ship(path, repo, labels=["even"] if number % 2 == 0 else [f"odd{number}"])

    return repo, random_stack(tmp_path / "stack", seed, layers=layers, grown=grown)


@pytest.mark.parametrize("seed", range(80, 88))
def test_kept_points_restore_and_keep_their_content_ids(tmp_path: Path, seed: int) -> None:
    repo, stack = shipped(tmp_path, seed)
    before = {point.point: point.content_id for point in repo.catalogue(DISK).points}
    draw = random.Random(seed)
    while len(repo.catalogue(DISK).points) > 1:
        policy = draw.choice(
            [Policy(last=draw.randrange(1, 5)), Policy(labels=frozenset({draw.choice(["even", "odd3"])}))]
        )
        store = CountingStore(repo.store)
        report = RepositoryMerge(again(repo, store), DISK, policy).run()
        assert (report.bytes_moved, report.bytes_freed) == (0, 0)
        points = repo.catalogue(DISK).points
        assert tuple(point.point for point in points) == report.points_kept
        for point in points:
            assert point.content_id == before[point.point]
            out = tmp_path / f"{point.point}.{draw.choice(['raw', 'qcow2'])}"
            out.unlink(missing_ok=True)
            restore(repo, out, point.point)
            shown = stack.shown[point.point - 1]
            assert same_bytes(out, shown) if out.suffix == ".raw" else same(out, shown)
        assert len(repo.catalogue(DISK).parents) == report.layers_after
        assert verify(again(repo), share=1.0).ok
        if draw.random() < 0.5:
            gc.run(again(repo))
            assert verify(again(repo), share=1.0).ok
        if len(points) == len(report.points_kept) and len(points) <= 2:
            break
    final = RepositoryMerge(again(repo), DISK, Policy(last=1)).run()
    assert final.layers_after == 1
    gc.run(again(repo))
    collected = sum(info.size for info in repo.store.list("packs/"))
    ship(stack.files[-1], repo, disk="again", each_layer=True)
    for number, shown in enumerate(stack.shown, start=1):
        (tmp_path / "again.raw").unlink(missing_ok=True)
        restore(repo, tmp_path / "again.raw", number, disk="again")
        assert same_bytes(tmp_path / "again.raw", shown)
    assert collected > 0 or not any(stack.shown[-1].read_bytes())
    (tmp_path / "chain").mkdir()
    chain = restore(repo, tmp_path / "chain" / "top.qcow2", chain=True)
    assert len(chain.files) == 1
    assert same(tmp_path / "chain" / "top.qcow2", stack.shown[-1], image_format=_format(Path(chain.files[-1])))


def _format(path: Path) -> str:
    return "qcow2" if path.read_bytes()[:4] == b"QFI\xfb" else "raw"


def test_no_data_pack_is_read_or_written(tmp_path: Path) -> None:
    repo = repository(MemoryStore())
    files = build(
        tmp_path / "c",
        [Layer(16 * MiB, ["write -P 1 0 8M"])] + [Layer(16 * MiB, [f"write -P {n} {n}M 2M"]) for n in range(2, 7)],
    )
    for path in files:
        ship(path, repo)
    data = {
        f"packs/{pack[:2]}/{pack}"
        for layer in repo.catalogue(DISK).parents
        for page in repo.layer(layer).pages(0, 16 * MiB)
        for pack in page.packs
    }
    store = CountingStore(repo.store)
    report = RepositoryMerge(again(repo, store), DISK, Policy(last=2)).run()
    assert report.layers_after == 2
    assert not data & {each.name for each in store.asked}
    assert store.bytes_of("put") + store.bytes_of("create") < 30_000
    assert store.of("list", "packs/") == []
    kept = {
        pack
        for layer in repo.catalogue(DISK).parents
        for page in repo.layer(layer).pages(0, 16 * MiB)
        for pack in page.packs
    }
    assert {f"packs/{pack[:2]}/{pack}" for pack in kept} <= data


def test_a_plan_writes_nothing_and_says_why(tmp_path: Path) -> None:
    repo, _ = shipped(tmp_path, 90, layers=3)
    store = CountingStore(repo.store)
    plan = RepositoryMerge(again(repo, store), DISK, Policy(last=1)).plan()
    assert store.of("put") == store.of("create") == store.of("delete") == []
    assert [decision.kept for decision in plan.points] == [False, False, True]
    assert all(decision.reasons for decision in plan.points if decision.kept)
    assert (plan.layers_before, plan.layers_after) == (len(repo.catalogue(DISK).parents), 1)


def test_nothing_to_do_changes_nothing(tmp_path: Path) -> None:
    repo, _ = shipped(tmp_path, 91, layers=2)
    before = repo.disk(DISK).existing()
    report = RepositoryMerge(again(repo), DISK, Policy(last=99)).run()
    assert report.strategy == "none"
    assert repo.disk(DISK).existing() == before


def test_branches_stay_apart(tmp_path: Path) -> None:
    """Two points that went separate ways on one root: the root stays, shared."""
    repo = repository(MemoryStore())
    files = build(tmp_path / "c", [Layer(4 * MiB, ["write -P 1 0 1M"]), Layer(4 * MiB, ["write -P 2 0 64k"])])
    other = files[0].with_name("other.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", files[0].name, "-F", "qcow2", other)
    write(other, "write -P 3 0 64k")
    for path in (files[1], other):
        ship(path, repo)
    report = RepositoryMerge(again(repo), DISK, Policy(last=2)).run()
    assert (report.layers_before, report.layers_after) == (3, 3)
    report = RepositoryMerge(again(repo), DISK, Policy(last=1)).run()
    assert report.layers_after == 1
    restore(repo, tmp_path / "out.qcow2")
    assert same(tmp_path / "out.qcow2", flat(other, tmp_path / "flat"))
    assert clean(tmp_path / "out.qcow2")


def test_what_is_shipped_after_the_plan_was_made_stays(tmp_path: Path) -> None:
    repo, stack = shipped(tmp_path, 92, layers=3)
    work = RepositoryMerge(again(repo), DISK, Policy(last=1))
    ship(stack.files[-1], repo)
    report = work.run()
    assert report.points_kept == (3, 4)
    assert report.points_dropped == (1, 2)
    assert [point.point for point in repo.catalogue(DISK).points] == [3, 4]
    assert verify(again(repo), share=1.0).ok
    assert list(repo.store.list("leases/")) == []


class Meanwhile(StoreWrapper):
    """Something happens right before each catalogue generation is created."""

    def __init__(self, inner: ObjectStore, happens: Callable[[], object]) -> None:
        super().__init__(inner)
        self._happens = happens

    def create(self, name: str, data: Data) -> bool:
        if name.startswith("disks/"):
            self._happens()
        return super().create(name, data)


def test_what_is_shipped_while_a_merge_runs_stays_and_nothing_is_merged_twice(tmp_path: Path) -> None:
    repo, stack = shipped(tmp_path, 94, layers=4)
    left = iter(range(2))
    store = CountingStore(Meanwhile(repo.store, lambda: next(left, None) is not None and ship(stack.files[-1], repo)))
    before = {point.point: point.content_id for point in repo.catalogue(DISK).points}
    report = RepositoryMerge(again(repo, store), DISK, Policy(last=1)).run()
    assert report.points_kept == (4, 5, 6)
    assert repo.catalogue(DISK).points[0].content_id == before[4]
    assert len(store.of("put", "layers/")) <= 2  # what is below point 4, and perhaps what point 5 added
    assert verify(again(repo), share=1.0).ok


def test_a_merge_that_is_overtaken_for_ever_is_a_conflict_and_loses_nothing(tmp_path: Path) -> None:
    repo, stack = shipped(tmp_path, 95, layers=2)
    store = Meanwhile(repo.store, lambda: ship(stack.files[-1], repo))
    with pytest.raises(Conflict, match="changed this disk at the same time"):
        RepositoryMerge(again(repo, store), DISK, Policy(last=1)).run()
    assert {1, 2} <= {point.point for point in repo.catalogue(DISK).points}
    assert verify(again(repo), share=1.0).ok
    assert list(repo.store.list("leases/")) == []


def test_a_terabyte_of_days_is_merged_by_records_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest data that its records name do not even exist; `make bench` does this at full size."""
    repo = repository(MemoryStore(), block_size=256 * 1024)
    record(repo, DISK, 1 << 40, 40, used=4 << 30, writes=200)
    pages = {info.name for info in repo.store.list("packs/")}
    before = repo.catalogue(DISK)
    shown = {point.point: leaves_shown(repo.chain(before, point.layer), 0, 1 << 40) for point in before.points[9::10]}
    store = CountingStore(repo.store)
    report = RepositoryMerge(again(repo, store), DISK, Policy(weekly=4)).run()
    assert (report.layers_before, report.layers_after, report.bytes_moved) == (40, 4, 0)
    assert {each.name for each in store.of("get", "packs/")} <= pages
    after = again(repo).catalogue(DISK)
    contents = {point.point: point.content_id for point in before.points}
    assert {point.point: point.content_id for point in after.points} == {
        point: contents[point] for point in report.points_kept
    }
    for point in after.points:
        if point.point in shown:
            found = leaves_shown(again(repo).chain(after, point.layer), 0, 1 << 40)
            assert np.array_equal(found[0], shown[point.point][0])
            assert np.array_equal(found[1], shown[point.point][1])


def test_time_rules_use_the_points_times(tmp_path: Path) -> None:
    repo, _ = shipped(tmp_path, 93, layers=3)
    disk = repo.disk(DISK)
    current = disk.existing()
    day = datetime(2026, 1, 10, 12, tzinfo=UTC)
    times = [day, day + timedelta(hours=1), day + timedelta(days=1)]
    points = tuple(
        point.model_copy(update={"time": time}) for point, time in zip(current[0].points, times, strict=True)
    )
    disk.advance(current, time=day, points=points)
    report = RepositoryMerge(again(repo), DISK, Policy(daily=7), now=day + timedelta(days=2)).run()
    assert report.points_kept == (2, 3)


def test_a_point_of_the_future_is_told_and_counts_for_no_rule(tmp_path: Path) -> None:
    """By the clock of the run, without anybody saying so; in the plan, the report and the log."""
    repo, _ = shipped(tmp_path, 94, layers=4)
    disk = repo.disk(DISK)
    current = disk.existing()
    now = datetime.now(UTC)
    ages = [timedelta(days=60), timedelta(days=2), timedelta(days=-3300), timedelta(hours=1)]
    points = tuple(
        point.model_copy(update={"time": now - age}) for point, age in zip(current[0].points, ages, strict=True)
    )
    disk.advance(current, time=now, points=points)
    assert [point.of_the_future for point in log(RepositoryDestination(again(repo)), DISK).disks[0].points] == [
        False,
        False,
        True,
        False,
    ]
    work = RepositoryMerge(again(repo), DISK, Policy(within=Duration(days=30)))
    assert [(each.kept, each.of_the_future) for each in work.plan().points] == [
        (False, False),
        (True, False),
        (True, True),
        (True, False),
    ]
    report = work.run()
    assert (report.points_kept, report.points_dropped, report.points_of_the_future) == ((2, 3, 4), (1,), (3,))
    report = RepositoryMerge(again(repo), DISK, Policy(last=2)).run()
    assert report.points_kept == (2, 3, 4)


def test_what_is_not_there(tmp_path: Path) -> None:
    repo = repository(MemoryStore())
    with pytest.raises(NotFound, match="there is no disk 'none'"):
        RepositoryMerge(repo, "none", Policy(last=1))
    with pytest.raises(ValueError, match="greater than or equal to -1"):
        Policy(last=-2)
