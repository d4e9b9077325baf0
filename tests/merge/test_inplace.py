"""Merges inside an existing file, judged by QEMU: the same view for the guest, nothing for `check` to say."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings, strategies as st

from snapchain.errors import InvalidInput, Unsupported
from snapchain.image import ImageChain, scan
from snapchain.image.qcow2.header import Backing
from snapchain.merge.amendment import Amendment, fill, plan_absorb, plan_commit, relink, settle
from snapchain.merge.assembly import merged_extents
from snapchain.model.economics import Into, gains_of, hidden_by
from snapchain.testing.strategies import chain_of as model_chain
from tests.exhaustive import examples
from tests.image.oracle import qemu
from tests.image.test_scan_random import Layer, io, layers
from tests.merge.test_assemble import SHM, build, chain_of, growable, noise

KiB = 1 << 10
MiB = 1 << 20
Way = Literal["absorb", "commit"]
REFUSED = re.compile(r"internal snapshots|a raw image|persistent bitmaps")


def link_below(chain: ImageChain, first: int) -> Backing | None:
    below = chain.files[first - 1] if first else None
    return Backing(str(below.path), below.format) if below else None


def planned(way: Way, chain: ImageChain, first: int, last: int) -> Amendment:
    make_plan = plan_absorb if way == "absorb" else plan_commit
    return make_plan(chain.at(last), first, backing=link_below(chain, first))


def flat_of(path: Path, directory: Path) -> Path:
    """The view of a chain, kept apart from it."""
    flat = directory / "flat.raw"
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, flat)
    return flat


def wrong_view(path: Path, flat: Path) -> str:
    said = subprocess.run(
        ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, flat], capture_output=True, text=True, check=False
    )
    words = said.stdout + said.stderr
    return words if said.returncode or "mismatch" in words else ""


def check(path: Path) -> tuple[int, str]:
    said = subprocess.run(["qemu-img", "check", "-f", "qcow2", path], capture_output=True, text=True, check=False)
    return said.returncode, said.stdout + said.stderr


def assert_clean(path: Path) -> None:
    code, words = check(path)
    assert code == 0, words


def merge(way: Way, paths: list[Path], first: int, last: int) -> Amendment:
    """All of it, and that each number told is true. paths: root first."""
    with scan(paths[last]) as chain:
        work = planned(way, chain, first, last)
        target = paths[work.target]
        assert work.file.path == target
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count

        size = target.stat().st_size
        fd = os.open(target, os.O_RDWR)
        try:
            moved = fill(work, fd, subject=target, on_bytes=on_bytes)
            assert target.stat().st_size - size <= work.bytes_needed
            relink(work, fd, subject=target)
            settle(fd, subject=target)
        finally:
            os.close(fd)
        assert done == work.bytes_moved == moved.shared + moved.copied
    return work


def merged_in_place_reads_as_before(
    stack: tuple[list[Layer], str, int, int], way: Way, data: st.DataObject, directory: Path
) -> None:
    found, root, first, last = stack
    paths = build(found, root, directory, data)
    flat = flat_of(paths[last], directory)
    try:
        work = merge(way, paths, first, last)
    except Unsupported as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert REFUSED.search(refusal), refusal
        return
    result = paths[work.target]
    assert not wrong_view(paths[last], flat)
    assert not wrong_view(result, flat)
    assert_clean(result)
    with scan(result) as new:
        assert len(new.files) == first + 1
        assert new.size == flat.stat().st_size


@st.composite
def stacks(draw: st.DrawFn) -> tuple[list[Layer], str, int, int]:
    """As test_assemble's, of two inputs at least."""
    found = [growable(layer) for layer in draw(st.lists(layers(), min_size=2, max_size=5))]
    root = draw(st.sampled_from(["none", "raw", "compressed"]))
    last = draw(st.integers(1, len(found) + (root != "none") - 1))
    return found, root, draw(st.integers(0, last - 1)), last


