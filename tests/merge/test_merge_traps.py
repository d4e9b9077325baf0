"""Each trap of qemu-img's own recipes, as a test of `merge` by every strategy that fits.

First it is shown that the recipe is wrong, or does what a merge must not (QEMU 7.2); then that the merge is right.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from snapchain.errors import Unsupported
from snapchain.image import scan
from snapchain.merge import run as merge_run, step as merge_plan
from snapchain.merge.request import MergeRequest
from snapchain.model.merging import Strategy
from tests.ops.stacks import Layer, MiB, build, clean, flat, names, qemu_img, same

WAYS = [None, Strategy.NEW, Strategy.ABSORB, Strategy.COMMIT]
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.value if way else "best")


def merged(paths: list[Path], way: Strategy | None, tmp_path: Path, *, flatten: bool = False) -> Path:
    """The top after a merge of all above the root; its view is the same, and check has nothing to say."""
    reference = flat(paths[-1], tmp_path / "reference")
    merge_run.run_step(merge_plan.plan_step(MergeRequest(image=paths[-1], strategy=way, flatten=flatten)))
    assert same(paths[-1], reference)
    assert clean(paths[-1])
    assert names(paths[0].parent) == (["disk.qcow2"] if flatten else [paths[0].name, "disk.qcow2"])
    return paths[-1]


@each_way
def test_convert_with_a_base_loses_the_layers_between(way: Strategy | None, tmp_path: Path) -> None:
    paths = build(tmp_path / "vm", [Layer(writes=[f"write -P {n + 1} {n}M 1M"]) for n in range(4)])
    out = tmp_path / "vm" / "out"
    reference = flat(paths[-1], tmp_path / "flat")
    qemu_img("convert", "-O", "qcow2", "-B", paths[0].name, "-F", "qcow2", paths[-1], out)
    assert clean(out)
    assert not same(out, reference)
    out.unlink()
    merged(paths, way, tmp_path)


@each_way
def test_zero_clusters_go_on_hiding_what_is_below(way: Strategy | None, tmp_path: Path) -> None:
    """What `convert` of the overlays without their base, put back by `rebase -u`, brings back."""
    zeroes = ["write -z 1M 1M", "discard 2M 512k", "write -z 3M 4k"]
    layers = [Layer(writes=["write -P 1 0 4M"]), Layer(writes=["write -P 2 0 64k"]), Layer(writes=zeroes), Layer()]
    top = merged(build(tmp_path / "vm", layers), way, tmp_path)
    with scan(top) as chain:
        # Still as zeroes, not as data: rebase writes them out.
        assert chain.top.extents.zero_bytes >= MiB + 512 * 1024
        assert chain.top.extents.data_bytes <= 256 * 1024


@each_way
def test_a_shorter_middle_layer_hides_for_ever(way: Strategy | None, tmp_path: Path) -> None:
    """`rebase -u` to the base would show 0xAA behind the middle layer's end."""
    layers = [
        Layer(writes=["write -P 170 0 4M"]),
        Layer(MiB, ["write -P 2 0 64k"]),
        Layer(writes=["write -P 3 2M 64k"]),
    ]
    paths = build(tmp_path / "vm", layers)
    wrong = Path(shutil.copy(paths[-1], paths[-1].with_name("wrong")))
    reference = flat(paths[-1], tmp_path / "flat")
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", paths[0].name, "-F", "qcow2", wrong)
    assert not same(wrong, reference)
    wrong.unlink()
    merged(paths, way, tmp_path)


@each_way
@pytest.mark.parametrize("sizes", [(2, 4, 4), (2, 2, 4), (4, 2, 2), (2, 3, 4), (4, 3, 2)], ids=str)
def test_grown_and_shrunk_overlays(sizes: tuple[int, ...], way: Strategy | None, tmp_path: Path) -> None:
    layers = [
        Layer(size * MiB, [f"write -P {n + 1} {n * 256}k 512k", f"write -P {n + 5} {size * 1024 - 64}k 64k"])
        for n, size in enumerate(sizes)
    ]
    merged(build(tmp_path / "vm", layers), way, tmp_path)


