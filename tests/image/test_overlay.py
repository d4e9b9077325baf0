"""Empty overlays, written by ourselves: judged by qemu-img, against those that it makes."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest

from snapchain.errors import InvalidInput
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.write import write_overlay
from snapchain.testing import qemu_img
from snapchain.testing.qemu_img import BackingLink, Format, Qcow2Options

MiB = 1 << 20
SIZES = (512, 65536, 5 * MiB + 512, 3 << 40)


def made(path: Path, size: int, name: str, image_format: Format, cluster_size: int | None, *, extended: bool) -> Path:
    with path.open("xb+") as file:
        backing = Backing(name, image_format)
        write_overlay(file.fileno(), size, backing, cluster_size=cluster_size, extended_l2=extended, subject=path)
    return path


@pytest.mark.parametrize(
    ("size", "cluster_size", "extended"),
    [
        each
        for each in itertools.product(SIZES, (None, 512, 4096, 32768, 2 * MiB), (False, True))
        if not (each[2] and (each[1] or 65536) < 16384) and not (each[0] > 1 << 40 and each[1] == 512)
    ],
)
def test_it_is_what_qemu_img_makes(tmp_path: Path, size: int, cluster_size: int | None, *, extended: bool) -> None:
    ours = made(tmp_path / "ours", size, "base.raw", "raw", cluster_size, extended=extended)
    options = Qcow2Options(cluster_size=cluster_size, extended_l2=extended or None)
    qemu_img.create(tmp_path / "theirs", size, options=options, backing=BackingLink("base.raw", "raw"))
    told = [
        subprocess.check_output(["qemu-img", "info", "--output=json", path], text=True)
        for path in (ours, tmp_path / "theirs")
    ]
    volatile = ("filename", "actual-size", "disk size", "file length", "children")
    one, other = (
        [line for line in text.splitlines() if not any(f'"{each}"' in line for each in volatile)] for text in told
    )
    assert one == other
    assert qemu_img.check(ours).clean


def test_it_reads_as_its_backing_file(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"guest" * 13107 + bytes(1))
    overlay = made(tmp_path / "overlay", 65536, "base.raw", "raw", None, extended=False)
    assert qemu_img.compare(overlay, tmp_path / "base.raw", formats=("qcow2", "raw")) is None


@pytest.mark.parametrize("name", ["nbd:x", "-x", "a:b/c", "./x:y"])
def test_names_are_recorded_so_that_qemu_takes_them_for_paths(tmp_path: Path, name: str) -> None:
    (tmp_path / "a:b").mkdir()
    if ":" in name.partition("/")[0] and "/" in name:
        with pytest.raises(InvalidInput, match="not a backing name that QEMU takes for a plain file"):
            made(tmp_path / "overlay", 65536, name, "raw", None, extended=False)
        return
    (tmp_path / name).write_bytes(b"x" * 65536)
    overlay = made(tmp_path / "overlay", 65536, name, "raw", None, extended=False)
    assert qemu_img.compare(overlay, tmp_path / name, formats=("qcow2", "raw")) is None
