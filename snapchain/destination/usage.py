"""What a destination stores, as `stats` shows it: by kind, by disk, and by point."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from pydantic import computed_field

from snapchain.destination.records import Finding, Record


class KindUsage(Record):
    """Objects, or files, of one kind. kind: such as packs, index, layers; bytes: stored"""

    kind: str
    objects: int
    bytes: int


class PointUsage(Record):
    """A point. added_bytes: stored bytes that it needs and no earlier point of its disk does"""

    point: int
    time: datetime
    added_bytes: int


MONTH = timedelta(days=30)


class DiskUsage(Record):
    """A disk. Sizes in bytes.

    stored_bytes: all that its points need; own_bytes: of them, those that no other disk needs
    data_bytes: guest data of its layers, as they were read
    point_count: how many points; added_bytes: by the newest one; month_bytes: by all of the 30 days before it
    other_bytes: of layers that no point needs yet, or any more
    points: ascending, with what each added; only where this disk was asked for
    trouble: why it cannot be counted
    """

    disk: str
    stored_bytes: int = 0
    own_bytes: int = 0
    data_bytes: int = 0
    other_bytes: int = 0
    point_count: int = 0
    added_bytes: int = 0
    month_bytes: int = 0
    points: tuple[PointUsage, ...] = ()
    trouble: Finding | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def shared_bytes(self) -> int:
        """What other disks need, too."""
        return self.stored_bytes - self.own_bytes


def disk_usage(
    name: str, points: Sequence[tuple[int, datetime]], added: Sequence[int], *, lists_points: bool, **sizes: int
) -> DiskUsage:
    """points: (number, time), ascending; added: bytes by each; sizes: the other fields"""
    newest = max((time for _, time in points), default=None)
    month = 0
    if newest is not None:
        month = sum(count for (_, time), count in zip(points, added, strict=True) if time > newest - MONTH)
    return DiskUsage(
        disk=name,
        point_count=len(points),
        added_bytes=added[-1] if added else 0,
        month_bytes=month,
        points=tuple(
            PointUsage(point=number, time=time, added_bytes=count)
            for (number, time), count in zip(points, added, strict=True)
        )
        if lists_points
        else (),
        **sizes,
    )


class StoredUsage(Record):
    """A destination. Sizes in bytes.

    kinds: of objects; disks: by name
    data_bytes: guest data of all layers, as they were read; unique_bytes: of them, what is left without repetitions
    blob_bytes: what these take, compressed and encrypted; map_bytes: what the maps of layers take
    All three are 0 where repetitions are not found and nothing is compressed.
    unreferenced_bytes: of packs, that no record names: `gc` frees them, or most of them
    month_cost: of all objects, in `currency`; None without a table of prices, and where no requests are counted
    findings: damage for which something is not counted
    """

    destination: str
    kinds: tuple[KindUsage, ...]
    disks: tuple[DiskUsage, ...]
    data_bytes: int = 0
    unique_bytes: int = 0
    blob_bytes: int = 0
    map_bytes: int = 0
    unreferenced_bytes: int = 0
    month_cost: float | None = None
    currency: str | None = None
    findings: tuple[Finding, ...] = ()

    @computed_field  # type: ignore[prop-decorator]
    @property
    def stored_bytes(self) -> int:
        """All objects or files."""
        return sum(each.bytes for each in self.kinds)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def deduplication(self) -> float | None:
        """How often a byte of guest data is needed, on average; None where nothing is stored."""
        return self.data_bytes / self.unique_bytes if self.unique_bytes else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def compression(self) -> float | None:
        """How many bytes of guest data one stored byte holds, repetitions left out; None where nothing is stored."""
        return self.unique_bytes / self.blob_bytes if self.blob_bytes else None
