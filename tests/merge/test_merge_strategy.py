"""Which strategy is taken, by bytes and by what a stack allows; and what each keeps that others would lose."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from snapchain.errors import Busy, Conflict, Corrupt, Unsupported
from snapchain.image import ImageChain, scan
from snapchain.merge import amendment, new_file, run as merge_run, step as merge_plan
from snapchain.merge.amendment import Amendment
from snapchain.merge.assembly import Assembly
from snapchain.merge.copying import Copies, Moved, Mover
from snapchain.merge.journal import journal_path
from snapchain.merge.request import MergeRequest
from snapchain.merge.run import StepReport
from snapchain.merge.step import MergeStep
from snapchain.model.merging import Strategy, cheapest
from snapchain.ops import doctor
from tests.image.mounts import mounted
from tests.memory import scratch
from tests.ops.faulty_calls import Fault, killed_before, met
from tests.ops.stacks import Layer, MiB, build, clean, flat, names, qemu_img, same, write

NEW, ABSORB, COMMIT = Strategy.NEW, Strategy.ABSORB, Strategy.COMMIT


def merge(image: Path, **options: object) -> StepReport:
    return merge_run.run_step(merge_plan.plan_step(MergeRequest(image=image, **options)))  # type: ignore[arg-type]


def chosen(image: Path, **options: object) -> MergeStep:
    return merge_plan.plan_step(MergeRequest(image=image, **options))  # type: ignore[arg-type]


def test_the_cheapest_by_bytes_and_room() -> None:
    moved = {NEW: 1000, ABSORB: 300, COMMIT: 200}
    needed = {NEW: 1000, ABSORB: 300, COMMIT: 250}
    assert cheapest(moved, needed, free=10_000) is COMMIT
    assert cheapest(moved, needed, free=260) is COMMIT
    assert cheapest({**moved, COMMIT: 400}, needed, free=10_000) is ABSORB
    # An untouched input is worth a twentieth.
    assert cheapest({NEW: 104, ABSORB: 100}, {NEW: 104, ABSORB: 100}, free=10_000) is NEW
    assert cheapest({NEW: 106, ABSORB: 100}, {NEW: 106, ABSORB: 100}, free=10_000) is ABSORB
    assert cheapest({NEW: 104, ABSORB: 100}, {NEW: 104, ABSORB: 100}, free=102) is ABSORB
    # Where nothing fits, what lacks least is told.
    assert cheapest(moved, needed, free=10) is COMMIT


def test_a_large_upper_layer_absorbs_and_a_large_lower_one_is_committed_to(tmp_path: Path) -> None:
    large, small = ["write -P 2 0 3M"], ["write -P 3 1M 128k"]
    root = Layer(writes=["write -P 1 0 4M"])
    for writes, expected in (((small, large), ABSORB), ((large, small), COMMIT)):
        directory = tmp_path / expected.value
        paths = build(directory, [root, *(Layer(writes=each) for each in writes)])
        reference = flat(paths[-1], tmp_path / f"{expected.value}.flat")
        inodes = [path.stat().st_ino for path in paths]
        planned = chosen(paths[-1])
        assert planned.strategy is expected
        # What the large one hides is not moved, nor is the large one.
        assert planned.bytes_to_move == (0 if expected is ABSORB else 128 * 1024)
        report = merge_run.run_step(planned)
        assert names(directory) == ["0.qcow2", "disk.qcow2"]
        assert report.removed == (paths[1],)
        assert paths[-1].stat().st_ino == inodes[2 if expected is ABSORB else 1]
        assert same(paths[-1], reference)
        assert clean(paths[-1])


@pytest.mark.root
@pytest.mark.serial
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_where_extents_are_shared_a_new_file_costs_nothing(kind: str, tmp_path: Path) -> None:
    with mounted(kind, tmp_path) as place:
        paths = build(place / "vm", [Layer(), Layer(writes=["write -P 2 0 3M"]), Layer(writes=["write -P 3 1M 64k"])])
        reference = flat(paths[-1], tmp_path / "flat")
        os.sync()
        planned = chosen(paths[-1])
        assert (planned.strategy, planned.shares_extents) == (NEW, True)
        assert planned.bytes_to_move == 3 * MiB
        assert planned.needs_bytes < 3 * MiB
        assert names(place / "vm") == ["0.qcow2", "1.qcow2", "disk.qcow2"]
        merge_run.run_step(planned)
        assert same(paths[-1], reference)


@pytest.mark.root
@pytest.mark.serial
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_wrong_byte_is_found_though_extents_are_shared(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof reads nothing of what is one piece of disk; what was written to since is none any more."""
    real = vars(new_file)["write_assembly"]

    def assemble(assembly: Assembly, fd: int, **named: object) -> object:
        done: Moved = real(assembly, fd, **named)
        assert done.shared == assembly.bytes_moved
        write(Path(f"/proc/self/fd/{fd}").readlink(), "write -P 77 1234k 1")
        return done

    with mounted(kind, tmp_path) as place:
        paths = build(place / "vm", [Layer(), Layer(writes=["write -P 2 0 3M"]), Layer(writes=["write -P 3 1M 64k"])])
        os.sync()
        monkeypatch.setattr(new_file, "write_assembly", assemble)
        with pytest.raises(Corrupt, match=f"bytes {1234 * 1024} to {1234 * 1024 + 1}$"):
            merge(paths[-1])
        assert names(place / "vm") == ["0.qcow2", "1.qcow2", "disk.qcow2"]


