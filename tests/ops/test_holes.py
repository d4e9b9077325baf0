"""Clusters of which the file stores nothing are zeroes: in maps, in what is read of them, and after every merge."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from snapchain.image import holes, scan
from snapchain.image.physical import Physical
from snapchain.model.extents import ABSENT, DATA, ZERO
from snapchain.ops.inspect import inspect_image
from tests.image.oracle import assert_only_holes_differ, our_bytes, their_bytes
from tests.image.test_scan_random import Layer
from tests.merge.test_merge_random import SHM, WAYS, merged_by_every_strategy, stacks
from tests.ops.shipping import MiB, ship
from tests.ops.stacks import qemu_img, write
from tests.repository.synthetic import repository

PUNCH = ["fallocate", "--punch-hole", "--keep-size"]


def punched(path: Path, draw: random.Random) -> None:
    """Holes of any length in half of the plain data of an image; what they held reads as zeroes from here on."""
    with scan(path, image_dirs=[path.parent]) as chain:
        physical = chain.top.physical
        runs = np.flatnonzero((physical.kind == DATA) & (physical.stored == 0)).tolist()
        ranges = [(int(physical.host[run]), int(physical.ends[run] - physical.start[run])) for run in runs]
    for host, length in ranges:
        if draw.random() < 0.5:
            skip = draw.randrange(0, length, 512) if draw.random() < 0.5 else 0
            size = draw.randint(1, length - skip)
            subprocess.run([*PUNCH, "-o", str(host + skip), "-l", str(size), path], check=True)


@pytest.mark.timeout(600)
@settings(max_examples=10)
@given(stack=stacks(), data=st.data(), seed=st.integers(0, 1 << 32))
def test_holes_read_as_zeroes_and_are_merged_as_zeroes(
    stack: tuple[list[Layer], str, int, int], data: st.DataObject, seed: int
) -> None:
    draw = random.Random(seed)

    def change(path: Path) -> None:
        punched(path, draw)
        with scan(path, image_dirs=[path.parent]) as chain, tempfile.TemporaryDirectory(dir=SHM) as scratch:
            assert_only_holes_differ(chain.top)
            assert np.array_equal(our_bytes(chain), their_bytes(path, chain.top.format, Path(scratch)))

    with tempfile.TemporaryDirectory(dir=SHM) as name:
        merged_by_every_strategy(stack, data, Path(name), WAYS, change=change)


@pytest.fixture
def preallocated(tmp_path: Path) -> Path:
    """32 GiB with a place for every cluster, and 1 MiB of data over a cluster's edge."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, "32G")
    write(path, "write -P 7 1073709056 1M")
    return path


def test_a_preallocated_disk_costs_its_data(preallocated: Path, tmp_path: Path) -> None:
    clusters = MiB + 65536  # the data reach into one cluster more
    layer = inspect_image(preallocated).layers[0]
    assert (layer.data_bytes, layer.zero_bytes) == (clusters, (32 << 30) - clusters)
    report = ship(preallocated, repository())
    assert report.bytes_read <= clusters
    plain = tmp_path / "plain.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", plain, "32G")
    write(plain, "write -P 7 1073709056 1M")
    assert ship(plain, repository()).content_id == report.content_id


def test_a_hole_hides_what_is_below(tmp_path: Path) -> None:
    """ZERO, never ABSENT."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "4M")
    write(base, "write -P 1 0 4M")
    link = ["-b", base.name, "-F", "qcow2"]
    qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on,preallocation=metadata", *link, top, "4M")
    write(top, "write -P 2 1M 4k")
    with scan(top) as chain:
        told = {kind: chain.top.extents.bytes_where(chain.top.extents.val == kind) for kind in (ABSENT, ZERO, DATA)}
        assert np.array_equal(our_bytes(chain), their_bytes(top, "qcow2", tmp_path))
    with scan(top) as chain:
        subclusters = chain.top.physical.extents()
        held = subclusters.bytes_where(subclusters.val == DATA)
    assert told[ABSENT] + told[ZERO] + told[DATA] == 4 * MiB
    assert told[ZERO] + told[DATA] >= held


def test_where_the_filesystem_tells_no_holes_all_is_data(preallocated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_told(_fd: int, offset: int, *, size: int, subject: object) -> tuple[int, int] | None:
        _ = subject
        return (offset, size) if offset < size else None

    monkeypatch.setattr(holes, "stored_range", nothing_told)
    with scan(preallocated) as chain:
        assert chain.top.extents.data_bytes == 32 << 30


def test_cost_follows_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 million clusters in one hole: one question to the filesystem, however many clusters that is."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(bytes([1]) * 65536)
    asked = []
    true = holes.stored_range

    def counted(fd: int, offset: int, *, size: int, subject: object) -> tuple[int, int] | None:
        asked.append(offset)
        return true(fd, offset, size=size, subject=subject)

    monkeypatch.setattr(holes, "stored_range", counted)
    one = np.zeros(1, np.int64)
    physical = Physical(1 << 40, one, np.full(1, DATA, np.int8), one, np.zeros(1, np.int32))
    fd = os.open(path, os.O_RDONLY)
    try:
        found = holes.without_holes(physical, fd, file_bytes=1 << 40, grain=65536, subject=path)
    finally:
        os.close(fd)
    assert list(found.runs()) == [
        (0, 1 << 39, ZERO),
        (1 << 39, 65536, DATA),
        ((1 << 39) + 65536, (1 << 39) - 65536, ZERO),
    ]
    assert len(asked) <= 3