@each_way
def test_a_discard_hides_and_in_version_2_does_not(way: Strategy | None, tmp_path: Path) -> None:
    for options in ("compat=1.1", "compat=0.10"):
        writes = ["write -P 2 0 1M", "discard 0 512k", "write -z 2M 128k"]
        layers = [Layer(writes=["write -P 1 0 4M"]), Layer(writes=writes, options=options), Layer(options=options)]
        directory = tmp_path / options
        directory.mkdir()
        merged(build(directory / "vm", layers), way, directory)


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_a_compressed_overlay_stays_compressed(method: str, tmp_path: Path) -> None:
    """`commit` makes 33 MiB of 300 KiB."""
    options = f"compression_type={method}"
    layers = [
        Layer(writes=["write -P 1 0 4M"]),
        Layer(writes=["write -P 2 0 4M"], options=options, compress=True),
        Layer(writes=["write -P 3 1M 64k"], options=options),
    ]
    paths = build(tmp_path / "vm", layers)
    top = merged(paths, None, tmp_path)
    with scan(top) as chain:
        assert int((chain.top.physical.stored > 0).sum()) >= 62
    assert top.stat().st_size < MiB


@each_way
def test_a_wrong_base_of_the_same_size_is_not_taken(way: Strategy | None, tmp_path: Path) -> None:
    """`rebase -u` to it ends with 0, and checks clean. The merged file records the file that was read."""
    (tmp_path / "vm" / "new").mkdir(parents=True)
    old = build(tmp_path / "vm", [Layer(writes=["write -P 1 0 4M"]), Layer(writes=["write -P 2 0 64k"])])
    decoy = tmp_path / "vm" / "new" / old[0].name
    qemu_img("create", "-q", "-f", "qcow2", decoy, "4M")
    top = tmp_path / "vm" / "new" / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", f"../{old[1].name}", "-F", "qcow2", top)
    reference = flat(top, tmp_path / "flat")
    if way is Strategy.COMMIT:
        with pytest.raises(Unsupported, match="must stay as it is: it lies outside") as caught:
            merge_plan.plan_step(MergeRequest(image=top, strategy=way, image_dirs=[tmp_path / "vm"]))
        assert Path(caught.value.subject or "").resolve() == old[1]
        return
    report = merge_run.run_step(
        merge_plan.plan_step(MergeRequest(image=top, strategy=way, image_dirs=[tmp_path / "vm"]))
    )
    assert (report.layers_before, report.layers_after) == (3, 2)
    with scan(top, image_dirs=[tmp_path / "vm"]) as chain:
        assert [file.real_path for file in chain.files] == [old[0], top]
    assert same(top, reference)
    assert clean(top)


@each_way
def test_two_children_of_one_base(way: Strategy | None, tmp_path: Path) -> None:
    """A commit into the base changes the other child at once."""
    paths = build(tmp_path / "vm", [Layer(writes=["write -P 1 0 4M"]), *[Layer(writes=["write -P 2 0 1M"])] * 2])
    other = paths[0].with_name("other.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", paths[0].name, "-F", "qcow2", other)
    before, reference = flat(other, tmp_path / "other"), flat(paths[-1], tmp_path / "flat")
    if way is Strategy.COMMIT:
        with pytest.raises(Unsupported, match=r"must stay as it is: .* depends on it") as caught:
            merge_plan.plan_step(MergeRequest(image=paths[-1], strategy=way, flatten=True))
        assert caught.value.subject == str(paths[0])
    else:
        report = merge_run.run_step(merge_plan.plan_step(MergeRequest(image=paths[-1], strategy=way, flatten=True)))
        assert (report.layers_before, report.layers_after) == (3, 1)
        assert [kept.path for kept in report.kept] == [paths[0]]
    assert same(other, before)
    assert same(paths[-1], reference)


@each_way
def test_formats_are_never_guessed(way: Strategy | None, tmp_path: Path) -> None:
    """A raw root in which a guest has written a qcow2 header stays raw."""
    paths = build(tmp_path / "vm", [Layer(image_format="raw", writes=["write -P 1 0 4M"]), Layer(), Layer()])
    inner = build(tmp_path / "inner", [Layer(MiB, ["write -P 9 0 1M"])])[0]
    with paths[1].open("rb"):
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", f"write -s {inner} 0 {inner.stat().st_size // 512 * 512}", paths[1]],
            check=True,
            capture_output=True,
        )
    top = merged(paths, way, tmp_path)
    assert '"backing-filename-format": "raw"' in qemu_img("info", "--output=json", "-f", "qcow2", top)
