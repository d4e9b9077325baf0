"""Partition tables as sfdisk writes them, and as nobody should."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from snapchain.files.partitions import partitions
from tests.files.images import FileBytes, MiB

TABLES = {
    "mbr": "label: dos\n,4M\n,2M,b\n",
    "logical": "label: dos\n,4M\n,20M,E\n,2M\n,3M\n,4M\n,5M\n",
    "gpt": "label: gpt\n,4M\n,2M\n,7M\n",
}


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(40 * MiB)
    subprocess.run(["sfdisk", "-q", image], input=TABLES[request.param], text=True, check=True)
    return image


def test_partitions_are_those_of_sfdisk(table: Path) -> None:
    said = json.loads(subprocess.run(["sfdisk", "-J", table], capture_output=True, check=True).stdout)
    wanted = [
        (f"p{each['node'].removeprefix(str(table))}", each["start"] * 512, each["size"] * 512)
        for each in said["partitiontable"]["partitions"]
        if each["type"] not in {"5", "f"}
    ]
    disk = FileBytes(table)
    assert [tuple(each) for each in partitions(disk.read, disk.size)] == wanted


def test_the_spare_copy_of_a_gpt_is_read(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(40 * MiB)
    subprocess.run(["sfdisk", "-q", image], input=TABLES["gpt"], text=True, check=True)
    disk = FileBytes(image)
    found = partitions(disk.read, disk.size)
    data = bytearray(image.read_bytes())
    data[512 : 34 * 512] = bytes(33 * 512)
    damaged = FileBytes(image, bytes(data))
    assert partitions(damaged.read, damaged.size) == found


def test_logical_partitions_that_lead_in_a_circle(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(40 * MiB)
    subprocess.run(["sfdisk", "-q", image], input=TABLES["logical"], text=True, check=True)
    data = bytearray(image.read_bytes())
    extended = partitions(FileBytes(image).read, 40 * MiB)
    assert [each.name for each in extended] == ["p1", "p3", "p4", "p5", "p6"]
    first = int.from_bytes(data[446 + 16 + 8 : 446 + 16 + 12], "little") * 512
    data[first + 462 + 8 : first + 462 + 12] = bytes(4)  # the next table is this one
    disk = FileBytes(image, bytes(data))
    assert [each.name for each in partitions(disk.read, disk.size)] == ["p1", "p3", "p4", "p5"]


@given(st.binary(max_size=2048), st.integers(0, 1 << 20))
def test_any_bytes_give_partitions_within_the_disk(head: bytes, tail: int) -> None:
    data = head + b"\x00" * tail
    if len(data) >= 512:
        data = data[:510] + b"\x55\xaa" + data[512:]
    disk = FileBytes(Path(), data)
    for each in partitions(disk.read, disk.size):
        assert 0 < each.start < disk.size
        assert 0 < each.size <= disk.size - each.start