@pytest.fixture
def stack(tmp_path: Path) -> list[Path]:
    return build(tmp_path / "vm", [Layer(writes=[f"write -P {n + 1} {n * 256}k 512k"]) for n in range(4)])


@pytest.mark.parametrize("strategy", [ABSORB, COMMIT])
def test_what_a_strategy_cannot_do_is_said(strategy: Strategy, stack: list[Path]) -> None:
    with pytest.raises(Unsupported, match="writes to an input"):
        chosen(stack[-1], strategy=strategy, keep_inputs=True)
    with pytest.raises(Unsupported, match="cluster size"):
        chosen(stack[-1], strategy=strategy, cluster_size=4096)
    assert chosen(stack[-1], keep_inputs=True).strategy is NEW
    planned = chosen(stack[-1], cluster_size=4096)
    assert (planned.strategy, planned.cluster_size) == (NEW, 4096)
    merge_run.run_step(planned)
    with scan(stack[-1]) as chain:
        assert chain.top.cluster_size == 4096


def test_nothing_is_committed_under_a_clone(stack: list[Path], tmp_path: Path) -> None:
    for number in (1, 2):
        clone = stack[0].with_name(f"clone{number}.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", "-b", stack[number].name, "-F", "qcow2", clone)
        before = flat(clone, tmp_path / "clone.flat")
        with pytest.raises(Unsupported, match=rf"must stay as it is: clone{number}.qcow2 depends on it"):
            chosen(stack[-1], strategy=COMMIT)
        assert chosen(stack[-1]).strategy is not COMMIT
        assert same(clone, before)
        clone.unlink()


def test_a_clone_on_an_absorbed_input_is_kept_whole(stack: list[Path], tmp_path: Path) -> None:
    clone = stack[0].with_name("clone.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "1.qcow2", "-F", "qcow2", clone)
    before, reference = flat(clone, tmp_path / "clone.flat"), flat(stack[-1], tmp_path / "flat")
    merge(stack[-1], strategy=ABSORB)
    assert names(stack[0].parent) == ["0.qcow2", "1.qcow2", "clone.qcow2", "disk.qcow2"]
    assert same(clone, before)
    assert same(stack[-1], reference)


def test_bitmaps_of_the_top_stay_true(stack: list[Path], tmp_path: Path) -> None:
    reference = flat(stack[-1], tmp_path / "flat")
    qemu_img("bitmap", "-f", "qcow2", "--add", stack[-1], "daily")
    planned = chosen(stack[-1])
    assert planned.strategy is ABSORB
    with pytest.raises(Unsupported, match="daily"):
        chosen(stack[-1], strategy=NEW)
    merge_run.run_step(planned)
    assert '"name": "daily"' in qemu_img("info", "--output=json", stack[-1])
    assert same(stack[-1], reference)
    assert clean(stack[-1])
    write(stack[-1], "write -P 9 0 64k")  # QEMU goes on with it
    assert clean(stack[-1])


def test_bitmaps_of_lower_layers_are_not_lost_silently(stack: list[Path]) -> None:
    qemu_img("bitmap", "-f", "qcow2", "--add", stack[1], "weekly")
    for strategy in (None, NEW, ABSORB, COMMIT):
        with pytest.raises(Unsupported, match="weekly"):
            chosen(stack[-1], strategy=strategy)
    with pytest.raises(Unsupported, match="bitmaps would be wrong"):
        chosen(stack[-1], strategy=COMMIT, drop_bitmaps=True)
    assert merge(stack[-1], drop_bitmaps=True).layers_after == 2


def test_a_raw_root_is_not_committed_to(tmp_path: Path) -> None:
    raw = build(tmp_path / "raw", [Layer(image_format="raw"), Layer(writes=["write -P 2 0 2k"])])
    with pytest.raises(Unsupported, match="raw"):
        chosen(raw[-1], strategy=COMMIT, flatten=True)


@pytest.fixture
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=scratch()) as name:
        yield Path(name)


def killed_while_committing(stack: list[Path]) -> None:
    """A merge of all above the root that dies when its lowest input holds everything already."""
    killed_before(lambda: merge(stack[-1], strategy=COMMIT), stack[0].parent, "fchmod")


