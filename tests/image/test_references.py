"""Which images stand on a file, and whether two chains read the same."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from snapchain.image import scan
from snapchain.image.chain import ImageChain
from snapchain.image.difference import Difference, first_difference, ranges_to_compare
from snapchain.image.references import children

MiB = 1 << 20


def create(path: Path, backing: str | None = None, *, size: int = 4 * MiB) -> Path:
    link = ["-u", "-b", backing, "-F", "qcow2"] if backing else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *link, str(path), str(size)], check=True)
    return path


def write(path: Path, *commands: str) -> None:
    given = [part for command in commands for part in ("-c", command)]
    subprocess.run(["qemu-io", "-t", "unsafe", "-f", "qcow2", *given, str(path)], check=True, capture_output=True)


@pytest.mark.parametrize(
    "recorded",
    [
        "base.qcow2",
        "./base.qcow2",
        "../images/base.qcow2",
        "{directory}/base.qcow2",
        "alias.qcow2",
        "json:{{base.qcow2}}",
    ],
)
def test_a_child_is_found_however_it_names_its_base(recorded: str, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    base = create(images / "base.qcow2")
    (images / "alias.qcow2").symlink_to(base)
    create(images / "other.qcow2")
    top = create(images / "top.qcow2", recorded.format(directory=images))
    assert children([images], of=[base]) == {base: [top]}


def test_who_is_no_child(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2")
    top = create(tmp_path / "top.qcow2", "base.qcow2")
    (tmp_path / "raw").write_bytes(b"base.qcow2" * 100)
    (tmp_path / "short").write_bytes(b"QFI\xfb")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    create(tmp_path / "stranger.qcow2", "/elsewhere/base.qcow2")
    assert children([tmp_path], of=[base]) == {base: [top]}
    assert children([tmp_path], of=[top]) == {}


@pytest.mark.root
def test_an_image_that_may_not_be_read_is_left_out() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        base = create(directory / "base.qcow2")
        mine, strangers = create(directory / "mine.qcow2"), create(directory / "strangers.qcow2", "base.qcow2")
        (directory / "small").write_bytes(b"x")
        strangers.chmod(0o600)
        (directory / "small").chmod(0o600)
        directory.chmod(0o755)
        os.seteuid(65534)
        try:
            found = children([directory], of=[base, mine])
        finally:
            os.seteuid(0)
    assert found == {}


def test_difference_looks_only_where_two_chains_could_differ(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2")
    write(base, "write -P 1 0 4M")
    one = create(tmp_path / "one.qcow2", "base.qcow2")
    write(one, "write -P 2 1M 64k", "write -z 2M 64k")
    other = create(tmp_path / "other.qcow2", "base.qcow2")
    write(other, "write -P 2 1M 64k", "write -P 0 2M 64k", "write -P 1 3M 64k")
    with scan(one) as old, scan(other) as new:
        # What only one of them holds is compared with what the base has there.
        found = ranges_to_compare(old, new, shared=1)
        assert found.plain.guest.tolist() == [MiB, 3 * MiB]
        assert (found.start.tolist(), found.stop.tolist()) == ([2 * MiB], [2 * MiB + 65536])
        seen: list[int] = []
        assert first_difference(old, new, found, on_bytes=seen.append) is None
        assert sum(seen) == found.bytes == 3 * 65536
        # The base is one file in both, though nobody said so: only what lies elsewhere is read.
        assert ranges_to_compare(old, new, shared=0).bytes == 3 * 65536
        assert ranges_to_compare(old, new, shared=0, trust_place=False).bytes == 4 * MiB
        assert first_difference(old, new, ranges_to_compare(old, new, shared=0, trust_place=False)) is None


def compared(old: ImageChain, new: ImageChain) -> Difference | None:
    if old.size != new.size:
        return first_difference(old, new, ranges_to_compare(old, old, shared=1))
    return first_difference(old, new, ranges_to_compare(old, new, shared=0))


@pytest.mark.parametrize("at", [0, MiB + 511, 3 * MiB + 17, 4 * MiB - 1])
@pytest.mark.parametrize("stored", ["plain", "compressed", "against zeroes"])
def test_the_first_difference_is_found_to_the_byte(at: int, stored: str, tmp_path: Path) -> None:
    one, other = create(tmp_path / "one.qcow2"), create(tmp_path / "other.qcow2")
    flag = "-c " if stored == "compressed" else ""
    for path in (one, other):
        pattern = 0 if stored == "against zeroes" else 5
        if not (pattern == 0 and path == one):
            write(path, *(f"write {flag}-P {pattern} {n * 65536} 65536" for n in range(64)))
    write(other, f"write -P 6 {at} 1", "write -P 6 4194303 1")
    with scan(one) as old, scan(other) as new:
        found = compared(old, new)
        assert found is not None
        assert found.start == at
        assert at < found.stop <= 4 * MiB


@pytest.mark.parametrize("how", ["", "extended_l2=on", "cluster_size=4096", "compression_type=zstd"])
def test_compressed_clusters_that_are_stored_otherwise_are_equal(how: str, tmp_path: Path) -> None:
    one, other = create(tmp_path / "one.qcow2"), tmp_path / "other.qcow2"
    write(one, *(f"write -c -P {n + 1} {n * 65536} 65536" for n in range(20)))
    option = ["-o", how] if how else []
    subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", *option, one, other], check=True)
    with scan(one) as old, scan(other) as new:
        assert ranges_to_compare(old, new, shared=0).bytes == (0 if how in {"", "extended_l2=on"} else 20 * 65536)
        assert compared(old, new) is None


def test_a_difference_in_size_counts(tmp_path: Path) -> None:
    one, other = create(tmp_path / "one.qcow2"), create(tmp_path / "other.qcow2", size=5 * MiB)
    with scan(one) as old, scan(other) as new:
        assert compared(old, new) == Difference(4 * MiB, 5 * MiB)


def test_zeroes_that_are_stored_otherwise_are_equal(tmp_path: Path) -> None:
    one, other = create(tmp_path / "one.qcow2"), create(tmp_path / "other.qcow2")
    write(one, "write -z 0 1M")
    write(other, "write -P 0 512k 1M")
    with scan(one) as old, scan(other) as new:
        assert compared(old, new) is None
