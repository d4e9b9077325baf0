"""What a repository stores: by kind of object, by disk, and what each point added. Reads records, no guest data.

    the newest catalogue of each disk -> its layers -> their pages -> blobs: (pack, offset, disk, point) rows

A blob counts once, whoever names it.  It belongs to the first point of a disk that needs it, and to a disk alone when
no other disk names it.  The rows of all disks are too many to be kept: they are spread over temporary files by pack,
and counted one file after the other.  So the memory is that of one share, and of 16 bytes a point.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import IO, Self

import numpy as np
import numpy.typing as npt

from snapchain.destination.records import Finding, Findings
from snapchain.destination.usage import DiskUsage, KindUsage, StoredUsage, disk_usage
from snapchain.errors import Corrupt, NotFound, SnapchainError, Unsupported
from snapchain.host.files import anonymous_file, temporary_directory
from snapchain.host.os_errors import os_errors
from snapchain.model.events import OnEvent, Progress, Unit, ignore
from snapchain.model.extents import Int64s
from snapchain.repository.catalogue import Catalogue
from snapchain.repository.layers import StoredLayer
from snapchain.repository.repository import Repository

_ROW = np.dtype(
    [
        ("pack", "<u4"),
        ("offset", "<u4"),
        ("disk", "<u4"),
        ("point", "<u4"),
        ("stored", "<u4"),
        ("raw", "<u4"),
        ("map", "?"),
    ]
)
"""A blob that a layer names.

