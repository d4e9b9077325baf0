"""What others do to a disk between the plan of a snapshot or a merge and its last step is never overwritten."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest

from snapchain.errors import Busy, Conflict, SnapchainError, Unsupported
from snapchain.host import files
from snapchain.host.locks import ImageLock, LockMode
from snapchain.image import scan
from snapchain.merge import run as merge_run, step as merge_plan
from snapchain.merge.journal import journal_path
from snapchain.merge.request import MergeRequest
from snapchain.model.events import Event, Progress
from snapchain.model.merging import Strategy
from snapchain.ops import hold
from snapchain.source import sealing as snapshot
from snapchain.source.notes import Given, Overlay
from snapchain.source.ownership import fence
from tests.ops.stacks import Layer, MiB, build, clean, flat, names, qemu_img, same

NEW, ABSORB, COMMIT = Strategy.NEW, Strategy.ABSORB, Strategy.COMMIT
each_strategy = pytest.mark.parametrize("strategy", [NEW, ABSORB, COMMIT])
Change = Callable[[list[Path]], object]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("pristine") / "vm"
    return build(directory, [Layer(MiB, [f"write -P {n + 1} {n * 64}k 128k"]) for n in range(4)])


@pytest.fixture
def stack(pristine: list[Path], tmp_path: Path) -> list[Path]:
    shutil.copytree(pristine[0].parent, tmp_path / "vm")
    return [tmp_path / "vm" / path.name for path in pristine]


# ---- between the plan and its execution


def give_away(stack: list[Path]) -> None:
    overlay = Overlay(name="disk", layer="0" * 32, virtual_size=MiB, cluster_size=65536, extended_l2=False)
    mark = Given(
        destination="ssh://b/r",
        disk="web1/vda",
        epoch=2,
        token="t",
        time=datetime.now(UTC),
        overlay=overlay,
        together=(),
    )
    with scan(stack[-1]) as chain:
        fence(chain, mark)


def put_a_snapshot_on_it(stack: list[Path]) -> None:
    snapshot.run(snapshot.plan(stack[-1]))


def add_a_bitmap(stack: list[Path]) -> None:
    qemu_img("bitmap", "-f", "qcow2", "--add", stack[-1], "daily")


def resize(stack: list[Path]) -> None:
    qemu_img("resize", "-q", "-f", "qcow2", stack[-1], "2M")


def give_a_second_name(stack: list[Path]) -> None:
    os.link(stack[-1], stack[-1].parent.with_name("elsewhere.qcow2"))


def clone(stack: list[Path]) -> None:
    other = stack[1].with_name("clone.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", stack[1].name, "-F", "qcow2", other)


def hold_a_layer(stack: list[Path]) -> None:
    hold.hold_image(stack[1], "audit")


AFTER_THE_PLAN: dict[Change, tuple[type[SnapchainError], str]] = {
    give_away: (Conflict, r"is being given to ssh://b/r::web1/vda"),
    put_a_snapshot_on_it: (Conflict, "disk.1.qcow2: it exists already|changed after the merge was planned"),
    resize: (Conflict, "it was changed after the .* was planned"),
    give_a_second_name: (Unsupported, "further hard links"),
}
AFTER_THE_PLAN_OF_A_MERGE: dict[Change, tuple[type[SnapchainError], str]] = {
    **AFTER_THE_PLAN,
    clone: (Conflict, "it was changed after the merge was planned"),
    hold_a_layer: (Conflict, "held under 'audit'"),
}


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Of the images, with their inodes."""
    return {name: ((directory / name).stat().st_ino, (directory / name).read_bytes()) for name in names(directory)}


@pytest.mark.parametrize("change", [*AFTER_THE_PLAN, add_a_bitmap], ids=lambda change: change.__name__)
def test_a_disk_that_is_not_as_planned_is_not_sealed(change: Change, stack: list[Path]) -> None:
    error, said = AFTER_THE_PLAN.get(change, (Conflict, "it was changed after the snapshot was planned"))
    planned = snapshot.plan(stack[-1])
    change(stack)
    before = contents(stack[0].parent)
    with pytest.raises(error, match=said) as caught:
        snapshot.run(planned)
    assert caught.value.subject == str(
        stack[-1].with_name("disk.1.qcow2") if change is put_a_snapshot_on_it else stack[-1]
    )
    assert contents(stack[0].parent) == before


