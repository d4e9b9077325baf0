"""Chains with random histories, made by qemu-img and qemu-io: our maps and bytes are QEMU's."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from snapchain.image import scan
from tests.exhaustive import examples
from tests.image.oracle import assert_as_qemu, qemu
from tests.memory import scratch

KiB = 1 << 10
MiB = 1 << 20
LARGEST = 6 * MiB


@dataclass(frozen=True)
class Layer:
    """One file: its options, size, and the qemu-io commands that fill it."""

    options: dict[str, str]
    size: int
    squeezed: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    snapshot: bool = False
    bitmap: bool = False
    grown: int = 0


@st.composite
def writes(draw: st.DrawFn, size: int, cluster: int) -> list[str]:
    """Guest writes, zeroes, discards."""
    commands: list[str] = []
    for number in range(draw(st.integers(0, 8))):
        grain = draw(st.sampled_from([1, 512, 4096, cluster]))
        start = draw(st.integers(0, size - 1)) // grain * grain
        length = min(size - start, draw(st.sampled_from([512, 5000, cluster, 3 * cluster + 700, LARGEST])))
        verb = draw(st.sampled_from(["write -P", "write -P", "write -P", "write -z", "write -z -u", "discard"]))
        pattern = f" {number + 1}" if verb.endswith("-P") else ""
        commands.append(f"{verb}{pattern} {start} {length}")
    return commands


@st.composite
def squeezed_clusters(draw: st.DrawFn, size: int, cluster: int) -> list[str]:
    """Compressed clusters, each written once.

    In a session of their own: QEMU 7.2 damages images where one session discards and then writes compressed clusters.
    """
    count = min(-(-size // cluster), 40)
    chosen = draw(st.sets(st.integers(0, count - 1), max_size=8))
    return [f"write -c -P {100 + n} {n * cluster} {min(cluster, size - n * cluster)}" for n in sorted(chosen)]


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    bits = draw(st.sampled_from([9, 10, 12, 14, 16, 16, 18, 21]))
    cluster = 1 << bits
    options = {"cluster_size": str(cluster)}
    size = draw(
        st.one_of(
            st.integers(1, LARGEST // 512).map(lambda sectors: sectors * 512),
            st.integers(1, max(1, LARGEST // cluster)).map(lambda clusters: clusters * cluster),
        )
    )
    if draw(st.integers(0, 4)) == 0:
        options["compat"] = "0.10"
    else:
        options["refcount_bits"] = str(draw(st.sampled_from([1, 2, 8, 16, 16, 32, 64])))
        options["lazy_refcounts"] = draw(st.sampled_from(["on", "off"]))
        options["compression_type"] = draw(st.sampled_from(["zlib", "zstd"]))
        if bits >= 14 and draw(st.booleans()):
            options["extended_l2"] = "on"
    modern = "compat" not in options
    # A snapshot, and each compressed cluster in a host cluster, counts as a reference.
    few_refcounts = options.get("refcount_bits") in {"1", "2"}
    return Layer(
        options,
        size,
        [] if few_refcounts else draw(squeezed_clusters(size, cluster)),
        draw(writes(size, cluster)),
        snapshot=not few_refcounts and draw(st.integers(0, 5)) == 0,
        bitmap=modern and draw(st.integers(0, 5)) == 0,
        grown=draw(st.sampled_from([0, 0, 0, 512, 100 * 512, MiB])) if modern else 0,
    )


def make(layer: Layer, path: Path, below: Path | None, below_format: str) -> None:
    options = ",".join(f"{name}={value}" for name, value in layer.options.items())
    link = ["-b", below.name, "-F", below_format] if below else []
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *link, path, str(layer.size))
    io(path, layer.squeezed)
    io(path, layer.commands)
    if layer.snapshot:
        qemu("qemu-img", "snapshot", "-c", "inside", path)
        io(path, [f"write -P 99 0 {min(layer.size, 3 * KiB)}", f"discard 0 {layer.size // 3}"])
    if layer.bitmap:
        qemu("qemu-img", "bitmap", "-f", "qcow2", "--add", path, "dirty0")
    if layer.grown and not layer.snapshot:
        qemu("qemu-img", "resize", "-q", "-f", "qcow2", path, str(layer.size + layer.grown))


def io(path: Path, commands: list[str], image_format: str = "qcow2") -> None:
    given_commands = [word for command in commands for word in ("-c", command)]
    if commands:
        qemu("qemu-io", "-t", "unsafe", "-d", "unmap", "-f", image_format, *given_commands, path)


@pytest.mark.sampled
@settings(max_examples=examples(25))
@given(st.lists(layers(), min_size=1, max_size=4), st.sampled_from(["none", "raw", "compressed"]), st.data())
def test_chains_map_and_read_as_in_qemu(stack: list[Layer], root: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(dir=scratch()) as name:
        directory = Path(name)
        below: Path | None = None
        below_format = "qcow2"
        if root != "none":
            below, below_format = made_root(root, directory, data)
        for number, layer in enumerate(stack):
            path = directory / f"{number}.qcow2"
            make(layer, path, below, below_format)
            below, below_format = path, "qcow2"
        assert below is not None
        with scan(below) as chain:
            assert len(chain.files) == len(stack) + (root != "none")
            assert_as_qemu(chain, directory)


def made_root(root: str, directory: Path, data: st.DataObject) -> tuple[Path, str]:
    raw = directory / "root.raw"
    size = data.draw(st.integers(1, 3 * MiB), label="root bytes")
    raw.touch()
    qemu("truncate", "-s", str(size), raw)
    whole = -(-size // 512) * 512
    marks = [f"write -P 7 {whole // 3 // 512 * 512} {min(40 * KiB, whole - whole // 3 // 512 * 512)}"]
    io(raw, marks, "raw")
    if root == "raw":
        return raw, "raw"
    squeezed = directory / "root.qcow2"
    bits = data.draw(st.sampled_from([9, 12, 16, 21]), label="cluster_bits")
    kind = data.draw(st.sampled_from(["zlib", "zstd"]), label="compression")
    given_options = f"cluster_size={1 << bits},compression_type={kind}"
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", given_options, raw, squeezed)
    return squeezed, "qcow2"


CONVERSIONS = [
    [],
    ["-c"],
    ["-c", "-o", "compression_type=zstd"],
    ["-c", "-o", "cluster_size=512"],
    ["-c", "-o", "cluster_size=2M"],
    ["-c", "-o", "cluster_size=2M,compression_type=zstd"],
    ["-c", "-o", "extended_l2=on,cluster_size=16k"],
    ["-o", "compat=0.10"],
    ["-o", "extended_l2=on"],
    ["-o", "preallocation=metadata"],
    ["-o", "preallocation=metadata,extended_l2=on"],
    ["-o", "preallocation=falloc"],
    ["-o", "preallocation=full"],
    ["-o", "cluster_size=512"],
    ["-o", "cluster_size=2M"],
    ["-o", "refcount_bits=1"],
    ["-o", "refcount_bits=64,cluster_size=4k"],
    ["-S", "0"],
    ["-W", "-m", "8"],
]


@pytest.mark.parametrize("options", CONVERSIONS, ids=lambda options: " ".join(options) or "plain")
@pytest.mark.parametrize("odd", [0, 512, 1234])
def test_conversions_of_odd_disks_are_legal(tmp_path: Path, options: list[str], odd: int) -> None:
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    piece = bytes(range(256)) * 16 + bytes(60_000) + b"tail" * 9_000
    content = (piece * 20)[: MiB + odd - 9] + b"the end.\n"
    raw.write_bytes(content)
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, path)
    with scan(path) as chain:
        assert_as_qemu(chain, tmp_path)


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
def test_resized_and_amended_images_are_legal(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"preallocation={mode}", path, "3M")
    io(path, ["write -P 1 0 3M", "write -z 1M 512k"])
    changes: list[list[str | Path]] = [
        ["resize", "-q", "--shrink", "-f", "qcow2", path, str(2 * MiB + 512)],
        ["resize", "-q", f"--preallocation={mode}", "-f", "qcow2", path, str(5 * MiB)],
        ["amend", "-f", "qcow2", "-o", "compat=0.10", path],
        ["amend", "-f", "qcow2", "-o", "compat=1.1", path],
        ["amend", "-f", "qcow2", "-o", "refcount_bits=64", path],
        ["amend", "-f", "qcow2", "-o", "lazy_refcounts=on", path],
    ]
    for change in changes:
        qemu("qemu-img", *change)
        with scan(path) as chain:
            assert_as_qemu(chain, tmp_path)
