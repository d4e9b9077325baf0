"""What the worst files cost: each is scanned by a process of its own, whose time and memory are counted."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fixtures.qcow2_bytes import COMPRESSED, COPIED
from snapchain.image.qcow2.format import HeaderFields, Incompatible

TiB = 1 << 40
SECONDS = 2.0
MEMORY_MIB = 200
MAX_L1 = 4 << 20

PROBE = """
import re, sys, time
start = time.process_time()
from snapchain.errors import SnapchainError
from snapchain.image import scan
try:
    with scan(sys.argv[1]) as chain:
        said = f"runs {len(chain.top.physical)} extents {len(chain.resolve())}"
except SnapchainError as error:
    said = f"{type(error).__name__}: {error.message}"
# Of the processor: the machine may be busy with other tests.
taken = time.process_time() - start
# Not ru_maxrss: that of the process that started this one counts in it.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print(taken, peak / 1024, said, sep="|")
"""


def probed(path: Path) -> tuple[float, float, str]:
    """(seconds, peak MiB, what happened) of a scan, imports included."""
    done = subprocess.run([sys.executable, "-c", PROBE, str(path)], check=True, capture_output=True, text=True)
    taken, peak, said = done.stdout.strip().split("|")
    return float(taken), float(peak), said


def write(
    path: Path,
    *,
    cluster_bits: int,
    entries: npt.NDArray[np.uint64],
    file_size: int = 0,
    shuffled_tables: bool = False,
    **fields: int,
) -> None:
    """Header, refcount table, L1, then all L2 tables; `entries` are u64 words of L2 tables."""
    cluster = 1 << cluster_bits
    tables = entries.nbytes // cluster
    extended = bool(fields.get("incompatible_features", 0) & Incompatible.EXTENDED_L2)
    l1_clusters = -(-tables * 8 // cluster)
    first = 2 + l1_clusters
    places = np.arange(first, first + tables, dtype=np.uint64)
    if shuffled_tables:
        np.random.default_rng(1).shuffle(places)
    header = HeaderFields(
        cluster_bits=cluster_bits,
        size=entries.nbytes // (16 if extended else 8) * cluster,
        l1_size=tables,
        l1_table_offset=2 * cluster,
        refcount_table_offset=cluster,
        refcount_table_clusters=1,
        **fields,
    )
    with path.open("wb") as file:
        file.write(header.pack())
        file.seek(2 * cluster)
        file.write((places << np.uint64(cluster_bits)).byteswap().tobytes())
        if entries.any():
            file.seek(first * cluster)
            file.write(entries.byteswap().tobytes())
        file.truncate(max(file_size, (first + tables) * cluster))


def fragmented(path: Path, clusters: int, run: int) -> None:
    """Data clusters of 64 KiB, contiguous for `run` of them, then somewhere else."""
    first = 4 + clusters // 8192 + 8
    order = np.random.default_rng(1).permutation(clusters // run)
    host = (first + order[:, None] * run + np.arange(run)).ravel().astype(np.uint64) << np.uint64(16)
    write(path, cluster_bits=16, entries=host | np.uint64(COPIED), file_size=(first + clusters) << 16)


def test_a_fragmented_image_of_a_tebibyte_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    fragmented(path, 1 << 24, 8)
    _, peak, said = probed(path)
    assert said.startswith("runs 20")  # 2 Mi, less where chance has joined two
    assert peak < MEMORY_MIB


def scattered(path: Path) -> None:
    fragmented(path, 1 << 22, 1)


def zero_and_absent(path: Path) -> None:
    entries = np.zeros(1 << 22, np.uint64)
    entries[::2] = 1
    write(path, cluster_bits=16, entries=entries)


def subclusters(path: Path) -> None:
    entries = np.zeros(1 << 20, np.uint64)
    entries[1::2] = 0x5555555500000000
    write(path, cluster_bits=21, entries=entries, incompatible_features=Incompatible.EXTENDED_L2)


def compressed(path: Path) -> None:
    count = 1 << 22
    places = (8 << 20) + np.random.default_rng(1).permutation(count).astype(np.uint64) * np.uint64(100)
    entries = np.uint64(COMPRESSED) | np.uint64(255 << 54) | (places + np.uint64(count * 8))
    write(path, cluster_bits=16, entries=entries, file_size=TiB)


def no_longer_than(path: Path) -> None:
    """As many runs as are accepted."""
    entries = np.zeros(1 << 21, np.uint64)
    entries[::2] = 1
    write(path, cluster_bits=16, entries=entries)


def largest_l1_of_holes(path: Path) -> None:
    """4 Mi L2 tables in disorder, none of which is stored."""
    write(path, cluster_bits=9, entries=np.zeros(MAX_L1 * 64, np.uint64), shuffled_tables=True)


def largest_l1_of_one_table(path: Path) -> None:
    largest_l1_of_holes(path)
    with path.open("r+b") as file:
        file.seek(1024)
        file.write(np.full(MAX_L1, 1024 + MAX_L1 * 8, np.uint64).byteswap().tobytes())


def largest_refcount_table(path: Path) -> None:
    """8 MiB of entries, all of one refcount block."""
    write(path, cluster_bits=21, entries=np.zeros(1 << 18, np.uint64))
    header = HeaderFields.unpack(path.read_bytes()[:112])
    with path.open("r+b") as file:
        moved = 16 << 21
        changed = HeaderFields(
            cluster_bits=21,
            size=header.size,
            l1_size=1,
            l1_table_offset=header.l1_table_offset,
            refcount_table_offset=moved,
            refcount_table_clusters=4,
        )
        file.write(changed.pack())
        file.seek(moved)
        file.write(np.full(1 << 20, 8 << 21, np.uint64).byteswap().tobytes())


WORST: dict[str, tuple[Callable[[Path], None], str]] = {
    "clusters all apart": (scattered, "Unsupported: .* too many extents"),
    "zero and absent in turn": (zero_and_absent, "Unsupported: .* too many extents"),
    "subclusters in turn": (subclusters, "Unsupported: .* too many extents"),
    "compressed, overlapping": (compressed, "Unsupported: .* too many extents"),
    "as many as are accepted": (no_longer_than, "runs 2097152"),
    "the largest L1, of holes": (largest_l1_of_holes, "runs 1 "),
    "the largest L1, of one table": (largest_l1_of_one_table, "Corrupt: overlap"),
    "the largest refcount table": (largest_refcount_table, "Corrupt: overlap"),
}


@pytest.mark.parametrize("name", WORST)
def test_the_worst_files_cost_little_memory(tmp_path: Path, name: str) -> None:
    assert cost_of(tmp_path, name)[1] < MEMORY_MIB


@pytest.mark.bench
@pytest.mark.parametrize("name", WORST)
def test_the_worst_files_cost_little_time(tmp_path: Path, name: str) -> None:
    assert cost_of(tmp_path, name)[0] < SECONDS


def cost_of(tmp_path: Path, name: str) -> tuple[float, float]:
    """(seconds, peak MiB)"""
    build, said_of_it = WORST[name]
    path = tmp_path / "disk.qcow2"
    build(path)
    taken, peak, said = probed(path)
    path.unlink()
    assert re.match(said_of_it, said), said
    return taken, peak