@pytest.mark.parametrize("change", AFTER_THE_PLAN_OF_A_MERGE, ids=lambda change: change.__name__)
@each_strategy
def test_a_chain_that_is_not_as_planned_is_not_merged(change: Change, strategy: Strategy, stack: list[Path]) -> None:
    error, said = AFTER_THE_PLAN_OF_A_MERGE[change]
    planned = merge_plan.plan_step(MergeRequest(image=stack[-1], strategy=strategy))
    change(stack)
    if change is clone and strategy is COMMIT:
        error, said = Unsupported, "must stay as it is: .* depends on it"
    before = contents(stack[0].parent)
    with pytest.raises(error, match=said):
        merge_run.run_step(planned)
    assert contents(stack[0].parent) == before


# ---- while it is at work


def at_work(planned: merge_plan.MergeStep, meanwhile: Callable[[], object]) -> merge_run.StepReport:
    """The merge, and something else at the moment when it has begun to move data."""
    done: list[object] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Progress) and event.phase == "merge" and not done:
            done.append(meanwhile())

    try:
        return merge_run.run_step(planned, on_event=on_event)
    finally:
        assert done


def scribble(path: Path) -> Callable[[], object]:
    """Changes a guest byte as a program without locks does, and closes the file again."""
    with scan(path, image_dirs=[path.parent]) as chain:
        host = int(chain.top.physical.host[chain.top.physical.kind >= 0][0])

    def write() -> bytes:
        with path.open("r+b") as file:
            file.seek(host)
            file.write(b"scribbled")
        return path.read_bytes()

    return write


@pytest.mark.parametrize("number", range(4))
def test_what_a_program_without_locks_writes_during_a_merge_is_not_lost(number: int, stack: list[Path]) -> None:
    written: list[object] = []
    scribbled = scribble(stack[number])
    with pytest.raises(
        Conflict, match="the image was modified while it was being merged; nothing was changed"
    ) as caught:
        at_work(merge_plan.plan_step(MergeRequest(image=stack[-1], strategy=NEW)), lambda: written.append(scribbled()))
    assert caught.value.subject == str(stack[number])
    assert names(stack[0].parent) == ["0.qcow2", "1.qcow2", "2.qcow2", "disk.qcow2"]
    assert stack[number].read_bytes() == written[0]


@pytest.mark.parametrize(
    ("strategy", "number"), [(ABSORB, 0), (ABSORB, 1), (ABSORB, 2), (COMMIT, 0), (COMMIT, 2), (COMMIT, 3)]
)
def test_what_is_written_during_a_merge_in_place_is_not_lost(
    strategy: Strategy, number: int, stack: list[Path], tmp_path: Path
) -> None:
    """Of all files but the one that the merge itself writes to."""
    scribbled = scribble(stack[number])
    said = "the image was modified while it was being merged; the chain reads as before"
    with pytest.raises(Conflict, match=said) as caught:
        at_work(merge_plan.plan_step(MergeRequest(image=stack[-1], strategy=strategy)), scribbled)
    assert caught.value.subject == str(stack[number])
    reference = flat(stack[-1], tmp_path / "flat")
    assert b"scribbled" in reference.read_bytes()
    assert journal_path(stack[-1]).exists() == (strategy is COMMIT)
    merge_run.run_step(merge_plan.plan_step(MergeRequest(image=stack[-1], strategy=strategy)))
    assert same(stack[-1], reference)
    assert names(stack[0].parent) == ["0.qcow2", "disk.qcow2"]


