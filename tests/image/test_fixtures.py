"""Every fixture against the parser: legal images read as QEMU reads them, the others are refused as the table says."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fixtures.build import FIXTURES, tables
from fixtures.fixture import Fixture, Stage
from snapchain.errors import Corrupt, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.image import ImageChain, scan
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents
from snapchain.testing import qemu_img
from tests.image.oracle import assert_only_holes_differ

MiB = 1 << 20
LEGAL = [fixture for fixture in FIXTURES if not fixture.expect.exit_code]
BAD = [fixture for fixture in FIXTURES if fixture.expect.exit_code]
SMALL = 16 * MiB


def named(fixture: Fixture) -> str:
    return fixture.name


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)  # 163 directories of images are too much to keep for three runs


def formats(fixture: Fixture) -> tuple[qemu_img.Format, qemu_img.Format]:
    return ("raw" if fixture.image.endswith(".raw") else "qcow2", "raw")


def view(chain: ImageChain) -> bytearray:
    data = bytearray(chain.size)
    chain.read_into(0, memoryview(data))
    return data


def as_qemu_maps(entries: list[qemu_img.MapEntry], size: int) -> Extents:
    """`present` is not ABSENT; `data` that reads as zeroes is a hole in the file, but allocated."""
    runs = [
        (entry.start, min(entry.length, size - entry.start), ZERO if entry.zero and not entry.data else DATA)
        for entry in entries
        if entry.present and entry.start < size
    ]
    return Extents.from_runs(size, runs)


@pytest.mark.parametrize("fixture", LEGAL, ids=named)
def test_legal_images_read_as_qemu_reads_them(fixture: Fixture, made: Path) -> None:
    path = fixture.make(made)
    with scan(path, format=fixture.image_format) as chain:
        size = qemu_img.info(path, formats(fixture)[0]).virtual_size
        # Of a raw file QEMU counts the last sector whole.
        assert chain.size == size or -(-chain.size // 512) * 512 == size
        if chain.size > SMALL:
            assert chain.resolve().data_bytes <= SMALL
            return
        flat = made / "flat.raw"
        given = ["-f", formats(fixture)[0], "-O", "raw", str(path), str(flat)]
        subprocess.run(["qemu-img", "convert", *given], check=True)  # unlike qemu_img.convert, without an fsync
        assert view(chain) == flat.read_bytes()[: chain.size]


@pytest.mark.parametrize("fixture", [f for f in LEGAL if f.image.endswith(".qcow2")], ids=named)
def test_the_map_of_each_layer_alone_is_that_of_qemu_img(fixture: Fixture, made: Path) -> None:
    path = fixture.make(made)
    with scan(path) as chain:
        for file in chain.files:
            if file.format != "qcow2" or file.size > 1 << 40:
                continue
            theirs = as_qemu_maps(qemu_img.map_alone(file.path, "qcow2"), file.size)
            # A root's zero clusters read as what is absent there, and QEMU says so of neither.
            told = file.physical.extents()
            assert told.mapped(np.clip(told.val, ABSENT, DATA)) == theirs, file.path.name
            assert_only_holes_differ(file)


def refusal(path: Path, fixture: Fixture) -> SnapchainError | None:
    try:
        chain = scan(path, format=fixture.image_format)
    except SnapchainError as error:
        return error if fixture.expect.stage is Stage.SCAN else None
    with chain:
        try:
            view(chain)
        except SnapchainError as error:
            return error if fixture.expect.stage is Stage.READ else None
    return None


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Of the processor: the machine may be busy with other things."""
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


@pytest.mark.parametrize("fixture", BAD, ids=named)
def test_bad_images_are_refused_by_name(fixture: Fixture, made: Path) -> None:
    path = fixture.make(made)
    before = {entry: entry.lstat() for entry in made.rglob("*")}
    with bounded(2):
        error = refusal(path, fixture)
    assert error is not None, "was accepted"
    said = f"{error} {error.hint or ''}"
    assert error.exit_code == fixture.expect.exit_code, said
    assert re.search(fixture.expect.word, said, re.IGNORECASE), said
    # The file at fault is named: the image itself, or a file of its chain.
    assert Path(error.subject or "").is_relative_to(made), error.subject
    after = {entry: entry.lstat() for entry in made.rglob("*")}
    assert {entry: (status.st_mtime_ns, status.st_size) for entry, status in before.items()} == {
        entry: (status.st_mtime_ns, status.st_size) for entry, status in after.items()
    }


def test_no_descriptor_is_left_by_refused_images(made: Path) -> None:
    refused = [fixture for fixture in BAD if fixture.expect.stage is Stage.SCAN]
    paths = [fixture.make(made) for fixture in refused]
    kinds = {kind.exit_code: kind for kind in (Corrupt, InvalidInput, NotFound, Unsupported)}
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for fixture, path in zip(refused, paths, strict=True):
        with pytest.raises(kinds[fixture.expect.exit_code]) as caught:
            scan(path)
        assert caught.value.subject is not None
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_the_largest_table_costs_little_memory(made: Path) -> None:
    path = next(fixture for fixture in LEGAL if fixture.name == "l1-32m").make(made)
    pid = os.fork()
    if pid == 0:
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with scan(path) as chain:
            assert chain.size == 1 << 51
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
        os._exit(0 if grown < 150 * 1024 else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_names_are_unique_and_the_readme_lists_them_all() -> None:
    names = [fixture.name for fixture in FIXTURES]
    assert len(set(names)) == len(names)
    readme = (Path(__file__).resolve().parents[2] / "fixtures" / "README.md").read_text()
    assert tables().strip() in readme, "run fixtures/build.py --readme"
