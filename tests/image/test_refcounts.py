"""Reference counts: ours are those of `qemu-img check`, on whatever QEMU itself makes."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from snapchain.errors import Corrupt
from snapchain.image.qcow2.header import read_header
from snapchain.image.qcow2.refcounts import Refcounts, pack_counts, refcount_table, refcounts, unpack_counts
from snapchain.image.qcow2.tables import ImageFd
from tests.image.oracle import qemu
from tests.image.test_scan_random import Layer, io, layers, make
from tests.merge.test_assemble import SHM, growable

WIDTHS = [1, 2, 4, 8, 16, 32, 64]


def image(path: Path, fd: int) -> ImageFd:
    return ImageFd(fd, path.stat().st_size, read_header(fd, subject=path), path)


def found(path: Path) -> Refcounts:
    fd = os.open(path, os.O_RDONLY)
    try:
        return refcounts(image(path, fd))
    finally:
        os.close(fd)


def theirs(path: Path) -> tuple[int, int]:
    """(leaks, errors) as QEMU counts them."""
    said = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", "--output=json", path], capture_output=True, text=True, check=False
    )
    report = json.loads(said.stdout)
    return report.get("leaks", 0), report.get("corruptions", 0)


@settings(max_examples=40)
@given(layers())
def test_images_of_qemu_are_exact(layer: Layer) -> None:
    with tempfile.TemporaryDirectory(dir=SHM) as name:
        path = Path(name) / "a.qcow2"
        make(replace(growable(layer), snapshot=False), path, None, "")
        counts = found(path)
        assert (counts.leaks, counts.errors) == (0, 0) == theirs(path)
        assert counts.counted.any()


@pytest.mark.parametrize("bits", WIDTHS)
def test_leaks_and_errors_are_counted_as_qemu_does(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size=4096,refcount_bits={bits}", path, "4M")
    io(path, ["write -P 1 0 1M", "discard 64k 64k"])
    assert (found(path).leaks, found(path).errors) == (0, 0) == theirs(path)
    fd = os.open(path, os.O_RDWR)
    (block,) = struct.unpack(">Q", os.pread(fd, 8, read_header(fd, subject=path).fields.refcount_table_offset))
    counts = unpack_counts(os.pread(fd, 4096, block), bits)
    free = np.flatnonzero(counts[: path.stat().st_size // 4096] == 0)[:3]
    counts[free] = 1
    counts[[40, 41]] = 0
    os.pwrite(fd, pack_counts(counts, bits), block)
    os.close(fd)
    assert len(free) == 3
    # An entry that says "copied" of a cluster without a count is one more for QEMU each.
    assert (found(path).leaks, found(path).errors) == (3, 2)
    assert theirs(path)[0] == 3
    assert theirs(path)[1] >= 2


@pytest.mark.parametrize("bits", WIDTHS)
@given(data=st.data())
def test_counts_of_every_width_come_back(bits: int, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=64, max_size=64))
    packed = pack_counts(np.array(counts, np.uint64), bits)
    assert len(packed) == 8 * bits
    assert unpack_counts(packed, bits).tolist() == counts


def test_bitmaps_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "64M")
    for name in ("one", "another"):
        qemu("qemu-img", "bitmap", "-f", "qcow2", "--add", "-g", "512", path, name)
    io(path, ["write -P 1 0 1M", "write -P 1 40M 1M"])
    counts = found(path)
    assert (counts.leaks, counts.errors) == (0, 0) == theirs(path)


def test_counts_behind_the_end_are_leaks(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    io(path, ["write -P 1 0 1M"])
    length = path.stat().st_size
    fd = os.open(path, os.O_RDWR)
    block = int(refcount_table(image(path, fd))[0])
    os.pwrite(fd, b"\0\1", block + 2 * (length // 65536 + 5))
    os.close(fd)
    assert found(path).leaks == 1


def test_tables_outside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    io(path, ["write -P 1 0 1M"])
    fd = os.open(path, os.O_RDWR)
    (l2,) = struct.unpack(">Q", os.pread(fd, 8, read_header(fd, subject=path).fields.l1_table_offset))
    os.pwrite(fd, struct.pack(">Q", 1 << 63 | 1 << 40), l2 & ~(1 << 63))
    os.close(fd)
    with pytest.raises(Corrupt, match="cluster 16777216 is used, but the file has"):
        found(path)