@pytest.mark.parametrize("number", range(4))
@each_strategy
def test_what_was_written_just_before_the_files_are_locked_is_not_lost(
    number: int, strategy: Strategy, stack: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the scan by which the merge goes, before its first write."""
    scribbled, real = scribble(stack[number]), files.free_bytes
    planned = merge_plan.plan_step(MergeRequest(image=stack[-1], strategy=strategy))
    done: list[object] = []

    def free_bytes(directory: Path) -> int:
        done.append(scribbled())
        return real(directory)

    monkeypatch.setattr(files, "free_bytes", free_bytes)
    with pytest.raises(
        Conflict, match="the image was modified while it was being merged; nothing was changed"
    ) as caught:
        merge_run.run_step(planned)
    assert len(done) == 1
    assert caught.value.subject == str(stack[number])
    assert stack[number].read_bytes() == done[0]
    assert names(stack[0].parent) == ["0.qcow2", "1.qcow2", "2.qcow2", "disk.qcow2"]


@pytest.mark.parametrize("number", range(1, 4))
def test_files_do_not_go_under_a_reader_that_came_during_the_merge(
    number: int, stack: list[Path], tmp_path: Path
) -> None:
    reference = flat(stack[-1], tmp_path / "flat")
    before = contents(stack[0].parent)
    with ExitStack() as reader, pytest.raises(Busy, match="has it") as caught:
        at_work(
            merge_plan.plan_step(MergeRequest(image=stack[-1], strategy=NEW)),
            lambda: reader.enter_context(ImageLock(stack[number], LockMode.READ)),
        )
    assert caught.value.subject == str(stack[number])
    assert contents(stack[0].parent) == before
    merge_run.run_step(merge_plan.plan_step(MergeRequest(image=stack[-1], strategy=NEW)))
    assert same(stack[-1], reference)
    assert clean(stack[-1])


def test_a_file_below_the_merged_ones_may_be_read_meanwhile(stack: list[Path]) -> None:
    with ExitStack() as reader:
        at_work(
            merge_plan.plan_step(MergeRequest(image=stack[-1], strategy=NEW)),
            lambda: reader.enter_context(ImageLock(stack[0], LockMode.READ)),
        )
    assert names(stack[0].parent) == ["0.qcow2", "disk.qcow2"]


@pytest.mark.parametrize("strategy", [ABSORB, COMMIT])
def test_nobody_comes_during_a_merge_in_place(strategy: Strategy, stack: list[Path]) -> None:
    def knock() -> None:
        for path in stack[1:]:
            with pytest.raises(Busy, match="has it"):
                ImageLock(path, LockMode.READ)

    at_work(merge_plan.plan_step(MergeRequest(image=stack[-1], strategy=strategy)), knock)
    assert names(stack[0].parent) == ["0.qcow2", "disk.qcow2"]


@each_strategy
def test_somebody_who_is_there_already_is_told_before_anything_is_done(strategy: Strategy, stack: list[Path]) -> None:
    planned = merge_plan.plan_step(MergeRequest(image=stack[-1], strategy=strategy))
    events: list[Event] = []
    with ImageLock(stack[2], LockMode.READ), pytest.raises(Busy, match="has it") as caught:
        merge_run.run_step(planned, on_event=events.append)
    assert caught.value.subject == str(stack[2])
    assert events == []


def test_what_a_clone_made_during_the_merge_stands_on_stays(stack: list[Path], tmp_path: Path) -> None:
    reference, other = flat(stack[-1], tmp_path / "flat"), flat(stack[1], tmp_path / "other")
    report = at_work(merge_plan.plan_step(MergeRequest(image=stack[-1], strategy=NEW)), lambda: clone(stack))
    assert report.removed == (stack[2],)
    assert [(kept.path, kept.reason) for kept in report.kept] == [(stack[1], "clone.qcow2 depends on it")]
    assert same(stack[1].with_name("clone.qcow2"), other)
    assert same(stack[-1], reference)
    assert names(stack[0].parent) == ["0.qcow2", "1.qcow2", "clone.qcow2", "disk.qcow2"]


@pytest.mark.parametrize("change", [hold_a_layer, give_away], ids=lambda change: change.__name__)
def test_a_layer_that_is_held_or_given_away_during_the_merge_stays(change: Change, stack: list[Path]) -> None:
    error, said = AFTER_THE_PLAN_OF_A_MERGE[change]
    before = contents(stack[0].parent)
    with pytest.raises(error, match=said):
        at_work(merge_plan.plan_step(MergeRequest(image=stack[-1], strategy=NEW)), lambda: change(stack))
    assert contents(stack[0].parent) == before
