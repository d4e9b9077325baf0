"""diff: which guest bytes differ between two points, two images, or a point and an image.

Compared are leaves of 64 KiB.  Layers that both sides share are left out, so two points of one disk cost what
changed between them; points answer from their records, images are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from snapchain.destination.reading import PointLeaves
from snapchain.image import ImageChain
from snapchain.model.content import LEAF_BYTES, ZERO_LEAF, Hashes, leaf_hash
from snapchain.model.events import OnEvent, ignore
from snapchain.model.extents import ABSENT, DATA, Extents, Int64s, covering, pairwise, rounded
from snapchain.source.at_rest import ImageAtRest

_WINDOW = 64 * 1024 * 1024


class Range(BaseModel):
    """Guest bytes [offset, offset + length)."""

    model_config = ConfigDict(frozen=True)

    offset: int
    length: int


class DiffReport(BaseModel):
    """Where two disks differ. granularity: bytes; a range may hold equal bytes beside different ones."""

    model_config = ConfigDict(frozen=True)

    old: str
    new: str
    old_size: int
    new_size: int
    identical: bool
    changed_bytes: int
    granularity: int
    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class ImageSide:
    """An image, read: a PointLeaves."""

    name: str
    chain: ImageChain

    @property
    def size(self) -> int:
        return self.chain.size

    @cached_property
    def _view(self) -> Extents:
        return rounded(self.chain.resolve(), LEAF_BYTES)

    def parts(self) -> Sequence[tuple[object, Extents]]:
        return [((file.device, file.fingerprint), file.extents) for file in self.chain.files]

    def leaves(self, first: int, stop: int) -> tuple[Int64s, Hashes]:
        index: list[int] = []
        hashes: list[bytes] = []
        buffer = memoryview(bytearray(LEAF_BYTES))
        for at in range(first, min(stop, self.size), LEAF_BYTES):
            if self._view.at_offset(at) == ABSENT:
                continue
            part = buffer[: min(LEAF_BYTES, self.size - at)]
            self.chain.read_into(at, part)
            digest = leaf_hash(part)
            if digest != ZERO_LEAF:
                index.append(at // LEAF_BYTES)
                hashes.append(digest)
        return np.array(index, np.int64), np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, len(ZERO_LEAF))


@contextmanager
def image_side(
    path: Path,
    *,
    format: str | None = None,
    image_dirs: Sequence[Path] = (),
    on_event: OnEvent = ignore,
) -> Iterator[ImageSide]:
    """An image as one side of a comparison, locked against writers. Raises what `scan` raises."""
    source = ImageAtRest(path, format=format, image_dirs=image_dirs, on_event=on_event)
    with source.opened() as chain:
        yield ImageSide(str(path), chain)
        source.check_unchanged(chain)


def diff(old: PointLeaves, new: PointLeaves) -> DiffReport:
    """Compare two disks: images, or points of destinations (`destination.leaves`)."""
    ranges: list[tuple[int, int]] = []
    common = min(old.size, new.size)
    for first, stop in windows(candidates(old, new), common):
        mine = dict(zip(*_plain(old.leaves(first, stop)), strict=True))
        theirs = dict(zip(*_plain(new.leaves(first, stop)), strict=True))
        for leaf in sorted(mine.keys() | theirs.keys()):
            if mine.get(leaf) != theirs.get(leaf):
                _extend(ranges, leaf * LEAF_BYTES, min((leaf + 1) * LEAF_BYTES, common))
    if old.size != new.size:
        _extend(ranges, common, max(old.size, new.size))
    return DiffReport(
        old=old.name,
        new=new.name,
        old_size=old.size,
        new_size=new.size,
        identical=not ranges,
        changed_bytes=sum(stop - first for first, stop in ranges),
        granularity=LEAF_BYTES,
        ranges=tuple(Range(offset=first, length=stop - first) for first, stop in ranges),
    )


class Parts(Protocol):
    """Of a disk what tells where another one can differ: see PointLeaves."""

    @property
    def size(self) -> int: ...

    def parts(self) -> Sequence[tuple[object, Extents]]: ...


def candidates(old: Parts, new: Parts) -> Extents:
    """DATA on whole leaves that layers which only one side has speak of."""
    mine, theirs = list(old.parts()), list(new.parts())
    shared = 0
    while shared < min(len(mine), len(theirs)) and mine[shared][0] == theirs[shared][0]:
        shared += 1
    size = max(old.size, new.size)
    found = Extents.absent(size)
    for _, extents in (*mine[shared:], *theirs[shared:]):
        found = _union(found, rounded(extents, LEAF_BYTES).resized(size, ABSENT))
        if extents.size < size:
            # Past the end of a shorter layer nothing of the shared ones shows.
            start = np.array([extents.size // LEAF_BYTES * LEAF_BYTES], np.int64)
            found = _union(found, covering(size, start, np.array([size], np.int64)))
    return found


def _union(left: Extents, right: Extents) -> Extents:
    at, one, other = pairwise(left, right)
    return Extents.from_starts(left.size, at, np.maximum(one, other)) if left.size else left


def windows(found: Extents, stop: int) -> Iterator[tuple[int, int]]:
    """The DATA of a map up to `stop`, in ranges of at most 64 MiB."""
    for start, length, val in found.runs():
        for at in range(start, min(start + length, stop), _WINDOW) if val == DATA else ():
            yield at, min(at + _WINDOW, start + length, stop)


def _plain(leaves: tuple[Int64s, Hashes]) -> tuple[list[int], list[bytes]]:
    index, hashes = leaves
    return index.tolist(), [bytes(row) for row in hashes]


def _extend(ranges: list[tuple[int, int]], first: int, stop: int) -> None:
    if ranges and ranges[-1][1] == first:
        ranges[-1] = ranges[-1][0], stop
    else:
        ranges.append((first, stop))
