"""A disk that acknowledges a write and loses it: a merge in place reads what is there before it believes in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from snapchain.errors import Corrupt
from snapchain.host.batches import Buffer
from snapchain.merge import run as merge_run, step as merge_plan
from snapchain.merge.amendment.write import Disk
from snapchain.merge.request import MergeRequest
from snapchain.model.merging import Strategy
from tests.ops.stacks import Layer, build, clean, flat, same

KiB = 1 << 10
SIZE = 256 * KiB
WRITES = ["write -P 2 10k 20k", "write -P 3 100k 8k"], ["write -P 4 20k 9k", "write -z 104k 4k", "write -P 5 200k 4k"]


class Losing:
    """Numbers the writes of tables, and drops one of them unless the bytes are there already."""

    def __init__(self, number: int, patch: pytest.MonkeyPatch) -> None:
        self.count, self.lost = 0, False
        real = Disk.write

        def write(disk: Disk, data: Buffer, offset: int) -> None:
            self.count += 1
            if self.count == number and os.pread(disk.fd, len(bytes(data)), offset) != bytes(data):
                self.lost = True
            else:
                real(disk, data, offset)

        patch.setattr(Disk, "write", write)


# The second kind needs new blocks, and a new table, for its reference counts.
@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=512,refcount_bits=64"])
@pytest.mark.parametrize("strategy", [Strategy.ABSORB, Strategy.COMMIT])
def test_whichever_write_is_lost(
    strategy: Strategy, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [Layer(SIZE, ["write -P 1 0 256k"], options), *(Layer(SIZE, writes, options) for writes in WRITES)]
    pristine = build(tmp_path / "pristine", layers)
    reference = flat(pristine[-1], tmp_path / "flat")
    top = tmp_path / "vm" / "disk.qcow2"

    def merged(number: int) -> Losing:
        """One merge of a fresh copy. Raises Corrupt where it noticed."""
        shutil.rmtree(top.parent, ignore_errors=True)
        shutil.copytree(tmp_path / "pristine", top.parent)
        with monkeypatch.context() as patch:
            losing = Losing(number, patch)
            merge_run.run_step(merge_plan.plan_step(MergeRequest(image=top, strategy=strategy)))
        return losing

    noticed = 0
    for number in range(1, merged(0).count + 1):
        try:
            losing = merged(number)
        except Corrupt as error:
            assert error.subject in {str(top), str(top.with_name("1.qcow2"))}, error  # noqa: PT017
            noticed += 1
        else:
            assert not losing.lost, number
            assert clean(top), number
        assert same(top, reference), number
    assert noticed >= 3
