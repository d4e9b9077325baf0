"""One file out of several, judged by QEMU: the same view for the guest, and nothing for `check` to say."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from snapchain.errors import InvalidInput, Unavailable
from snapchain.image import ImageChain, scan
from snapchain.image.qcow2.header import Backing
from snapchain.merge.assembly import Assembly, plan_assembly, write_assembly
from snapchain.merge.copying import Moved
from snapchain.model.extents import ZERO
from tests.exhaustive import examples
from tests.image.mounts import mounted
from tests.image.oracle import qemu
from tests.image.test_scan_random import Layer, io, layers, made_root, make
from tests.memory import scratch

KiB = 1 << 10
MiB = 1 << 20
SHM = scratch()


def assemble(chain: ImageChain, first: int, last: int, out: Path, **options: Any) -> tuple[Assembly, Moved]:
    """files[first:last + 1] of a chain as one new file, linked to the one below."""
    below = chain.files[first - 1] if first else None
    backing = Backing(str(below.path), below.format) if below else None
    assembly = plan_assembly(chain.at(last), first, backing=backing, **options)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count

    fd = os.open(out, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        moved = write_assembly(assembly, fd, subject=out, on_bytes=on_bytes)
    finally:
        os.close(fd)
    assert done == assembly.bytes_moved == moved.shared + moved.copied
    return assembly, moved


def assert_same(old: Path, new: Path) -> None:
    """QEMU reads the same, size included, and finds nothing to repair."""
    said = subprocess.run(
        ["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", old, new], capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stdout + said.stderr
    assert "mismatch" not in said.stdout + said.stderr
    checked = subprocess.run(["qemu-img", "check", "-f", "qcow2", new], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def growable(layer: Layer) -> Layer:
    """QEMU 7.2 cannot grow an overlay with subclusters whose last cluster is compressed."""
    return replace(layer, grown=0) if layer.squeezed and "extended_l2" in layer.options else layer


@st.composite
def stacks(draw: st.DrawFn) -> tuple[list[Layer], str, int, int]:
    """Layers, the kind of root below them, and the range to merge, counted with the root."""
    found = [growable(layer) for layer in draw(st.lists(layers(), min_size=1, max_size=5))]
    root = draw(st.sampled_from(["none", "raw", "compressed"]))
    count = len(found) + (root != "none")
    last = draw(st.integers(int(root == "raw"), count - 1))
    return found, root, draw(st.integers(0, last)), last


def build(stack: list[Layer], root: str, directory: Path, data: st.DataObject) -> list[Path]:
    paths: list[Path] = []
    below_format = "qcow2"
    if root != "none":
        path, below_format = made_root(root, directory, data)
        paths.append(path)
    for number, layer in enumerate(stack):
        path = directory / f"{number}.qcow2"
        make(layer, path, paths[-1] if paths else None, below_format)
        paths.append(path)
        below_format = "qcow2"
    return paths


def merged_stack_reads_as_before(
    stack: tuple[list[Layer], str, int, int], data: st.DataObject, directory: Path
) -> None:
    found, root, first, last = stack
    paths = build(found, root, directory, data)
    out = directory / "merged.qcow2"
    with scan(paths[-1]) as chain:
        assembly, _ = assemble(chain, first, last, out)
        shown = assembly.view.resolve()
    assert_same(paths[last], out)
    with scan(out) as new:
        assert new.top.header is not None
        assert new.top.header.version == 3
        assert len(new.files) == first + 1
        assert new.size == shown.size
        own = new.top.physical.extents()  # what its tables say: the filesystem may show holes in it
        assert list(own.runs()) == list(assembly.layout.extents.runs())
        if not first:
            assert not (own.val == ZERO).any()


@pytest.mark.sampled
@settings(max_examples=examples(20))
@given(stacks(), st.data())
def test_random_stacks(stack: tuple[list[Layer], str, int, int], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(dir=SHM) as name:
        merged_stack_reads_as_before(stack, data, Path(name))


@pytest.fixture(scope="module", params=["xfs", "btrfs", "ext4"])
def filesystem(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(request.param, tmp_path_factory.mktemp("mounts")) as place:
        yield place


@pytest.mark.root
@pytest.mark.serial
@pytest.mark.sampled
@settings(max_examples=examples(5))
@given(stack=stacks(), data=st.data())
def test_random_stacks_on_filesystems(
    filesystem: Path, stack: tuple[list[Layer], str, int, int], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory(dir=filesystem) as name:
        merged_stack_reads_as_before(stack, data, Path(name))


def chain_of(directory: Path, *made: tuple[str, list[str]], size: int = 4 * MiB) -> list[Path]:
    """Overlays with these options and writes, root first; compressed writes in a session of their own."""
    paths: list[Path] = []
    for number, (options, commands) in enumerate(made):
        path = directory / f"{number}.qcow2"
        link = ["-b", paths[-1].name, "-F", "qcow2"] if paths else []
        qemu("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), *link, path, str(size))
        io(path, [command for command in commands if " -c " in command])
        io(path, [command for command in commands if " -c " not in command])
        paths.append(path)
    return paths


def noise(directory: Path, length: int, seed: int) -> Path:
    path = directory / f"noise{seed}"
    path.write_bytes(random.Random(seed).randbytes(length))
    return path


@pytest.mark.root
@pytest.mark.serial
def test_plain_clusters_are_shared(filesystem: Path) -> None:
    with tempfile.TemporaryDirectory(dir=filesystem) as name:
        directory = Path(name)
        pattern = noise(directory, 8 * MiB, 1)
        paths = chain_of(
            directory,
            ("", [f"write -s {pattern} 0 8M"]),
            ("cluster_size=4096", [f"write -s {pattern} 1M 4M", "write -z 1M 64k"]),
            ("", [f"write -s {pattern} 2M 1M"]),
            size=16 * MiB,
        )
        os.sync()
        with scan(paths[-1]) as chain:
            assembly, moved = assemble(chain, 1, 2, directory / "out.qcow2")
        assert_same(paths[-1], directory / "out.qcow2")
        assert assembly.bytes_moved == 4 * MiB - 64 * KiB
        assert (moved.copied if filesystem.name == "ext4" else moved.shared) == assembly.bytes_moved


def test_compressed_clusters_stay_compressed(tmp_path: Path) -> None:
    paths = chain_of(
        tmp_path,
        ("", ["write -P 1 0 4M"]),
        ("compression_type=zstd", [f"write -c -P {n} {n * 64}k 64k" for n in range(2, 40)]),
        ("", [f"write -c -P {n} {n * 64}k 64k" for n in range(30, 34)]),
        ("", ["write -P 99 1000k 4k", "write -P 98 10k 4k"]),
    )
    with scan(paths[-1]) as chain:
        assembly, _ = assemble(chain, 1, 3, tmp_path / "out.qcow2")
        old = chain.files[1].physical
    assert_same(paths[-1], tmp_path / "out.qcow2")
    with scan(tmp_path / "out.qcow2") as new:
        assert new.top.compression == "zstd"
        squeezed = new.top.physical.stored > 0
        # 38 of zstd, less four that the zlib layer hides and one that the top has cut into.
        assert int(squeezed.sum()) == 38 - 4 - 1
        before = dict(zip(old.start.tolist(), old.stored.tolist(), strict=True))
        for start, stored in zip(
            new.top.physical.start[squeezed].tolist(), new.top.physical.stored[squeezed].tolist(), strict=True
        ):
            assert stored == before[start]
    assert int(assembly.unpack_length.sum()) == 4 * 64 * KiB + 0


def test_a_stale_tail_behind_the_old_end_is_not_taken_along(tmp_path: Path) -> None:
    paths = chain_of(tmp_path, ("", ["write -P 1 0 4M"]), ("", ["write -c -P 2 1M 64k"]))
    qemu("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", paths[1], str(MiB + 4096))
    top = tmp_path / "top.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", paths[1].name, "-F", "qcow2", top, "4M")
    with scan(top) as chain:
        assemble(chain, 1, 2, tmp_path / "out.qcow2")
        assemble(chain, 0, 2, tmp_path / "flat.qcow2")
    assert_same(top, tmp_path / "out.qcow2")
    assert_same(top, tmp_path / "flat.qcow2")


def test_subclusters_survive(tmp_path: Path) -> None:
    paths = chain_of(
        tmp_path,
        ("", ["write -P 1 0 4M"]),
        ("extended_l2=on", ["write -P 2 2k 2k", "write -z 128k 4k"]),
        ("", []),
    )
    with scan(paths[-1]) as chain:
        assembly, _ = assemble(chain, 1, 2, tmp_path / "out.qcow2")
        assert list(assembly.layout.extents.runs()) == list(chain.files[1].extents.runs())
    assert assembly.layout.extended_l2
    assert_same(paths[-1], tmp_path / "out.qcow2")


def test_the_largest_contributor_gives_the_cluster_size(tmp_path: Path) -> None:
    paths = chain_of(
        tmp_path,
        ("", ["write -P 1 0 4M"]),
        ("cluster_size=2M", ["write -P 2 0 4M"]),
        ("cluster_size=4096", ["write -P 3 0 3M"]),
        ("", ["write -P 4 1M 64k"]),
    )
    with scan(paths[-1]) as chain:
        for first, last, expected in [(1, 2, 4096), (1, 1, 2 * MiB), (1, 3, 4096), (0, 3, 4096), (2, 3, 4096)]:
            assembly, _ = assemble(chain, first, last, tmp_path / "out.qcow2")
            assert assembly.layout.cluster_size == expected
            assert_same(paths[last], tmp_path / "out.qcow2")
            (tmp_path / "out.qcow2").unlink()
        for size in (512, 65536, 1 << 21):
            assembly, _ = assemble(chain, 1, 3, tmp_path / "out.qcow2", cluster_size=size)
            assert assembly.layout.cluster_size == size
            assert_same(paths[-1], tmp_path / "out.qcow2")
            (tmp_path / "out.qcow2").unlink()


def test_holes_stay_holes(tmp_path: Path) -> None:
    root = tmp_path / "root.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", root, "64M")
    io(root, ["write -P 1 1M 64k"])
    upper = tmp_path / "upper.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", root.name, "-F", "qcow2", upper)
    with scan(upper) as chain:
        assemble(chain, 0, 1, tmp_path / "out.qcow2")
    assert_same(upper, tmp_path / "out.qcow2")
    assert (tmp_path / "out.qcow2").stat().st_blocks * 512 < 4 * MiB


def test_a_full_disk_leaves_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = chain_of(tmp_path, ("", []), ("", ["write -P 1 0 4M"]), ("", ["write -P 2 0 1M"]))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    out = tmp_path / "out.qcow2"
    with scan(paths[-1]) as chain, pytest.raises(Unavailable, match="no space"):
        assemble(chain, 1, 2, out)
    assert out.read_bytes()[:4] == bytes(4)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP])
def test_without_help_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    paths = chain_of(tmp_path, ("", []), ("", ["write -P 1 0 4M"]), ("", ["write -P 2 0 1M", "write -P 3 3M 4k"]))

    def refused(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refused)
    with scan(paths[-1]) as chain:
        assemble(chain, 1, 2, tmp_path / "out.qcow2")
    assert_same(paths[-1], tmp_path / "out.qcow2")


def test_wrong_requests(tmp_path: Path) -> None:
    paths = chain_of(tmp_path, ("", []), ("", ["write -P 1 0 64k"]))
    with scan(paths[-1]) as chain:
        for first, backing in [(0, Backing("x", "raw")), (1, None), (2, None), (-1, None)]:
            with pytest.raises(InvalidInput, match=r"has a backing file exactly when|is none of the 2"):
                plan_assembly(chain, first, backing=backing)
        assembly = plan_assembly(chain, 0, backing=None)
        with (tmp_path / "full").open("w+b") as file:
            file.write(b"x")
            file.flush()
            with pytest.raises(InvalidInput, match="only written to an empty file"):
                write_assembly(assembly, file.fileno())
