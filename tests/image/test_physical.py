"""The builder of runs against a list of cells, and raw files against QEMU and the kernel."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from snapchain.errors import Unsupported
from snapchain.image import scan
from snapchain.image.physical import Physical, PhysicalBuilder, RunBudget, Runs
from snapchain.model.extents import ABSENT, DATA, ZERO
from tests.image.oracle import assert_as_qemu, our_bytes

KiB = 1 << 10
MiB = 1 << 20

Cell = tuple[int, int, int]  # kind, host, stored


@st.composite
def cells(draw: st.DrawFn) -> list[Cell]:
    """Guest cells of 10 bytes; hosts that often continue each other."""
    found: list[Cell] = []
    host = 0
    for _ in range(draw(st.integers(1, 40))):
        kind = draw(st.sampled_from([ABSENT, ZERO, DATA, DATA]))
        stored = draw(st.sampled_from([0, 0, 7])) if kind == DATA else 0
        host = draw(st.sampled_from([host + 10, host + 10, host + 500]))
        found.append((kind, host if kind == DATA else -1, stored))
    return found


def columns(physical: Physical) -> list[tuple[int, int, int, int]]:
    return list(
        zip(
            physical.start.tolist(),
            physical.kind.tolist(),
            physical.host.tolist(),
            physical.stored.tolist(),
            strict=True,
        )
    )


@given(cells(), st.lists(st.integers(0, 40), max_size=5), st.integers(0, 25))
def test_runs_added_in_batches_are_the_cells(given_cells: list[Cell], cuts: list[int], tail: int) -> None:
    size = 10 * len(given_cells) + tail
    builder = PhysicalBuilder(size, budget=RunBudget(), subject="x")
    edges = sorted({0, len(given_cells), *(cut for cut in cuts if cut < len(given_cells))})
    for first, last in pairwise(edges):
        held = [(n, *given_cells[n]) for n in range(first, last) if given_cells[n][0] != ABSENT]
        rows = np.array(held, np.int64).reshape(-1, 4)
        start = rows[:, 0] * 10
        builder.add(Runs(start, start + 10, rows[:, 1].astype(np.int8), rows[:, 2], rows[:, 3].astype(np.int32)))
    expected: list[tuple[int, int, int, int]] = []
    for number, (kind, host, stored) in enumerate([*given_cells, *([(ABSENT, -1, 0)] if tail else [])]):
        if expected:
            began, last_kind, last_host, last_stored = expected[-1]
            follows = kind != DATA or last_host + number * 10 - began == host
            if kind == last_kind and not stored and not last_stored and follows:
                continue
        expected.append((number * 10, kind, host, stored))
    physical = builder.finish()
    assert columns(physical) == expected
    extents = physical.extents()
    assert extents.from_starts(size, extents.at, extents.val) == extents
    assert [extents.at_offset(10 * n) for n in range(len(given_cells))] == [kind for kind, _, _ in given_cells]


def test_the_budget_counts_every_run_of_a_chain() -> None:
    budget = RunBudget(10)
    budget.spend(10, subject="x")
    budget.grant(2 * RunBudget.BYTES_PER_RUN)
    budget.spend(2, subject="x")
    with pytest.raises(Unsupported, match="too many extents"):
        budget.spend(1, subject="x")


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 70_000, 3 * MiB + 5])
def test_raw_files_of_any_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(range(1, 252)) * (size // 251) + b"z" * (size % 251))
    with scan(path) as chain:
        assert chain.size == -(-size // 512) * 512
        assert chain.top.cluster_size == 0
        assert chain.top.grain == 512
        assert_as_qemu(chain, tmp_path)


def test_holes_of_a_raw_file_are_zero(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        for offset in (MiB, 2 * MiB + 64 * KiB, 5 * MiB):
            file.seek(offset)
            file.write(b"data" * 16384)
        file.truncate(8 * MiB + 3)
    with scan(path) as chain:
        runs = list(chain.resolve().runs())
        assert runs[:2] == [(0, MiB, ZERO), (MiB, 64 * KiB, DATA)]
        assert runs[-1][2] == ZERO
        assert chain.resolve().data_bytes == 192 * KiB
        assert_as_qemu(chain, tmp_path)


def test_a_sparse_file_of_terabytes_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.touch()
    os.truncate(path, 12 << 40)
    with scan(path) as chain:
        assert chain.size == 12 << 40
        assert list(chain.resolve().runs()) == [(0, 12 << 40, ZERO)]


@pytest.fixture
def loop_device() -> Iterator[str]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(MiB))
        file.truncate(3 * MiB)
        file.flush()
        attached = subprocess.run(
            ["losetup", "--find", "--show", file.name], check=False, capture_output=True, text=True
        )
        if attached.returncode:
            pytest.skip(f"no loop device: {attached.stderr.strip()}")
        device = attached.stdout.strip()
        try:
            yield device
        finally:
            subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.root
@pytest.mark.serial
def test_a_block_device_is_a_raw_root(tmp_path: Path, loop_device: str) -> None:
    top = tmp_path / "disk.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", loop_device, "-F", "raw", str(top)]
    subprocess.run(create, check=True)
    with pytest.raises(Unsupported, match="outside the directories"):
        scan(top)
    with scan(top, image_dirs=[Path("/dev")]) as chain, scan(loop_device) as alone:
        assert chain.size == alone.size == 3 * MiB
        assert alone.top.format == "raw"
        assert alone.top.extents.data_bytes > 0
        assert our_bytes(chain).tobytes() == Path(loop_device).read_bytes()
        assert not chain.changed()
