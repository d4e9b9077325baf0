"""Merges of files between others that were killed, that still run, or that are asked to keep what they merge."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from snapchain.errors import NotFound
from snapchain.image import scan
from snapchain.merge import in_place, inputs, run, step as plan
from snapchain.merge.journal import journal_path
from snapchain.merge.request import MergeRequest
from snapchain.model.merging import Strategy
from tests.ops.killing import killed_at_every_step
from tests.ops.stacks import Layer, build, clean, flat, names, qemu_img, same, write

STACK = [
    Layer(writes=["write -P 1 0 1M"]),
    Layer(writes=["write -P 2 256k 256k"]),
    Layer(writes=["write -P 3 512k 256k"]),
]


def test_what_is_kept_is_not_told_as_freed(tmp_path: Path) -> None:
    *_, top = build(tmp_path / "vm", STACK)
    report = run.run_step(plan.plan_step(MergeRequest(image=top, flatten=True, keep_inputs=True)))
    assert report.bytes_freed == -top.stat().st_blocks * 512


def test_an_input_that_goes_while_the_merge_is_planned(tmp_path: Path) -> None:
    _, lower, top = build(tmp_path / "vm", STACK)
    with scan(top, format="qcow2") as chain:
        lower.unlink()
        with pytest.raises(NotFound, match=f"{lower}: it was removed meanwhile"):
            inputs.check(chain.files[1:], [], keep_inputs=False)


@pytest.mark.parametrize("strategy", [Strategy.NEW, Strategy.ABSORB, Strategy.COMMIT])
def test_what_killed_merges_into_an_input_have_left_goes_with_it(strategy: Strategy, tmp_path: Path) -> None:
    _, lower, top = build(tmp_path / "vm", STACK)
    lower.with_name(f".{lower.name}.merge-0123abcd").touch()
    run.run_step(plan.plan_step(MergeRequest(image=top, strategy=strategy)))
    assert names(tmp_path / "vm") == ["0.qcow2", top.name]


def test_what_a_killed_merge_had_half_written_keeps_no_input(tmp_path: Path) -> None:
    """It stands on one, and nobody stands on it."""
    root, lower, top = build(tmp_path / "vm", STACK)
    leftover = lower.with_name(f".{lower.name}.merge-0123abcd")
    qemu_img("create", "-q", "-f", "qcow2", "-b", root.name, "-F", "qcow2", leftover)
    report = run.run_step(plan.plan_step(MergeRequest(image=top, flatten=True)))
    assert report.removed == (lower, root)
    assert names(tmp_path / "vm") == [top.name]


def test_a_commit_that_is_killed_again_is_still_known_as_one(tmp_path: Path) -> None:
    """Else nothing would tell that the lowest input alone reads wrong."""
    vm = tmp_path / "vm"
    root, lowest, top = (vm / name for name in ("0.qcow2", "1.qcow2", "disk.qcow2"))

    def killed_once() -> None:
        for entry in vm.iterdir() if vm.exists() else ():
            entry.unlink()
        build(vm, STACK)
        pid = os.fork()
        if pid == 0:
            vars(in_place)["_take_place"] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            merge()
            os._exit(1)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])

    def merge() -> None:
        run.run_step(plan.plan_step(MergeRequest(image=top, strategy=Strategy.COMMIT)))

    killed_once()
    point, view = flat_of(lowest, root, tmp_path / "point"), flat(top, tmp_path / "view")
    assert not same(lowest, point)
    for _ in killed_at_every_step(merge):
        assert same(top, view)
        assert not lowest.exists() or journal_path(top).exists()
        killed_once()
    assert same(top, view)
    assert clean(top)
    assert names(vm) == ["0.qcow2", "disk.qcow2"]


def flat_of(layer: Path, root: Path, target: Path) -> Path:
    """What the lowest input read before anything was merged into it."""
    again = build(target.with_name("again"), STACK)
    assert (again[0].name, again[1].name) == (root.name, layer.name)
    return flat(again[1], target)


@pytest.mark.parametrize("strategy", [Strategy.NEW, Strategy.ABSORB])
def test_an_image_that_is_opened_by_a_link_in_another_directory(strategy: Strategy, tmp_path: Path) -> None:
    """QEMU looks for a relative backing file from where the link lies, not from where the file does."""
    below = tmp_path / "below"
    _, lower = build(below, STACK[:2])
    there = tmp_path / "far" / "off"
    there.mkdir(parents=True)
    link = tmp_path / "vm" / "disk.qcow2"
    link.parent.mkdir()
    link.symlink_to(there / "disk.qcow2")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", f"../below/{lower.name}", "-F", "qcow2", link.resolve(), "1M")
    write(link, "write -P 3 512k 256k")
    before = flat(link, tmp_path / "before")
    run.run_step(plan.plan_step(MergeRequest(image=link, strategy=strategy, image_dirs=[below, there], remove=[lower])))
    assert same(link, before)
    assert same(link.resolve(), before)
    assert not lower.exists()


@pytest.mark.parametrize("options", ["", "extended_l2=on"])
@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("strategy", [Strategy.NEW, Strategy.ABSORB, Strategy.COMMIT])
def test_a_disk_that_grows_after_a_merge_shows_nothing_of_what_lay_behind_its_end(
    strategy: Strategy, flatten: bool, options: str, tmp_path: Path
) -> None:
    """QEMU copies from a longer backing file to the end of a cluster, and hides that only while it is there."""
    *_, top = build(
        tmp_path / "vm",
        [
            Layer(size=4096),
            Layer(size=37376, writes=["write -P 88 0 37376"], options=options),
            Layer(size=32256, writes=["write -P 7 14848 17408"], options=options),
        ],
    )
    before = flat(top, tmp_path / "before")
    run.run_step(plan.plan_step(MergeRequest(image=top, flatten=flatten, strategy=strategy)))
    qemu_img("resize", "-q", "-f", "qcow2", top, "1M")
    os.truncate(before, 1 << 20)
    assert same(top, before)
    assert clean(top)
