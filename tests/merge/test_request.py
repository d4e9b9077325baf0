"""One request, whoever makes it; and the JSON of plans and reports has the fields that version 0.1 had."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from snapchain.destination.records import PointDecision, PointsMergePlan, PointsMergeReport
from snapchain.merge import MergeRequest
from snapchain.merge.plan import plan
from snapchain.merge.run import run
from snapchain.merge.step import plan_step
from snapchain.model.merging import MergeRow, Strategy
from snapchain.model.retention import Policy
from tests.ops.stacks import Layer, build

PLAN = {
    "image", "strategy", "layers_before", "layers_after", "bytes_to_move", "shadowed_bytes", "needs_bytes",
    "free_bytes", "seconds", "requests", "layers", "merges", "notices", "unfinished",
}  # fmt: skip
LAYER = {
    "path", "virtual_size", "data_bytes", "shadowed_bytes", "sealed", "labels", "holds", "at", "stays", "merge",
}  # fmt: skip
MERGE = {
    "layers", "first", "last", "result", "strategy", "cluster_size", "shares_extents", "bytes_to_move",
    "bytes_to_free", "needs_bytes", "seconds", "requests", "held_bytes", "shadowed_bytes", "remove", "keep",
}  # fmt: skip
REPORT = {
    "image", "result", "strategy", "layers_before", "layers_after", "bytes_moved", "bytes_freed", "seconds",
    "requests", "removed", "kept", "finished", "merges", "failed", "incomplete",
}  # fmt: skip
MERGED = {
    "image", "result", "strategy", "layers_before", "layers_after", "bytes_moved", "bytes_freed", "removed", "kept",
    "finished", "incomplete",
}  # fmt: skip
IN_A_REPOSITORY = {"destination", "disk", "points", "merges", "layers_before", "layers_after", "requests"}
AT_A_REPLICA = {
    "destination", "disk", "points", "merges", "staying", "layers_before", "layers_after", "strategy",
    "bytes_to_move", "shadowed_bytes", "needs_bytes", "free_bytes",
}  # fmt: skip


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    return build(tmp_path / "vm", [Layer(writes=[f"write -P {n + 1} {n * 64}k 128k"]) for n in range(4)])


def test_the_json_of_a_chain(chain: list[Path]) -> None:
    planned = plan(MergeRequest(image=chain[-1]))
    shown = planned.model_dump(mode="json")
    assert shown.keys() == PLAN
    assert [each.keys() for each in shown["layers"]] == [LAYER] * 4
    assert [each.keys() for each in shown["merges"]] == [MERGE]
    done = run(planned).model_dump(mode="json")
    assert done.keys() == REPORT
    assert [each.keys() for each in done["merges"]] == [MERGED]


def test_the_json_of_a_disk_at_a_destination() -> None:
    now = datetime.now(UTC)
    decision = PointDecision(point=1, time=now, labels=(), kept=True, reasons=("newest",))
    planned = PointsMergePlan(
        destination="/r",
        disk="d",
        points=(decision,),
        merges=(("a", "b"),),
        layers_before=2,
        layers_after=1,
        strategy="x",
    )
    assert planned.model_dump(mode="json").keys() >= IN_A_REPOSITORY | AT_A_REPLICA
    assert planned.model_dump(mode="json")["merges"] == [["a", "b"]]
    assert PointsMergeReport.model_fields.keys() >= {"bytes_dropped", "findings", "merges", "staying", "bytes_freed"}


def test_every_plan_shows_its_merges_alike(chain: list[Path]) -> None:
    planned = plan(MergeRequest(image=chain[-1], strategy=Strategy.NEW))
    (row,) = planned.rows
    assert row == MergeRow(
        layers=tuple(path.name for path in chain[1:]),
        method="new-file",
        bytes_to_move=planned.bytes_to_move,
        bytes_to_free=planned.shadowed_bytes,
        needs_bytes=planned.needs_bytes,
        seconds=planned.seconds,
        shares_extents=row.shares_extents,
    )


def test_a_step_decides_the_same_again(chain: list[Path]) -> None:
    """What a step keeps of its request names the range and the strategy, and no rule."""
    request = MergeRequest(image=chain[-1], policy=Policy(last=1), max_layers=3, drop_bitmaps=True)
    step = plan(request).steps[0]
    assert (step.request.policy, step.request.max_layers, step.request.strategy) == (Policy(), None, step.strategy)
    assert step.request.drop_bitmaps
    again = plan_step(step.request)
    assert step.is_still(again)
    assert again.request == step.request
    assert not step.is_still(replace(again, remove=()))
