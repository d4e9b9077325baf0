"""What a shipment costs where the indexes list 100 million blobs: memory, bytes read, time; beside an empty repository.

`SNAPCHAIN_BENCH_BLOBS=1000000 make bench ARGS='-k large_index'` takes seconds and 60 MB instead of minutes and 6 GB.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from snapchain.objects.local import LocalStore
from snapchain.repository import index as indexes, samples
from snapchain.repository.format import BLOB_ROW
from snapchain.repository.index import IndexedPack
from snapchain.repository.repository import Repository
from snapchain.repository.samples import Samples
from tests.bench.measure import Cost, GiB, KiB, MiB, mixed, qemu_img, run, snapchain

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3000)]

BLOBS = int(os.environ.get("SNAPCHAIN_BENCH_BLOBS", "100_000_000"))
PER_PACK = 100
SIZE = 512 * MiB

COUNTED = """
import os
from snapchain.objects.local import LocalStore
file = open("counted", "w", buffering=1)
get, listing = LocalStore.get, LocalStore.list
def counted(self, name, **how):
    data = get(self, name, **how)
    if name.startswith("index/"):
        print("read", len(data), file=file)
    return data
def counted_list(self, prefix):
    found = list(listing(self, prefix))
    print("listed", len(found), file=file)
    return iter(found)
LocalStore.get, LocalStore.list = counted, counted_list
from snapchain.cli import program
program()
"""


def packs(draw: np.random.Generator) -> Iterator[IndexedPack]:
    """Packs that do not exist, of blobs of a block each."""
    rows = np.zeros(PER_PACK, BLOB_ROW)
    rows["offset"], rows["stored"], rows["raw"] = np.arange(PER_PACK) * 160 * KiB + 16, 160 * KiB, 256 * KiB
    for _ in range(BLOBS // PER_PACK):
        ids = np.frombuffer(draw.bytes(PER_PACK * 32), np.uint8).reshape(-1, 32)
        yield IndexedPack(secrets.token_hex(16), 16 * MiB, ids, rows.copy())


def fill(folder: Path, *, sampled: bool) -> None:
    """Indexes as a gc leaves them, or as a version without samples did."""
    store = LocalStore(folder)
    repository = Repository.open(store, passphrase=lambda: "x")
    parts: list[Samples] = []
    for group in indexes.split(packs(np.random.default_rng(1))):
        name = indexes.write(store, repository.keys, group, era=0)
        if sampled:
            parts.append(samples.of({name: samples.ids_of(group)}))
    for some in samples.together(parts, {name for part in parts for name in part.indexes}):
        samples.write(store, repository.keys, some)


def shipped(folder: Path, image: Path, repository: Path, disk: str) -> tuple[Cost, dict[str, int]]:
    """What it cost; bytes and number of index objects read, names listed."""
    cost = run([sys.executable, "-c", COUNTED, "ship", image, f"{repository}::{disk}"], folder)
    rows = [line.split() for line in (folder / "counted").read_text().splitlines()]
    read = [int(count) for what, count in rows if what == "read"]
    listed = sum(int(count) for what, count in rows if what == "listed")
    return cost, {"index": sum(read), "objects": len(read), "listed": listed}


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "as of old"])
def test_a_shipment_into_a_large_index(tmp_path: Path, sampled: bool) -> None:
    image, changed = tmp_path / "disk.raw", tmp_path / "changed.qcow2"
    mixed(image, SIZE)
    qemu_img("create", "-q", "-f", "qcow2", "-b", image, "-F", "raw", changed)
    table: dict[str, list[tuple[Cost, dict[str, int]]]] = {}
    for name in ("empty", "large"):
        snapchain(tmp_path, "init", tmp_path / name)
        if name == "large":
            fill(tmp_path / name, sampled=sampled)
        place = tmp_path / name
        table[name] = [
            shipped(tmp_path, image, place, "web1/vda"),
            shipped(tmp_path, image, place, "web1/vda"),
            shipped(tmp_path, image, place, "web2/vda"),
            shipped(tmp_path, changed, place, "web1/vda"),
        ]
    size = sum(path.stat().st_size for path in (tmp_path / "large" / "index").iterdir())
    print(f"\n{BLOBS:,} blobs, indexes of {size / GiB:.2f} GiB")
    print(f"{'':24}{'empty s':>9}{'large s':>9}{'memory MB':>11}{'read MB':>9}{'objects':>9}{'listed':>9}")
    words = ("the first disk", "again, unchanged", "the same as another disk", "an empty overlay")
    for at, what in enumerate(words):
        (without, _), (cost, read) = table["empty"][at], table["large"][at]
        print(
            f"{what:24}{without.seconds:9.2f}{cost.seconds:9.2f}{cost.peak / MiB:11.0f}"
            f"{read['index'] / MiB:9.1f}{read['objects']:9}{read['listed']:9}"
        )
        assert cost.peak < GiB
        assert read["index"] <= 64 * MiB
