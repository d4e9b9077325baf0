"""A disk that was shipped every day for a year: a base and many small layers, put into a repository without images.

What is measured on it (log, restore, merge in the repository) does not care where the layers came from; QEMU would
need an hour to make them.  `fill` ships bytes; `record` writes records alone, of guest data that are nowhere: a disk of
a terabyte for what looks at records only.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np

from snapchain.model.content import LEAF_BYTES, content_id, encode_sum
from snapchain.model.extents import DATA, Extents, Int64s, covering
from snapchain.model.fingerprint import Fingerprint
from snapchain.repository import layers as records
from snapchain.repository.catalogue import Point
from snapchain.repository.format import LEAF_ROW, PAGE_ROW, RUN_ROW, fresh_id
from snapchain.repository.index import BlobIndex
from snapchain.repository.ingest import store_page
from snapchain.repository.layer_writer import LayerUpload, Origin
from snapchain.repository.layers import LayerHeader, StoredLayer
from snapchain.repository.opening import open_repository
from snapchain.repository.packer import Packer
from snapchain.repository.pages import PAGE_LEAVES, PAGE_RUNS, PageBuilder, Rows
from snapchain.repository.repository import Repository
from tests.bench.measure import GiB, KiB, MiB

GRAIN = 4 * KiB
BLOCK = 256 * KiB
PACK = 16 * MiB


@dataclass
class Day:
    """A layer (repository.intake.LayerSource). version: int64[size / GRAIN], the day on which each cell was written."""

    extents: Extents
    version: Int64s
    noise: bytes

    @property
    def size(self) -> int:
        return self.extents.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for at in range(0, len(buffer), GRAIN):
            cell = (offset + at) // GRAIN
            start = int(self.version[cell] * 7919 + cell * 104729) * 16 % (len(self.noise) - GRAIN)
            buffer[at : at + GRAIN] = self.noise[start : start + GRAIN]


def days(size: int, count: int, *, writes: int = 300) -> Iterator[Day]:
    """A full base of `size` bytes, then `count` layers of `writes` writes of 4 to 256 KiB, half to hot places."""
    draw = random.Random(4)
    noise = draw.randbytes(2 * MiB) + bytes(range(256)) * 8192
    version = np.zeros(size // GRAIN, np.int64)
    yield Day(Extents.constant(size, DATA), version.copy(), noise)
    hot = [draw.randrange(size // GRAIN - 64) for _ in range(1000)]
    for day in range(1, count + 1):
        first = np.array(
            [draw.choice(hot) if draw.random() < 0.5 else draw.randrange(len(version) - 64) for _ in range(writes)]
        )
        first.sort()
        length = np.array([draw.choice((1, 1, 2, 4, 16, 64)) for _ in range(writes)])
        for start, cells in zip(first.tolist(), length.tolist(), strict=True):
            version[start : start + cells] = day
        yield Day(covering(size, first * GRAIN, (first + length) * GRAIN), version.copy(), noise)


def fill(repository_path: Path, disk: str, layers: Iterator[Day]) -> None:
    """Ship them all, one point a day, into a repository that exists."""
    repository = open_repository(str(repository_path), passphrase=lambda: "x", writing=True)
    chain: list[StoredLayer] = []
    points: list[Point] = []
    began = datetime.now(UTC) - timedelta(days=1000)
    with LayerUpload(repository) as deposit:
        for number, layer in enumerate(layers, 1):
            source = Fingerprint(inode=number, size=1, mtime_ns=1, ctime_ns=1)
            origin = Origin("disk.qcow2", "qcow2", 65536, (source,))
            chain.append(deposit.add(layer, chain, origin, on_bytes=lambda _: None, confirm=lambda: None))
            head = chain[-1].header
            time = began + timedelta(days=number)
            points.append(
                Point(point=number, time=time, labels=(), layer=head.id, size=head.size, content_id=head.content_id)
            )
        links = {upper.id: lower.id if lower else None for lower, upper in zip([None, *chain], chain, strict=False)}
        repository.disk(disk).advance(
            None, time=datetime.now(UTC), next_point=len(points) + 1, points=tuple(points), parents=links
        )


def record(repository: Repository, disk: str, size: int, count: int, *, used: int, writes: int) -> None:
    """A base with DATA in a `used` part of `size` bytes, and `count` days of `writes` writes of 4 KiB to 1 MiB to it.

    Half of the writes go to a twentieth of it.  The packs with guest data that the records name do not exist.
    """
    draw = np.random.default_rng(6)
    regions = np.sort(draw.choice(size // GiB, used // GiB, replace=False)) * GiB
    began = datetime(2026, 1, 1, 3, tzinfo=UTC)
    made: list[LayerHeader] = []
    with Packer(repository.store, repository.keys, BlobIndex()) as packer:
        for day in range(count):
            if day:
                offset = draw.integers(0, used, writes)
                offset[: writes // 2] //= 20
                start = (regions[offset // GiB] + offset % GiB) // GRAIN * GRAIN
                length = draw.choice(np.array([4, 4, 8, 16, 64, 256, 1024]) * KiB, writes)
                extents = covering(size, np.sort(start), np.minimum(start + length, size)[np.argsort(start)])
            else:
                extents = covering(size, regions, regions + GiB)
            made.append(_record_layer(repository, packer, draw, extents, began + timedelta(days=day)))
    points = tuple(
        Point(point=number, time=head.time, layer=head.id, size=size, content_id=head.content_id)
        for number, head in enumerate(made, 1)
    )
    ids = [head.id for head in made]
    parents = dict(zip(ids, [None, *ids], strict=False))
    repository.disk(disk).advance(None, time=began, next_point=count + 1, points=points, parents=parents)


def _record_layer(
    repository: Repository, packer: Packer, draw: np.random.Generator, extents: Extents, time: datetime
) -> LayerHeader:
    """A layer whose DATA are where `extents` say, in blobs of a block each; ids and hashes are noise."""
    builder, table = PageBuilder(), [np.empty(0, PAGE_ROW)]
    packs = [secrets.token_hex(16) for _ in range(-(-extents.data_bytes // PACK) + 1)]
    place = 0
    for runs, leaves in _loads(extents, draw):
        at = place + np.cumsum(runs["length"]) - runs["length"]
        runs["pack"], runs["offset"] = at // PACK, at % PACK
        place += int(runs["length"].sum())
        used, where = np.unique(runs["pack"], return_inverse=True)
        runs["pack"] = where
        builder.add(runs, [packs[pack] for pack in used.tolist()], leaves)
        if builder.is_full:
            table.append(store_page(builder, keys=repository.keys, packer=packer))
    table.append(store_page(builder, keys=repository.keys, packer=packer))
    packer.flush()
    pages = np.concatenate(table)
    total = draw.integers(0, 65536, 1024, dtype=np.uint16)
    header = LayerHeader(
        id=fresh_id(),
        size=extents.size,
        time=time,
        name="disk.qcow2",
        image_format="qcow2",
        cluster_size=65536,
        data_bytes=int(pages["data"].sum()),
        zero_bytes=0,
        content_sum=encode_sum(total),
        content_id=content_id(extents.size, total),
    )
    records.write(repository.store, repository.keys, header, pages)
    return header


def _loads(extents: Extents, draw: np.random.Generator) -> Iterator[tuple[Rows, Rows]]:
    """RUN_ROWs of at most a block, without their places, and LEAF_ROWs; no more at a time than half a page takes."""
    start, stop = (part[extents.val == DATA] for part in (extents.at, extents.ends))
    count = -(-stop // BLOCK) - start // BLOCK
    first = np.repeat(np.cumsum(count) - count, count)
    block = np.repeat(start // BLOCK, count) + np.arange(len(first)) - first
    begin = np.maximum(block * BLOCK, np.repeat(start, count))
    end = np.minimum((block + 1) * BLOCK, np.repeat(stop, count))
    most = min(PAGE_RUNS, PAGE_LEAVES * LEAF_BYTES // BLOCK) // 2
    apart = np.flatnonzero(np.append(begin[1:] // LEAF_BYTES > (end[:-1] - 1) // LEAF_BYTES, True)) + 1
    edges = [0, *apart[np.searchsorted(apart, np.arange(most, len(begin), most))].tolist(), len(begin)]
    for low, high in pairwise(edges):
        runs = np.zeros(high - low, RUN_ROW)
        runs["start"], runs["length"] = begin[low:high], end[low:high] - begin[low:high]
        runs["raw"] = runs["length"]
        runs["stored"] = runs["raw"] + 16
        runs["id"] = draw.integers(0, 256, (len(runs), 32), dtype=np.uint8)
        numbers = _leaves(begin[low:high], end[low:high])
        leaves = np.zeros(len(numbers), LEAF_ROW)
        leaves["index"] = numbers
        leaves["hash"] = draw.integers(0, 256, (len(numbers), 32), dtype=np.uint8)
        yield runs, leaves


def _leaves(begin: Int64s, end: Int64s) -> Int64s:
    """The leaves that ranges touch, each once."""
    first, count = begin // LEAF_BYTES, -(-end // LEAF_BYTES) - begin // LEAF_BYTES
    skip = np.repeat(np.cumsum(count) - count, count)
    return np.unique(np.repeat(first, count) + np.arange(len(skip)) - skip)
