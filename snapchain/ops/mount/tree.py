"""Which files a destination's disks become. Pure.

web1/vda/7.raw                                a point, by its number
web1/vda/latest.raw -> 7.raw
web1/vda/by-time/2026-11-30T01.00.00Z.raw     -> ../7.raw, in UTC; no colon, which QEMU would take for a protocol
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC

from snapchain.destination.records import DiskRecord, PointRecord

BY_TIME = "by-time"
LATEST = "latest.raw"


@dataclass(frozen=True, slots=True)
class PointFile:
    """A point as a raw file."""

    disk: str
    record: PointRecord


@dataclass(frozen=True, slots=True)
class Link:
    """target: relative"""

    target: str


Folder = dict[str, "Entry"]
Entry = PointFile | Link | Folder


@dataclass(frozen=True, slots=True)
class Files:
    """root: the tree; disks, points: how many of each it has; left_out: sentences"""

    root: Folder
    disks: int
    points: int
    left_out: tuple[str, ...]


def files_of(disks: Iterable[DiskRecord]) -> Files:
    """All points of these disks as files. A disk has no file where another disk has a folder of that name."""
    shown = [disk for disk in disks if disk.record_of is None and disk.points]
    root: Folder = {}
    left_out: list[str] = []
    folders: list[tuple[Folder, DiskRecord]] = []
    for disk in shown:
        parts = disk.name.split("/")
        if any(part in (".", "..") for part in parts):
            left_out.append(f"{disk.name} is left out: no path can have such a name")
            continue
        folder = root
        for part in parts:
            below = folder.setdefault(part, {})
            assert isinstance(below, dict), "there are only folders so far"
            folder = below
        folders.append((folder, disk))
    for folder, disk in folders:
        for name, entry in _entries(disk.name, disk.points):
            if folder.setdefault(name, entry) is not entry:
                left_out.append(f"{disk.name}: {name} is left out, since there is a disk {disk.name}/{name}")
    return Files(root, len(folders), sum(len(disk.points) for _, disk in folders), tuple(left_out))


def _entries(disk: str, points: Sequence[PointRecord]) -> Iterable[tuple[str, Entry]]:
    by_time: Folder = {}
    for record in points:
        name = f"{record.point}.raw"
        yield name, PointFile(disk, record)
        # Of several in one second the newest: that is the point which this time means in an address.
        by_time[f"{record.time.astimezone(UTC):%Y-%m-%dT%H.%M.%SZ}.raw"] = Link(f"../{name}")
    yield LATEST, Link(f"{points[-1].point}.raw")
    yield BY_TIME, by_time


def find(root: Folder, path: str) -> Entry | None:
    """What a path names, None for nothing. path: begins with '/'"""
    entry: Entry = root
    for part in filter(None, path.split("/")):
        if not isinstance(entry, dict) or part not in entry:
            return None
        entry = entry[part]
    return entry
