"""A disk that was shipped every day for a year: a base and many small layers, put into a repository without images.

What is measured on it (log, restore, merge in the repository) does not care where the layers came from; QEMU would
need an hour to make them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from snapchain.destinations import open_destination
from snapchain.model.extents import DATA, Extents, Int64s, covering
from snapchain.repository.catalogue import Point
from snapchain.repository.deposit import Deposit, Origin
from snapchain.repository.layers import Source, StoredLayer
from tests.bench.measure import KiB, MiB

GRAIN = 4 * KiB


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
    repository = open_destination(str(repository_path), passphrase=lambda: "x", writing=True)
    chain: list[StoredLayer] = []
    points: list[Point] = []
    began = datetime.now(UTC) - timedelta(days=1000)
    with Deposit(repository) as deposit:
        for number, layer in enumerate(layers, 1):
            source = Source(inode=number, size=1, mtime_ns=1, ctime_ns=1)
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