point: place of the first point of the disk whose chain has the layer; map: it is a page of a layer
"""
_EPOCH, _TICK = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)
_SHARES = 64
_IN_MEMORY = 64 << 20
"""Bytes of rows, before they are written to the temporary files."""
_BESIDE_A_TABLE = 200
"""Bytes that an array takes beside its rows."""
_AT_ONCE = 16
"""Layers that are read at the same time."""


def usage(repository: Repository, disk: str | None = None, *, on_event: OnEvent = ignore) -> StoredUsage:
    """Count all. disk: of which the points are listed, with what each added

    Damaged layers and disks are left out, and are findings. Raises NotFound, Unavailable, and as writing a file.
    """
    if disk is not None:
        repository.catalogue(disk)
    kinds = _kinds(repository)
    findings = Findings()
    disks: list[_Points] = []
    lost: list[DiskUsage] = []
    keys = repository.disk_keys()
    with _Rows() as rows, ThreadPoolExecutor(_AT_ONCE, "layers") as pool:
        for number, key in enumerate(keys):
            on_event(Progress("count", number, len(keys), Unit.OBJECTS))
            try:
                catalogue = repository.catalogue_of(key)
            except (Corrupt, Unsupported) as error:
                finding = Finding.of(error, None, ())
                findings.add(finding)
                lost.append(DiskUsage(disk=f"unknown disk {key}", trouble=finding))
                continue
            if catalogue is not None:
                _add(repository, pool, rows, len(disks), catalogue, findings)
                disks.append(_Points.of(catalogue))
        if repository.memory is not None:
            repository.memory.flush()
        counted = _Counted([len(each.numbers) for each in disks])
        for share in rows.shares():
            counted.add(share)
    found = [
        _disk(each, counted, place, rows.data[place], lists_points=each.name == disk)
        for place, each in enumerate(disks)
    ]
    packs = next((each.bytes for each in kinds if each.kind == "packs"), 0)
    return StoredUsage(
        destination=repository.store.url,
        kinds=kinds,
        disks=tuple(sorted([*found, *lost], key=lambda each: each.disk)),
        data_bytes=sum(rows.data.values()),
        unique_bytes=counted.unique,
        blob_bytes=counted.blobs,
        map_bytes=counted.maps,
        unreferenced_bytes=max(0, packs - counted.blobs - counted.maps),
        findings=findings.all(),
    )


@dataclass(frozen=True, slots=True)
class _Points:
    """The points of a disk. times: microseconds since 1970"""

    name: str
    numbers: array[int]
    times: array[int]

    @classmethod
    def of(cls, catalogue: Catalogue) -> _Points:
        numbers = array("q", (each.point for each in catalogue.points))
        return cls(catalogue.disk, numbers, array("q", ((each.time - _EPOCH) // _TICK for each in catalogue.points)))

    def rows(self) -> list[tuple[int, datetime]]:
        """(number, time in UTC), ascending."""
        return [(number, _EPOCH + time * _TICK) for number, time in zip(self.numbers, self.times, strict=True)]


def _kinds(repository: Repository) -> tuple[KindUsage, ...]:
    objects: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for info in repository.store.list(""):
        kind = info.name.partition("/")[0]
        objects[kind] += 1
        size[kind] += info.size
    return tuple(KindUsage(kind=kind, objects=objects[kind], bytes=size[kind]) for kind in sorted(objects))


def first_points(catalogue: Catalogue) -> dict[str, int]:
    """layer -> place of the first point whose chain has it; of those that no point needs, the number of points."""
    found: dict[str, int] = {}
    for place, point in enumerate(catalogue.points):
        at: str | None = point.layer
        while at is not None and at not in found and at in catalogue.parents:
            found[at] = place
            at = catalogue.parents[at]
    return {layer: found.get(layer, len(catalogue.points)) for layer in catalogue.parents}


def _add(
    repository: Repository, pool: Executor, rows: _Rows, disk: int, catalogue: Catalogue, findings: Findings
) -> None:
    """All layers of a disk, some of them read at once."""

    def load(name: str) -> _Named | SnapchainError:
        try:
            return _named(repository.layer(name))
        except (Corrupt, Unsupported) as error:
            return error.detached()

    first = first_points(catalogue)
    names = list(first)
    for at in range(0, len(names), _AT_ONCE):
        some = names[at : at + _AT_ONCE]
        for name, found in zip(some, pool.map(load, some), strict=True):
            if not isinstance(found, SnapchainError):
                rows.add(found, disk, first[name])
            elif _is_still_named(repository, catalogue, name):
                points = [each.point for each in catalogue.points[first[name] :]]
                findings.add(Finding.of(found, catalogue.disk, points))


def _is_still_named(repository: Repository, catalogue: Catalogue, layer: str) -> bool:
    """Whether a layer that cannot be read is no layer that was merged away, and collected, since."""
    try:
        return layer in repository.catalogue(catalogue.disk).parents
    except NotFound:
        return False
    except SnapchainError:
        return True


@dataclass(frozen=True, slots=True)
class _Named:
    """The blobs that a layer names, its pages among them.

    data: guest bytes; tables: names of packs, and rows in which `pack` is a place among these
    """

    data: int
    tables: list[tuple[Sequence[str], npt.NDArray[np.void]]]


def _named(layer: StoredLayer) -> _Named:
    """Reads all pages of a layer. Raises Corrupt when one is lost."""
    table = layer.table
    pages = [bytes(row["pack"]).hex() for row in table]
    tables: list[tuple[Sequence[str], npt.NDArray[np.void]]] = [
        (pages, _rows(np.arange(len(table)), table, is_map=True))
    ]
    for page in layer.each_page(0, layer.size):
        runs = page.runs[page.runs["stored"] != 0]
        tables.append((page.packs, _rows(runs["pack"], runs, is_map=False)))
    return _Named(int(table["data"].sum()), tables)


def _rows(place: npt.NDArray[np.integer], blobs: npt.NDArray[np.void], *, is_map: bool) -> npt.NDArray[np.void]:
    """A row for each stretch of runs of one blob. place: of the pack of each"""
    rows = np.zeros(len(blobs), _ROW)
    rows["pack"], rows["map"] = place, is_map
    for field in ("offset", "stored", "raw"):
        rows[field] = blobs[field]
    return rows[np.append(True, _differs(rows, "pack") | _differs(rows, "offset"))] if len(rows) else rows


class _Rows:
    """The blobs that layers name, in shares by pack. A context manager: its files are gone at the end.

    data: guest bytes of the layers of each disk
    """

    def __init__(self) -> None:
        self.data: Counter[int] = Counter()
        self._packs: dict[str, int] = {}
        self._waiting: list[npt.NDArray[np.void]] = []
        self._bytes = 0
        self._stack = ExitStack()
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, named: _Named, disk: int, point: int) -> None:
        """The blobs of a layer of a disk. point: place of the first point that has it"""
        self.data[disk] += named.data
        for packs, rows in named.tables:
            if not len(rows):
                continue
            numbers = np.array([self._packs.setdefault(pack, len(self._packs)) for pack in packs], np.uint32)
            rows["pack"], rows["disk"], rows["point"] = numbers[rows["pack"]], disk, point
            self._waiting.append(rows)
            self._bytes += rows.nbytes + _BESIDE_A_TABLE
        if self._bytes > _IN_MEMORY:
            self._spill()

    def _spill(self) -> None:
        if not self._files:
            self._files = [self._stack.enter_context(anonymous_file()) for _ in range(_SHARES)]
        rows = np.concatenate(self._waiting)
        share = rows["pack"] % _SHARES
        for number, file in enumerate(self._files):
            with os_errors(temporary_directory()):
                file.write(rows[share == number].tobytes())
        self._waiting, self._bytes = [], 0

    def shares(self) -> Iterator[npt.NDArray[np.void]]:
        """The rows; all that name one blob come in one share."""
        if not self._files:
            if self._waiting:
                yield np.concatenate(self._waiting)
            return
        if self._waiting:
            self._spill()
        for file in self._files:
            file.seek(0)
            yield np.frombuffer(file.read(), _ROW)


class _Counted:
    """Sums over distinct blobs, in bytes. points: how many each disk has"""

    def __init__(self, points: Sequence[int]) -> None:
        self.unique = self.blobs = self.maps = 0
        self._disks = len(points)
        # One slot more for each disk: what no point needs.
        self._base = np.concatenate([[0], np.cumsum(np.array(points, np.int64) + 1)]).astype(np.int64)
        self.stored = np.zeros(self._disks, np.int64)
        self.own = np.zeros(self._disks, np.int64)
        self._added = np.zeros(int(self._base[-1]), np.int64)

    def add(self, rows: npt.NDArray[np.void]) -> None:
        """One share."""
        if not len(rows):
            return
        rows = rows[np.lexsort((rows["point"], rows["disk"], rows["offset"], rows["pack"]))]
        blob = np.append(True, _differs(rows, "pack") | _differs(rows, "offset"))
        of_disk = blob | np.append(True, _differs(rows, "disk"))
        stored = rows["stored"].astype(np.int64)
        is_map = rows["map"]
        self.unique += int(rows["raw"][blob & ~is_map].astype(np.int64).sum())
        self.blobs += int(stored[blob & ~is_map].sum())
        self.maps += int(stored[blob & is_map].sum())
        number = np.cumsum(blob) - 1
        alone = (np.bincount(number[of_disk]) == 1)[number] & of_disk
        disk = rows["disk"].astype(np.int64)
        np.add.at(self.stored, disk[of_disk], stored[of_disk])
        np.add.at(self.own, disk[alone], stored[alone])
        # The rows of a disk are in the order of its points: the first one is the point that added the blob.
        np.add.at(self._added, self._base[disk[of_disk]] + rows["point"][of_disk], stored[of_disk])

    def added(self, disk: int) -> Int64s:
        """int64[points + 1]: by each point of a disk, and by layers that no point needs."""
        return self._added[int(self._base[disk]) : int(self._base[disk + 1])]


def _differs(rows: npt.NDArray[np.void], field: str) -> npt.NDArray[np.bool_]:
    column = rows[field]
    return np.asarray(column[1:] != column[:-1])


def _disk(disk: _Points, counted: _Counted, place: int, data: int, *, lists_points: bool) -> DiskUsage:
    *added, other = counted.added(place).tolist()
    return disk_usage(
        disk.name,
        disk.rows(),
        added,
        lists_points=lists_points,
        stored_bytes=int(counted.stored[place]),
        own_bytes=int(counted.own[place]),
        data_bytes=data,
        other_bytes=other,
    )
