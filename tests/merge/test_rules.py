"""Merging by rules, caps and budgets: what is chosen, what stays, and that every view that stays reads as before."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, Unavailable, Unsupported
from snapchain.image import scan
from snapchain.merge import plan as planning, run as merge_run
from snapchain.merge.plan import MergePlan
from snapchain.merge.request import MergeRequest
from snapchain.merge.run import MergeReport
from snapchain.merge.step import MergeStep
from snapchain.model.events import Event, Notice
from snapchain.model.retention import Policy
from snapchain.objects.memory import MemoryStore
from snapchain.ops import hold
from snapchain.ops.merge import held_at
from snapchain.repository.destination import RepositoryDestination
from snapchain.source import sealing as snapshot
from tests.ops.shipping import DISK, restore, same_bytes, ship
from tests.ops.stacks import Layer, MiB, build, clean, flat, names, qemu_img, same, standing, write
from tests.repository.synthetic import again, repository

LAYERS = 8


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """Eight layers: 0.qcow2 to 6.qcow2 and disk.qcow2; each hides a part of the one before. Sealed on days of May."""
    writes = [["write -P 1 0 4M"], *([f"write -P {n + 1} {n * 256}k 512k"] for n in range(1, LAYERS))]
    paths = build(tmp_path / "vm", [Layer(writes=each) for each in writes])
    for day, path in enumerate(paths, start=1):
        at = int(datetime(2026, 5, day, 12, tzinfo=UTC).timestamp() * 1e9) + 1
        os.utime(path, ns=(at, at))
    return paths


@pytest.fixture
def views(chain: list[Path], tmp_path: Path) -> dict[str, Path]:
    """What each file showed, by name."""
    return {path.name: flat(path, tmp_path / f"{path.name}.raw") for path in chain}


def plan(chain: list[Path], **options: object) -> MergePlan:
    return planning.plan(MergeRequest(image=chain[-1], **options))  # type: ignore[arg-type]


def merge(chain: list[Path], **options: object) -> MergeReport:
    return merge_run.run(plan(chain, **options))


def ranges(planned: MergePlan) -> list[tuple[int, int]]:
    return [(each.first, each.last) for each in planned.merges]


def assert_reads_as_before(directory: Path, views: dict[str, Path]) -> None:
    for name in names(directory):
        assert same(directory / name, views[name]), name
        assert clean(directory / name), name


# ---- by name


def test_without_a_rule_everything_above_the_root(chain: list[Path], views: dict[str, Path]) -> None:
    planned = plan(chain)
    assert (planned.layers_before, planned.layers_after, ranges(planned)) == (8, 2, [(1, 7)])
    assert planned.shadowed_bytes == 6 * 256 << 10
    assert [layer.shadowed_bytes for layer in planned.layers] == [2048 << 10, *[256 << 10] * 6, 0]
    report = merge_run.run(planned)
    assert (report.layers_after, len(report.merges), report.failed) == (2, 1, ())
    assert report.result == chain[-1]
    assert_reads_as_before(chain[0].parent, views)


def test_nothing_to_merge(chain: list[Path]) -> None:
    merge(chain)
    planned = plan(chain)
    assert (planned.strategy, planned.merges, planned.missing_bytes) == ("nothing", (), 0)
    report = merge_run.run(planned)
    assert (report.strategy, report.layers_before, report.layers_after) == ("nothing", 2, 2)


def test_a_range_with_a_held_layer_is_refused(chain: list[Path]) -> None:
    hold.hold_image(chain[3], "audit")
    for options in ({}, {"from_layer": "1.qcow2", "to_layer": "3.qcow2"}, {"flatten": True}):
        with pytest.raises(Conflict, match="held under 'audit'") as told:
            plan(chain, **options)
        assert f"snapchain release {chain[3]} --tag audit" in (told.value.hint or "")
    assert ranges(plan(chain, from_layer="1.qcow2", to_layer="2.qcow2")) == [(1, 2)]


def test_a_note_that_cannot_be_read_might_be_a_hold(chain: list[Path]) -> None:
    hold.hold_image(chain[3], "audit")
    next(chain[0].parent.glob(".snapchain-layer-*")).write_text("{")
    with pytest.raises(Corrupt, match="not the note of a layer"):
        plan(chain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"from_layer": "1.qcow2", "max_layers": 3}, "would choose them"),
        ({"to_layer": "1.qcow2", "policy": Policy(last=1)}, "would choose them"),
        ({"flatten": True, "from_layer": "1.qcow2"}, "cannot be combined with --from"),
        ({"max_layers": 0}, "has at least one layer"),
        ({"budget_bytes": -1}, "cannot be negative"),
        ({"budget_seconds": float("nan")}, "budget"),
    ],
)
def test_what_makes_no_sense(chain: list[Path], options: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        plan(chain, **options)


# ---- by rules


def test_views_that_a_rule_names_stay(chain: list[Path], views: dict[str, Path]) -> None:
    planned = plan(chain, policy=Policy(last=2, weekly=2), zone=UTC)
    # 3 May 2026 is a Sunday: the 7th (6.qcow2), the 6th, and the newest of the week before.
    assert ranges(planned) == [(1, 2), (3, 5)]
    assert [place for place, layer in enumerate(planned.layers) if layer.stays] == [2, 5, 6]
    assert planned.layers[2].stays == ("weekly 2 of 2: 2026-W18",)
    report = merge_run.run(planned)
    assert names(chain[0].parent) == ["0.qcow2", "2.qcow2", "5.qcow2", "6.qcow2", "disk.qcow2"]
    assert (report.layers_before, report.layers_after, len(report.merges)) == (8, 5, 2)
    assert_reads_as_before(chain[0].parent, views)
    again_planned = plan(chain, policy=Policy(last=2, weekly=2), zone=UTC)
    assert again_planned.merges == (), "the moments of the views are those of before"


def test_labels_are_those_of_the_snapshots(tmp_path: Path) -> None:
    image = build(tmp_path / "vm", [Layer(writes=["write -P 1 0 64k"])])[0]
    for number, label in enumerate(["root", "a", "golden", "b", "c"]):
        snapshot.run(snapshot.plan(image, labels=[label]))
        write(image, f"write -P {number + 2} {number * 32}k 64k")
    golden = flat(image.with_name("disk.3.qcow2"), tmp_path / "golden.raw")
    top = flat(image, tmp_path / "top.raw")
    merge([image], policy=Policy(labels=frozenset({"golden"})))
    assert names(image.parent) == ["disk.1.qcow2", "disk.3.qcow2", "disk.5.qcow2", "disk.qcow2"]
    assert same(image.with_name("disk.3.qcow2"), golden)
    assert same(image, top)
    # The label is still there after the merge, and still keeps it.
    assert plan([image], policy=Policy(labels=frozenset({"golden"}))).merges == ()


def test_flatten_lets_the_root_go_too(chain: list[Path], views: dict[str, Path]) -> None:
    merge(chain, policy=Policy(last=1), flatten=True)
    assert names(chain[0].parent) == ["6.qcow2", "disk.qcow2"]
    assert_reads_as_before(chain[0].parent, views)


def test_rules_go_round_what_is_held(chain: list[Path], views: dict[str, Path]) -> None:
    hold.hold_image(chain[3], "audit")
    inode, before = chain[3].stat().st_ino, chain[3].read_bytes()
    planned = plan(chain, policy=Policy(last=1))
    assert ranges(planned) == [(1, 2), (4, 6)]
    merge_run.run(planned)
    assert (chain[3].stat().st_ino, chain[3].read_bytes()) == (inode, before)
    assert_reads_as_before(chain[0].parent, views)


def test_rules_go_round_what_other_images_stand_on(chain: list[Path], views: dict[str, Path]) -> None:
    clone = chain[0].with_name("clone.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", chain[4].name, "-F", "qcow2", clone)
    planned = plan(chain, policy=Policy(last=1))
    assert ranges(planned) == [(1, 4), (5, 6)]
    assert planned.layers[4].stays == ("clone.qcow2 depends on it",)
    merge_run.run(planned)
    assert same(clone, views[chain[4].name])
    assert_reads_as_before(chain[0].parent, {**views, clone.name: views[chain[4].name]})


# ---- destinations


def test_what_a_destination_lacks_or_builds_on_stays(chain: list[Path], views: dict[str, Path]) -> None:
    repo = repository(MemoryStore(), block_size=256 * 1024)
    ship(chain[5], repo)
    at = (held_at("repo::disk", RepositoryDestination(again(repo)), DISK),)
    planned = plan(chain, policy=Policy(last=1), at=at)
    assert ranges(planned) == [(1, 4)]
    assert [layer.at for layer in planned.layers] == [("repo::disk",)] * 6 + [()] * 2
    assert planned.layers[5].stays == ("newest at repo::disk",)
    merge_run.run(planned)
    assert_reads_as_before(chain[0].parent, views)
    # The next shipment builds on what is there, and reads nothing but the new layers.
    assert ship(chain[-1], repo).bytes_read == 3 * 256 << 10
    restore(repo, chain[0].parent.parent / "out.raw")
    assert same_bytes(chain[0].parent.parent / "out.raw", views["disk.qcow2"])


def test_a_range_that_is_named_is_merged_with_a_warning(chain: list[Path]) -> None:
    repo = repository(MemoryStore(), block_size=256 * 1024)
    ship(chain[5], repo)
    planned = plan(chain, at=(held_at("repo::disk", RepositoryDestination(again(repo)), DISK),))
    assert ranges(planned) == [(1, 7)]
    assert planned.notices == (
        "not yet at repo::disk: 6.qcow2, disk.qcow2; the next shipment reads all that they become",
    )


def test_a_disk_that_was_never_shipped_keeps_all(chain: list[Path]) -> None:
    repo = repository(MemoryStore(), block_size=256 * 1024)
    planned = plan(chain, max_layers=3, at=(held_at("repo::disk", RepositoryDestination(repo), DISK),))
    assert (planned.merges, planned.layers_after) == ((), 8)
    assert planned.notices == ("8 layers are left, not 3: no more can be merged without a layer that must stay",)


# ---- caps and budgets


def test_a_cap_merges_no_more_than_it_takes(chain: list[Path], views: dict[str, Path]) -> None:
    assert plan(chain, max_layers=8).merges == ()
    planned = plan(chain, max_layers=5)
    assert planned.layers_after == 5
    merge_run.run(planned)
    assert len(names(chain[0].parent)) == 5
    assert_reads_as_before(chain[0].parent, views)
    assert plan(chain, max_layers=5).merges == ()


def test_a_cap_does_not_drop_what_is_kept(chain: list[Path]) -> None:
    planned = plan(chain, max_layers=3, policy=Policy(last=4))
    assert planned.layers_after == 6
    assert planned.notices[0].startswith("6 layers are left, not 3")
    assert plan(chain, max_layers=7, policy=Policy(last=4)).layers_after == 7


def test_a_budget_of_bytes_is_kept_to(chain: list[Path], views: dict[str, Path]) -> None:
    whole = plan(chain, budget_bytes=1 << 40)
    assert whole.layers_after == 2
    freed = 0
    for budget in range(0, 5 * MiB, 512 << 10):
        planned = plan(chain, budget_bytes=budget)
        if not any(each.shares_extents for each in planned.merges):
            assert planned.bytes_to_move <= budget
        assert planned.shadowed_bytes >= freed
        freed = planned.shadowed_bytes
    assert 0 < freed <= whole.shadowed_bytes
    merge_run.run(plan(chain, budget_bytes=MiB))
    assert_reads_as_before(chain[0].parent, views)


def test_a_budget_of_seconds_is_kept_to(chain: list[Path]) -> None:
    assert plan(chain, budget_seconds=0).merges == ()
    assert len(plan(chain, budget_seconds=3600).merges) == 1
    assert plan(chain, budget_seconds=0.25, budget_bytes=1 << 40).seconds <= 0.25


def test_what_cannot_be_merged_is_gone_round(chain: list[Path], views: dict[str, Path]) -> None:
    sealed = chain[3].stat()
    qemu_img("bitmap", "--add", chain[3], "backup")
    os.utime(chain[3], ns=(sealed.st_atime_ns, sealed.st_mtime_ns))
    planned = plan(chain, policy=Policy(last=1))
    assert ranges(planned) == [(1, 2), (4, 6)]
    assert "persistent bitmaps" in planned.notices[0]
    assert ranges(plan(chain, policy=Policy(last=1), drop_bitmaps=True)) == [(1, 6)]
    with pytest.raises(Unsupported, match="persistent bitmaps"):
        plan(chain)


# ---- running


def test_too_little_room_is_told_before_anything_moves(chain: list[Path]) -> None:
    planned = plan(chain).model_copy(update={"needs_bytes": 1 << 60})
    before = {path: standing(path) for path in chain}
    with pytest.raises(Unavailable, match=str(1 << 60)) as told:
        merge_run.run(planned)
    assert str(planned.missing_bytes) in (told.value.hint or "")
    assert {path: standing(path) for path in chain} == before


def test_one_failure_leaves_the_others_done(
    chain: list[Path], views: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merge_run.run_step

    def failing(planned: MergeStep, *, on_event: Callable[[Event], None]) -> merge_run.StepReport:
        if planned.last == 5:
            raise NotFound("somebody took it", subject=planned.result)
        return real(planned, on_event=on_event)

    monkeypatch.setattr(merge_run, "run_step", failing)
    planned = plan(chain, policy=Policy(last=2, weekly=2), zone=UTC)
    assert ranges(planned) == [(1, 2), (3, 5)]
    told: list[str] = []
    report = merge_run.run(
        planned, on_event=lambda event: told.append(str(event)) if isinstance(event, Notice) else None
    )
    assert (report.layers_after, len(report.merges), len(report.failed)) == (7, 1, 1)
    assert report.failed[0].layers == tuple(chain[3:6])
    assert "somebody took it" in report.failed[0].message
    assert any("5.qcow2 was not merged" in each for each in told)
    assert_reads_as_before(chain[0].parent, views)


def test_nothing_done_is_the_failure_itself(chain: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise NotFound("somebody took it")

    monkeypatch.setattr(merge_run, "run_step", failing)
    with pytest.raises(NotFound, match="somebody took it"):
        merge(chain, policy=Policy(last=2, weekly=2), zone=UTC)


def test_a_chain_that_changed_since_the_plan_is_left_alone(chain: list[Path]) -> None:
    planned = plan(chain, policy=Policy(last=1))
    write(chain[-1], "write -P 9 0 64k")
    snapshot.run(snapshot.plan(chain[-1]))
    with pytest.raises(Conflict, match="changed after the merge was planned"):
        merge_run.run(planned)


def test_the_notes_of_what_is_gone_go(tmp_path: Path) -> None:
    image = build(tmp_path / "vm", [Layer(writes=["write -P 1 0 64k"])])[0]
    for number in range(4):
        snapshot.run(snapshot.plan(image))
        write(image, f"write -P {number + 2} 0 64k")
    merge([image])
    snapshot.run(snapshot.plan(image))
    write(image, "write -P 9 0 64k")
    merge([image])
    notes = [entry for entry in image.parent.iterdir() if entry.name.startswith(".snapchain-layer-")]
    with scan(image) as opened:
        assert len(opened.files) == 2
    assert len(notes) <= 4
