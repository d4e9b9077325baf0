"""A file that is being written shows what it will show, and knows the finished file again."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from snapchain.image import Backing, scan
from snapchain.image.qcow2.layout import plan
from snapchain.image.qcow2.write import Qcow2Writer
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents
from snapchain.replica.arrival import GrowingFile
from tests.ops.stacks import qemu_img

KiB = 1 << 10


def some_extents(draw: random.Random, *, grain: int, count: int, tail: int) -> Extents:
    kinds = [draw.choice((ABSENT, ZERO, DATA)) for _ in range(count)]
    import numpy as np

    at = np.arange(count, dtype=np.int64) * grain
    size = count * grain - tail
    return Extents.from_starts(size, at, np.array(kinds, np.int64))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("extended", [False, True])
def test_it_reads_as_the_file_that_it_becomes(tmp_path: Path, seed: int, *, extended: bool) -> None:
    draw = random.Random(seed)
    cluster = 64 * KiB if extended else 4 * KiB
    grain = cluster // 32 if extended else cluster
    extents = some_extents(draw, grain=grain, count=300, tail=512 if seed % 2 else 0)
    path = tmp_path / "a.qcow2"
    backing = None
    if seed % 3:
        qemu_img("create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", str(extents.size))
        backing = Backing("base.qcow2", "qcow2")
    layout = plan(extents, cluster_size=cluster, extended_l2=extended, backing=backing)
    with path.open("x+b") as file:
        writer = Qcow2Writer(file.fileno(), layout)
        writer.begin()
        with GrowingFile(path, file.fileno(), layout) as growing:
            seen: dict[int, bytes] = {}
            for start, length, kind in growing.extents.runs():
                if kind == DATA:
                    seen[start] = draw.randbytes(length)
                    writer.write(start, seen[start])
                if kind != ABSENT:
                    got = bytearray(length)
                    growing.read_into(start, memoryview(got))
                    assert got == seen.get(start, bytes(length))
            writer.finish()
            with scan(path, format="qcow2") as finished:
                assert finished.top.extents == growing.extents
                assert growing.became(finished.top)


def test_it_does_not_know_a_file_whose_tables_lead_elsewhere(tmp_path: Path) -> None:
    draw = random.Random(1)
    extents = some_extents(draw, grain=64 * KiB, count=40, tail=0)
    other = some_extents(draw, grain=64 * KiB, count=40, tail=0)
    path, copy = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    for name, map_ in ((path, extents), (copy, other)):
        with name.open("x+b") as file, Qcow2Writer(file.fileno(), plan(map_, cluster_size=64 * KiB)):
            pass
    with path.open("r+b") as file, GrowingFile(path, file.fileno(), plan(extents, cluster_size=64 * KiB)) as growing:
        with scan(path, format="qcow2") as finished:
            assert growing.became(finished.top)
        with scan(copy, format="qcow2") as finished:
            assert not growing.became(finished.top)
        raw = bytearray(path.read_bytes())
        layout = plan(extents, cluster_size=64 * KiB)
        first, second = layout.l2_offset, layout.l2_offset + 8
        entries = [at for at in range(first, first + 40 * 8, 8) if any(raw[at : at + 8])]
        assert second <= entries[-1]
        one, two = entries[0], entries[1]
        raw[one : one + 8], raw[two : two + 8] = raw[two : two + 8], raw[one : one + 8]
        os.pwrite(file.fileno(), raw[first : first + 40 * 8], first)
        with scan(path, format="qcow2") as bent:
            assert not growing.became(bent.top)
