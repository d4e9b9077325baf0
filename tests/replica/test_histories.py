"""Random histories of disks at a replica; `python -m tests.replica.histories 0 150` for more of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from snapchain.merge import run as merge_run, step as merge_plan
from snapchain.merge.request import MergeRequest
from tests.exhaustive import examples
from tests.ops.stacks import Layer, build, flat
from tests.replica.conftest import Place
from tests.replica.histories import KiB, MiB, content_of, live

COUNT = examples(5, times=18)
GROUPS = examples(1, times=3)
happened: Counter[str] = Counter()


@pytest.mark.sampled
@pytest.mark.parametrize("group", range(GROUPS))
def test_histories(group: int) -> None:
    total: Counter[str] = Counter()
    for seed in range(group * COUNT // GROUPS, (group + 1) * COUNT // GROUPS):
        total += live(seed)
    assert total["points"] >= COUNT // GROUPS
    assert total["merged"]
    assert total["cut"]


@pytest.mark.parametrize("head", ["data", "zero"])
@pytest.mark.parametrize("own", ["", "write -P 9 0 4k"])
def test_a_shorter_layer_ends_inside_a_leaf(place: Place, tmp_path: Path, head: str, own: str) -> None:
    """What it cuts off the leaf in which it ends is counted, though nobody shows it any more."""
    writes = ["write -P 1 100k 20k"] if head == "zero" else ["write -P 1 60k 60k"]
    longer, shorter = 128 * KiB, 96 * KiB
    chain = build(
        tmp_path / "c",
        [
            Layer(longer, writes, "cluster_size=4k"),
            Layer(shorter, [own] if own else [], "cluster_size=4k"),
            Layer(longer, ["write -P 3 8k 4k"], "cluster_size=4k"),
        ],
    )
    for number, path in enumerate(chain):
        place.send(path)
        shown = flat(path, tmp_path / "shown")
        place.check(shown)
        assert place.catalogue()["points"][number]["content_id"] == content_of(shown)


def test_a_root_that_was_merged_goes_on_what_the_replica_has_of_it(place: Place, tmp_path: Path) -> None:
    """It says nothing where it reads as zero, and a layer there does."""
    chain = build(
        tmp_path / "c",
        [Layer(MiB, ["write -P 1 0 512k"]), Layer(MiB, ["write -z 0 256k"]), Layer(MiB, ["write -P 3 640k 64k"])],
    )
    place.send(chain[0])
    merge_run.run_step(merge_plan.plan_step(MergeRequest(image=chain[2], flatten=True, image_format="qcow2")))
    place.send(chain[2])
    place.check(flat(chain[2], tmp_path / "shown"))
    assert place.send(chain[2]).layers_sent == 0
