"""Logical volumes where lvm2 puts them; what has no map here is named, and never read as something else."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from snapchain.files.lvm import Malformed, PhysicalVolume, logical_volumes, parsed, physical_volume
from snapchain.files.partitions import Partition, partitions
from snapchain.files.session import Session
from tests.files.images import FileBytes, MiB, contents, make, plant, run, taken

GROUP = """
vg0 {
id = "a-b"
seqno = 7
extent_size = 8192
physical_volumes {
    pv0 { id = "AAAA-AA"
          pe_start = 2048 }
    pv1 { id = "BBBB-BB"
          pe_start = 2048 }
}
logical_volumes {
    root { status = ["READ", "WRITE", "VISIBLE"]
           segment1 { start_extent = 0 extent_count = 4 type = "striped" stripe_count = 1 stripes = ["pv0", 3] }
           segment2 { start_extent = 4 extent_count = 2 type = "striped" stripe_count = 1 stripes = ["pv1", 0] } }
    wide { status = ["READ", "WRITE", "VISIBLE"]
           segment1 { start_extent = 0 extent_count = 2 type = "striped" stripe_count = 2 stripe_size = 8192
                      stripes = ["pv0", 0, "pv1", 10] } }
    thin { status = ["READ", "VISIBLE"]
           segment1 { start_extent = 0 extent_count = 4 type = "thin" thin_pool = "pool" } }
    gap { status = ["VISIBLE"]
          segment1 { start_extent = 1 extent_count = 4 type = "striped" stripe_count = 1 stripes = ["pv0", 3] } }
    away { status = ["VISIBLE"]
           segment1 { start_extent = 0 extent_count = 4 type = "striped" stripe_count = 1 stripes = ["pv9", 3] } }
    pool { status = ["READ"] }
}
}
"""
EXTENT = 4 * MiB


def test_segments_become_ranges_of_the_disk() -> None:
    volumes = [PhysicalVolume("AAAAAA", 0, GROUP), PhysicalVolume("BBBBBB", 1 << 40, GROUP)]
    found = {each.name: each for each in logical_volumes(volumes)}
    assert [tuple(each) for each in found["vg0/root"].pieces] == [
        (0, 4 * EXTENT, MiB + 3 * EXTENT),
        (4 * EXTENT, 2 * EXTENT, (1 << 40) + MiB),
    ]
    assert [tuple(each) for each in found["vg0/wide"].pieces] == [
        (0, EXTENT, MiB),
        (EXTENT, EXTENT, (1 << 40) + MiB + 10 * EXTENT),
    ]
    assert "of the kind thin" in str(found["vg0/thin"].trouble)
    assert "a gap" in str(found["vg0/gap"].trouble)
    assert "another disk" in str(found["vg0/away"].trouble)
    assert "vg0/pool" not in found


def test_the_newest_description_of_a_group_counts() -> None:
    older = GROUP.replace("seqno = 7", "seqno = 6").replace('"pv0", 3', '"pv0", 5')
    volumes = [PhysicalVolume("AAAAAA", 0, GROUP), PhysicalVolume("BBBBBB", 1 << 40, older)]
    root = next(each for each in logical_volumes(volumes) if each.name == "vg0/root")
    assert root.pieces[0].disk == MiB + 3 * EXTENT


@given(st.text(alphabet='{}[]=,"a1 \n#', max_size=300))
def test_any_text_is_parsed_or_malformed(text: str) -> None:
    with suppress(Malformed):
        parsed(text)


@given(st.data())
def test_any_value_is_understood_or_malformed(data: st.DataObject) -> None:
    """One disk of a guest with such a text still shows its other volumes."""
    tokens = re.findall(r'"[^"]*"|\S+', GROUP)
    tokens[data.draw(st.integers(0, len(tokens) - 1))] = data.draw(
        st.sampled_from(["5", "-1", '"x"', "[", "]", "{", "[]"])
    )
    with suppress(Malformed):
        logical_volumes([PhysicalVolume("AAAAAA", 0, " ".join(tokens))])


def test_a_status_that_is_no_list_is_not_visible() -> None:
    text = "vg { seqno=1 extent_size=8192 logical_volumes { lv { status=5 } } }"
    assert logical_volumes([PhysicalVolume("AAAAAA", 0, text)]) == []


@contextmanager
def loop(image: Path, start: int) -> Iterator[str]:
    attached = subprocess.run(
        ["losetup", "-f", "--show", "-o", str(start), image], capture_output=True, text=True, check=False
    )
    if attached.returncode:
        pytest.skip(f"no loop device: {attached.stderr.strip()}")
    try:
        yield attached.stdout.strip()
    finally:
        run("losetup", "-d", attached.stdout.strip())


@pytest.mark.root
@pytest.mark.serial
def test_a_file_system_in_a_volume_of_two_parts(tmp_path: Path) -> None:
    tree = plant(tmp_path / "tree", 60, unix=True)
    inner = make("ext4", tree, tmp_path / "inner", size=36 * MiB)
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(128 * MiB)
    subprocess.run(["sfdisk", "-q", image], input="label: gpt\n,8M\n,\n", text=True, check=True)
    disk = FileBytes(image)
    partition = partitions(disk.read, disk.size)[1]
    with loop(image, partition.start) as device:
        # The kernel needs no device mapper: nothing is activated.
        more = ["--driverloaded", "n", "--config", f'devices{{filter=["a|{device}|","r|.*|"] use_devicesfile=0}}']
        run("pvcreate", *more, "-q", "-y", device)
        run("vgcreate", *more, "-q", "vg0", device)
        for name in ("root", "other"):
            run("lvcreate", *more, "-an", "-Zn", "-Wn", "-y", "-q", "-L", "16M", "-n", name, "vg0")
        run("lvextend", *more, "-q", "-L", "+20M", "vg0/root")
    disk = FileBytes(image)
    volume = physical_volume(disk.read, Partition("p2", partition.start, partition.size))
    assert volume is not None
    root = next(each for each in logical_volumes([volume]) if each.name == "vg0/root")
    assert [(piece.size, piece.disk - partition.start) for piece in root.pieces] == [
        (16 * MiB, MiB),
        (20 * MiB, MiB + 32 * MiB),
    ]
    data, filled = bytearray(image.read_bytes()), inner.read_bytes()
    for piece in root.pieces:
        data[piece.disk : piece.disk + piece.size] = filled[piece.at : piece.at + piece.size]
    with Session(FileBytes(image, bytes(data)), subject="image", most_bytes=1 << 40) as session:
        names = {each.name: each.trouble for each in session.volumes()}
        assert [*names] == ["p1", "p2", "vg0/other", "vg0/root"]
        assert "name a logical volume" in str(names["p2"])
        session.open("vg0/root")
        with session.walk([], depth=100, contents=True) as entries:
            assert taken(entries) == contents(tree)