def test_a_killed_commit_is_done_to_its_end_first(memory: Path) -> None:
    stack = build(memory / "vm", [Layer(MiB, [f"write -P {n + 1} {n * 64}k 128k"]) for n in range(5)])
    reference = flat(stack[-1], memory / "flat")
    killed_while_committing(stack)
    assert same(stack[-1], reference)
    with pytest.raises(Conflict, match="comes first") as caught:
        merge(stack[-1], from_layer="2.qcow2", to_layer="3.qcow2", strategy=NEW)
    assert "snapchain doctor" in (caught.value.hint or "")
    assert journal_path(stack[-1]).exists()
    with journal_path(stack[-1]).open() as at_work:
        fcntl.flock(at_work, fcntl.LOCK_EX)  # one that lives is waited for
        with pytest.raises(Busy, match="is running"):
            merge(stack[-1], from_layer="2.qcow2", to_layer="3.qcow2", strategy=NEW)
    report = doctor.run(doctor.plan([stack[-1]]))
    assert report.well
    assert names(stack[0].parent) == ["0.qcow2", "disk.qcow2"]
    assert same(stack[-1], reference)
    assert clean(stack[-1])


def test_the_same_command_finishes_a_killed_commit(memory: Path) -> None:
    stack = build(memory / "vm", [Layer(MiB, [f"write -P {n + 1} {n * 64}k 128k"]) for n in range(4)])
    reference = flat(stack[-1], memory / "flat")
    killed_while_committing(stack)
    merge(stack[-1])
    assert names(stack[0].parent) == ["0.qcow2", "disk.qcow2"]
    assert same(stack[-1], reference)


@pytest.mark.sampled
def test_a_guest_that_ran_after_a_killed_absorb_loses_nothing(memory: Path) -> None:
    stack = build(memory / "vm", [Layer(MiB, [f"write -P {n + 1} {n * 64}k 128k"]) for n in range(4)])
    pristine = {path: path.read_bytes() for path in stack}
    deaths = 0
    for where, _ in met(lambda: merge(stack[-1], strategy=ABSORB), Fault.KILL, each=3):
        deaths += 1
        if journal_path(stack[-1]).exists():
            write(stack[-1], "write -P 77 300k 200k", "write -P 78 900k 8k")
            reference = flat(stack[-1], memory / "flat")
            assert doctor.run(doctor.plan([stack[-1]])).well, where
            assert same(stack[-1], reference), where
            assert clean(stack[-1]), where
        for path in stack[0].parent.iterdir():
            path.unlink()
        for path, data in pristine.items():
            path.write_bytes(data)
    assert deaths > 5


@pytest.mark.parametrize("strategy", [ABSORB, COMMIT])
def test_a_wrong_result_in_place_is_not_believed(
    strategy: Strategy, stack: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = flat(stack[-1], tmp_path / "flat")
    before = names(stack[0].parent)
    real = Mover.run

    def copied(mover: Mover, copies: Copies, **named: object) -> None:
        """Loses what it should bring, as a fault of the disk may."""
        real(mover, copies, **named)  # type: ignore[arg-type]
        if len(copies):
            os.pwrite(mover._fd, b"?", int(copies.target[0]))

    with monkeypatch.context() as patch:
        patch.setattr(Mover, "run", copied)
        with pytest.raises(Corrupt, match="reads differently"):
            merge(stack[-1], strategy=strategy)
    assert same(stack[-1], reference)
    if strategy is ABSORB:
        assert names(stack[0].parent) == before
    else:
        assert journal_path(stack[-1]).exists()
    merge(stack[-1], strategy=strategy)
    assert names(stack[0].parent) == ["0.qcow2", "disk.qcow2"]
    assert same(stack[-1], reference)


@pytest.mark.parametrize("strategy", [ABSORB, COMMIT])
def test_what_is_seen_is_never_overwritten(
    strategy: Strategy, stack: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = flat(stack[-1], tmp_path / "flat")
    name = f"plan_{strategy.value}"
    real = vars(amendment)[name]

    def wrong(view: ImageChain, first: int, **named: object) -> Amendment:
        """A place is written to from which the guest reads, as a fault of the planner would."""
        found: Amendment = real(view, first, **named)
        file = found.file
        seen = view.resolve().val == found.target
        host = file.physical.host[np.searchsorted(file.physical.start, view.resolve().at[seen][-1:], side="right") - 1]
        return replace(found, zero_target=host + 512, zero_length=np.array([1], np.int64))

    monkeypatch.setattr(amendment, name, wrong)
    with pytest.raises(Corrupt, match="would overwrite what is seen"):
        merge(stack[-1], strategy=strategy)
    assert same(stack[-1], reference)


@pytest.mark.parametrize("strategy", [NEW, ABSORB, COMMIT])
def test_standing_is_kept_by_every_strategy(strategy: Strategy, stack: list[Path]) -> None:
    """A guest's process may open its disk as before."""
    stack[-1].chmod(0o640)
    os.setxattr(stack[-1], "user.note", b"x")
    if os.geteuid() == 0:
        os.chown(stack[-1], 64055, 994)
    before = stack[-1].stat()
    merge(stack[-1], strategy=strategy)
    after = stack[-1].stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert os.getxattr(stack[-1], "user.note") == b"x"


def test_the_command_takes_a_strategy(stack: list[Path]) -> None:
    program = str(Path(sys.executable).with_name("snapchain"))
    argv = [program, "merge", str(stack[-1]), "--strategy", "absorb", "--json"]
    said = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
    assert said["strategy"] == "absorb"
    assert names(stack[0].parent) == ["0.qcow2", "disk.qcow2"]
