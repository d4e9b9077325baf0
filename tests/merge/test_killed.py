"""Killed anywhere in a set of merges: every view that stays reads as before, and the same command ends it."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from snapchain.merge import plan as planning, run as merge_run
from snapchain.merge.request import MergeRequest
from snapchain.model.retention import Policy
from snapchain.source.notes import Hold, Notes
from tests.ops.killing import killed_at_every_step
from tests.ops.stacks import Layer, build, flat, names, same


@pytest.mark.sampled
def test_killed_at_every_step(tmp_path: Path) -> None:
    directory, pristine = tmp_path / "vm", tmp_path / "pristine"
    chain = build(directory, [Layer(writes=[f"write -P {n + 1} {n * 64}k 128k"]) for n in range(7)])
    for path in chain:
        flat(path, tmp_path / f"{path.name}.raw")
    held = Hold(tag="audit", since=datetime.now(UTC))
    Notes().change(chain[3], lambda note: note.model_copy(update={"holds": (held,)}))
    shutil.copytree(directory, pristine)
    request = MergeRequest(image=chain[-1], policy=Policy(last=1))

    def merge() -> None:
        merge_run.run(planning.plan(request))

    deaths = 0
    for where in killed_at_every_step(merge, each=5):
        deaths += 1
        assert same(chain[-1], tmp_path / "disk.qcow2.raw"), where
        merge()
        assert names(directory) == ["0.qcow2", "2.qcow2", "3.qcow2", "5.qcow2", "disk.qcow2"], where
        for name in names(directory):
            assert same(directory / name, tmp_path / f"{name}.raw"), (where, name)
        shutil.rmtree(directory)
        shutil.copytree(pristine, directory)
    assert deaths >= 4
