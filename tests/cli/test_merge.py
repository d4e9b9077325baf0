"""snapchain merge IMAGE by rules, as a user says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run, qemu_img, write


@pytest.fixture
def stack(run: Run, disk: Path, tmp_path: Path) -> Path:
    """The disk with five sealed layers, the first four of them shipped; one is labelled."""
    assert run("init", "repo").status == 0
    for number in range(1, 6):
        assert run("snapshot", str(disk), "--label", f"l{number}").status == 0
        write(disk, f"write -P {number + 2} {number * 64}k 128k")
        if number == 4:
            assert run("ship", "web1.4.qcow2", "repo::web1").status == 0
    qemu_img("convert", "-f", "qcow2", "-O", "raw", disk, tmp_path / "truth.raw")
    return disk


def test_rules_and_destinations(run: Run, stack: Path, tmp_path: Path) -> None:
    words = ["merge", str(stack), "--keep-label", "l3", "--at", "repo::web1"]
    said = run(*words, "--dry-run")
    assert said.status == 0
    for expected in ("would make 5 layers of 6", "label l3", "newest at repo::web1", "not at repo::web1", "root"):
        assert expected in said.out
    plan = run(*words, "--dry-run", "--json").json["plan"]
    assert [(each["first"], each["last"], each["requests"]) for each in plan["merges"]] == [(1, 2, 0)]
    assert {"data_bytes", "shadowed_bytes", "holds", "at", "stays", "sealed"} <= plan["layers"][0].keys()
    assert {"bytes_to_move", "bytes_to_free", "needs_bytes", "strategy", "seconds"} <= plan["merges"][0].keys()
    assert "plans" not in plan
    done = run(*words, "--json").json
    assert (done["layers_before"], done["layers_after"], len(done["merges"])) == (6, 5, 1)
    assert done["failed"] == []
    qemu_img("compare", "-f", "raw", "-F", "qcow2", tmp_path / "truth.raw", stack)
    assert run("merge", str(stack), "--keep-label", "l3", "--at", "repo::web1", "--json").json["strategy"] == "nothing"


def test_a_held_layer(run: Run, stack: Path, tmp_path: Path) -> None:
    assert run("hold", "web1.3.qcow2", "--tag", "audit").status == 0
    refused = run("merge", str(stack))
    assert (refused.status, "held under 'audit'" in refused.err, "snapchain release" in refused.err) == (4, True, True)
    assert "held: audit" in run("merge", str(stack), "--max-layers", "5", "--dry-run").out
    said = run("merge", str(stack), "--max-layers", "2")
    assert (said.status, "4 layers are left, not 2" in said.err) == (0, True)
    assert {"web1.1.qcow2", "web1.3.qcow2"} <= {path.name for path in tmp_path.iterdir()}
    assert run("release", "web1.3.qcow2", "--tag", "audit").status == 0
    assert run("merge", str(stack), "--max-layers", "2", "--json").json["layers_after"] == 2
    qemu_img("compare", "-f", "raw", "-F", "qcow2", tmp_path / "truth.raw", stack)


def test_budgets(run: Run, stack: Path) -> None:
    assert "nothing to merge" in run("merge", str(stack), "--budget-seconds", "0", "--dry-run").out
    said = run("merge", str(stack), "--budget-bytes", "10G", "--budget-seconds", "3600", "--json")
    assert said.json["layers_after"] == 2


def test_what_was_not_merged_is_told(run: Run, stack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapchain.errors import NotFound
    from snapchain.merge import run as merge_run
    from snapchain.merge.step import MergeStep

    real = merge_run.run_step

    def failing(planned: MergeStep, **more: Any) -> merge_run.StepReport:
        if planned.first == 1:
            raise NotFound("somebody took it")
        return real(planned, **more)

    monkeypatch.setattr(merge_run, "run_step", failing)
    said = run("merge", str(stack), "--keep-label", "l3", "--keep-last", "1", "--json")
    assert said.status == 10
    assert [each["kind"] for each in json.loads(said.out)["failed"]] == ["not-found"]
    assert len(said.json["merges"]) == 1