@pytest.mark.sampled
@pytest.mark.parametrize("way", ["absorb", "commit"])
@settings(max_examples=examples(20))
@given(stack=stacks(), data=st.data())
def test_random_stacks(way: Way, stack: tuple[list[Layer], str, int, int], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(dir=SHM) as name:
        merged_in_place_reads_as_before(stack, way, data, Path(name))


def assert_merged(way: Way, paths: list[Path], first: int, last: int) -> Amendment:
    flat = flat_of(paths[last], paths[0].parent)
    work = merge(way, paths, first, last)
    assert not wrong_view(paths[last], flat)
    assert not wrong_view(paths[work.target], flat)
    assert_clean(paths[work.target])
    return work


@pytest.mark.parametrize("way", ["absorb", "commit"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_refcounts_of_every_width_grow(tmp_path: Path, way: Way, bits: int) -> None:
    """Clusters of 512 bytes: blocks, and at last the table, are too small soon."""
    options = f"cluster_size=512,refcount_bits={bits}"
    paths = chain_of(
        tmp_path,
        (options, ["write -P 1 0 100k"]),
        (options, ["write -P 2 200k 2M"]),
        (options, ["write -P 3 3M 900k", "write -z 1M 64k"]),
    )
    assert_merged(way, paths, 1, 2)


@pytest.mark.parametrize("way", ["absorb", "commit"])
def test_only_survivors_are_moved(tmp_path: Path, way: Way) -> None:
    paths = chain_of(
        tmp_path,
        ("", ["write -P 1 0 8M"]),
        ("", ["write -P 2 0 4M"]),
        ("", ["write -P 3 1M 4M", "write -z 0 128k"]),
        ("", ["write -P 4 2M 1M"]),
        size=16 * MiB,
    )
    with scan(paths[-1]) as chain:
        into = Into.UPPER if way == "absorb" else Into.LOWER
        gains = gains_of(hidden_by(model_chain([file.extents for file in chain.files])))
        assert merged_extents(chain, 1).data_bytes == 5 * MiB - 128 * KiB
    work = assert_merged(way, paths, 1, 3)
    assert work.bytes_moved == gains.moved[into][1, 3]


@pytest.mark.parametrize("way", ["absorb", "commit"])
def test_into_a_root(tmp_path: Path, way: Way) -> None:
    paths = chain_of(
        tmp_path,
        ("", ["write -P 1 0 3M"]),
        ("cluster_size=4k", ["write -P 2 1M 5k", "write -z 2M 512k"]),
        ("cluster_size=512", ["write -P 3 10k 1k", "write -z 1M 1k"]),
    )
    assert_merged(way, paths, 0, 2)
    with scan(paths[2 if way == "absorb" else 0]) as new:
        assert new.top.backing is None


@pytest.mark.parametrize("way", ["absorb", "commit"])
@pytest.mark.parametrize("options", ["", "cluster_size=2M", "extended_l2=on"])
@pytest.mark.parametrize("sizes", [(4, 2, 4), (2, 2, 6), (6, 6, 2), (1, 6, 2)])
def test_other_sizes(tmp_path: Path, way: Way, options: str, sizes: tuple[int, int, int]) -> None:
    """Ends in the middle of clusters; what a shorter layer hides stays hidden, what a longer one has gone is gone."""
    odd = [0, 512, 3584, 1024]
    paths: list[Path] = []
    for number, size in enumerate((6, *sizes)):
        path = tmp_path / f"{number}.qcow2"
        link = ["-b", paths[-1].name, "-F", "qcow2"] if paths else []
        length = size * MiB + odd[number]
        given_options = ["-o", options] if options else []
        qemu("qemu-img", "create", "-q", "-f", "qcow2", *given_options, *link, path, str(length))
        io(path, [f"write -P {number + 1} {number * 300}k 70k", f"write -P {10 + number} {length - 9 * 512} {9 * 512}"])
        paths.append(path)
    assert_merged(way, paths, 1, 3)


@pytest.mark.parametrize("way", ["absorb", "commit"])
def test_a_disk_that_has_grown_beyond_its_first_table(tmp_path: Path, way: Way) -> None:
    """512-byte clusters: an L1 entry maps 32 KiB, so the table of the small one must be made anew."""
    paths: list[Path] = []
    for number, size in enumerate((64 * MiB, MiB, 64 * MiB)):
        path = tmp_path / f"{number}.qcow2"
        link = ["-b", paths[-1].name, "-F", "qcow2"] if paths else []
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", *link, path, str(size))
        io(path, [f"write -P {number + 1} {size - MiB // 2} 100k"])
        paths.append(path)
    io(paths[2], ["write -P 9 3M 1M"])
    assert_merged(way, paths, 1, 2)


@pytest.mark.parametrize("way", ["absorb", "commit"])
@pytest.mark.parametrize("upper", ["", "extended_l2=on", "cluster_size=4k"])
@pytest.mark.parametrize(
    "lower", ["extended_l2=on", "extended_l2=on,cluster_size=16k", "extended_l2=on,cluster_size=2M"]
)
def test_subclusters(tmp_path: Path, way: Way, lower: str, upper: str) -> None:
    paths = chain_of(
        tmp_path,
        ("", ["write -P 1 0 4M"]),
        (lower, ["write -P 2 2k 2k", "write -z 128k 4k", "write -P 5 512k 6k", "write -c -P 6 2M 2M"]),
        (upper, ["write -P 3 6k 3k", "write -z 130k 4k", "write -z 514k 1k", "write -P 7 3M 1k"]),
    )
    assert_merged(way, paths, 1, 2)


@pytest.mark.parametrize("way", ["absorb", "commit"])
def test_compressed_clusters(tmp_path: Path, way: Way) -> None:
    paths = chain_of(
        tmp_path,
        ("", ["write -P 1 0 4M"]),
        ("", [f"write -c -P {n} {n * 64}k 64k" for n in range(2, 40)]),
        ("", [f"write -c -P {n} {n * 64}k 64k" for n in range(30, 50)]),
        ("", ["write -P 99 1000k 4k", "write -z 1280k 64k", "write -z 640k 4k"]),
    )
    assert_merged(way, paths, 1, 3)


def test_bitmaps_of_the_absorbing_file_stay(tmp_path: Path) -> None:
    paths = chain_of(tmp_path, ("", ["write -P 1 0 4M"]), ("", ["write -P 2 0 1M"]), ("", []))
    qemu("qemu-img", "bitmap", "-f", "qcow2", "--add", paths[2], "dirty0")
    io(paths[2], ["write -P 3 512k 64k"])
    assert_merged("absorb", paths, 1, 2)
    with scan(paths[2]) as new:
        assert new.top.header is not None
        assert [(one.name, one.in_use) for one in new.top.header.bitmaps] == [("dirty0", False)]
        assert new.top.header.fields.autoclear_features == 1


def test_links_of_every_length(tmp_path: Path) -> None:
    """With clusters of 512 bytes the header has room for little, and what does not fit is refused beforehand."""
    for cluster in (512, 65536):
        paths = chain_of(
            tmp_path, *[(f"cluster_size={cluster}", [f"write -P {n} {n}M 4k"]) for n in range(1, 4)], size=6 * MiB
        )
        # Longer and longer names of one file; all of them are tried on one image in turn.
        for depth in (0, 20, 150, 400, 900):
            name = "./" * (depth // 2) + paths[0].name
            before = paths[2].read_bytes()
            with scan(paths[2]) as chain:
                try:
                    work = plan_absorb(chain, 1, backing=Backing(name, "qcow2"))
                except Unsupported:
                    assert cluster == 512
                    assert depth > 100
                    continue
                flat = flat_of(paths[2], tmp_path)
                with paths[2].open("r+b") as file:
                    fill(work, file.fileno())
                    relink(work, file.fileno())
                    settle(file.fileno())
            assert not wrong_view(paths[2], flat)
            assert_clean(paths[2])
            with scan(paths[2]) as new:
                assert new.top.backing == Backing(name, "qcow2")
            paths[2].write_bytes(before)


def test_raw_below(tmp_path: Path) -> None:
    paths = [noise(tmp_path, 3 * MiB + 512, 4)]
    for number, link_format in enumerate(["raw", "qcow2"]):
        path = tmp_path / f"{number}.qcow2"
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", paths[-1].name, "-F", link_format, path, "4M")
        io(path, [f"write -P {number + 1} {number}M 5k"])
        paths.append(path)
    assert_merged("absorb", paths, 1, 2)
    # What was in between is no longer part of the chain; now the raw root goes in as well.
    assert_merged("absorb", [paths[0], paths[2]], 0, 1)
    with scan(paths[2]) as new:
        assert len(new.files) == 1


def test_the_last_sector_of_a_raw_file_over_what_a_cluster_held_before(tmp_path: Path) -> None:
    """A cluster that QEMU has used again holds old bytes where no subcluster shows them."""
    paths = [noise(tmp_path, MiB + 100, 5), tmp_path / "1.qcow2", tmp_path / "2.qcow2"]
    size = str(MiB + 8 * KiB)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", paths[0].name, "-F", "raw", paths[1], size)
    options = ["-o", "extended_l2=on,cluster_size=64k"]
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *options, "-b", paths[1].name, "-F", "qcow2", paths[2], size)
    # What is freed is not discarded on the disk, so it keeps its bytes.
    opened = f"driver=qcow2,discard=unmap,pass-discard-request=off,file.driver=file,file.filename={paths[2]}"
    for command in ("write -P 7 0 64k", "discard 0 64k", f"write -P 8 {MiB + 4 * KiB} 2k"):
        qemu("qemu-io", "--image-opts", "-c", command, opened)
    assert b"\7" * 2048 in paths[2].read_bytes()
    assert_merged("absorb", paths, 0, 2)


def test_wrong_requests(tmp_path: Path) -> None:
    paths = chain_of(tmp_path, ("", []), ("", ["write -P 1 0 64k"]))
    with scan(paths[-1]) as chain:
        for first in (1, 2, -1):
            for make_plan in (plan_absorb, plan_commit):
                with pytest.raises(InvalidInput, match="must contain at least two files"):
                    make_plan(chain, first, backing=None)
        with pytest.raises(InvalidInput, match="has a backing file exactly when"):
            plan_absorb(chain, 0, backing=Backing("x", "raw"))
    qemu("qemu-img", "snapshot", "-c", "inside", paths[1])
    with scan(paths[-1]) as chain, pytest.raises(Unsupported, match="internal snapshots"):
        plan_absorb(chain, 0, backing=None)
    qemu("qemu-img", "snapshot", "-c", "inside", paths[0])
    with scan(paths[-1]) as chain, pytest.raises(Unsupported, match="internal snapshots"):
        plan_commit(chain, 0, backing=None)
