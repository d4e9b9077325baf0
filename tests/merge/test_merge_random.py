"""Random stacks, merged by every strategy, judged by qemu-img: compare, check, and the files above.

EXAMPLES stacks, each merged by all strategies that fit: more than 500 merges in `make soak`.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from snapchain.errors import Unsupported
from snapchain.merge import run as merge_run, step as merge_plan
from snapchain.merge.request import MergeRequest
from snapchain.model.merging import Strategy
from tests.exhaustive import examples
from tests.image.mounts import mounted
from tests.image.test_scan_random import Layer, layers
from tests.memory import scratch
from tests.merge.test_assemble import build, growable
from tests.ops.stacks import clean, flat, names, same

SHM = scratch()
EXAMPLES = examples(16, times=16)
WAYS = (Strategy.NEW, Strategy.ABSORB, Strategy.COMMIT)
merges: Counter[Strategy] = Counter()


@st.composite
def stacks(draw: st.DrawFn) -> tuple[list[Layer], str, int, int]:
    """Layers, the kind of root below them, and the range to merge, counted with the root."""
    found = [
        replace(growable(layer), snapshot=False, bitmap=False)
        for layer in draw(st.lists(layers(), min_size=2, max_size=4))
    ]
    if draw(st.integers(0, 3)):
        # As disks mostly are; commit needs it.
        size = max(layer.size + layer.grown for layer in found)
        found = [replace(layer, size=size, grown=0, squeezed=whole(layer)) for layer in found]
    root = draw(st.sampled_from(["none", "none", "raw", "compressed"]))
    count = len(found) + (root != "none")
    last = draw(st.integers(1, count - 1))
    return found, root, draw(st.integers(0, last - 1)), last


def whole(layer: Layer) -> list[str]:
    """Its compressed clusters but one that the end cuts: elsewhere QEMU only takes whole ones."""
    return [command for command in layer.squeezed if command.split()[-1] == layer.options["cluster_size"]]


def merged_by_every_strategy(
    stack: tuple[list[Layer], str, int, int],
    data: st.DataObject,
    directory: Path,
    ways: tuple[Strategy, ...],
    *,
    change: Callable[[Path], None] = lambda _path: None,
) -> None:
    """change: what befalls each file once it is made; copies keep the holes that it makes."""
    found, root, first, last = stack
    pristine = directory / "pristine"
    pristine.mkdir()
    built = build(found, root, pristine, data)
    for path in built:
        change(path)
    shown = {number: flat(built[number], directory / f"{number}.flat") for number in {last, len(built) - 1}}
    for way in ways:
        work = directory / "work"
        subprocess.run(["cp", "-r", "--sparse=always", pristine, work], check=True)
        paths = [work / path.name for path in built]
        try:
            plan = merge_plan.plan_step(
                MergeRequest(
                    image=paths[-1],
                    from_layer=str(paths[first]),
                    to_layer=str(paths[last]),
                    strategy=way,
                    image_format="qcow2",
                )
            )
        except Unsupported:
            assert way is not Strategy.NEW
        else:
            report = merge_run.run_step(plan)
            merges[way] += 1
            assert report.strategy is way
            gone = {path.name for path in built[first:last]}
            assert names(work) == [name for name in names(pristine) if name not in gone], way
            for number, view in shown.items():
                assert same(paths[number], view), (way, number)
            assert clean(paths[last]), way
        shutil.rmtree(work)


@pytest.mark.sampled
def test_random_stacks() -> None:
    @settings(max_examples=EXAMPLES)
    @given(stack=stacks(), data=st.data())
    def merged(stack: tuple[list[Layer], str, int, int], data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory(dir=SHM) as name:
            merged_by_every_strategy(stack, data, Path(name), WAYS)

    merges.clear()
    merged()
    print(merges)
    assert merges[Strategy.NEW] >= EXAMPLES
    assert merges[Strategy.ABSORB] >= EXAMPLES // 3
    assert merges[Strategy.COMMIT] >= EXAMPLES // 12


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def filesystem(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(request.param, tmp_path_factory.mktemp("mounts")) as place:
        yield place


@pytest.mark.root
@pytest.mark.serial
@pytest.mark.sampled
@settings(max_examples=examples(5))
@given(stack=stacks(), data=st.data())
def test_random_stacks_where_extents_are_shared(
    filesystem: Path, stack: tuple[list[Layer], str, int, int], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory(dir=filesystem) as name:
        merged_by_every_strategy(stack, data, Path(name), WAYS)
