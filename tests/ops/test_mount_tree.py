"""Which files the points become."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest

from snapchain.destination.guest_record import RECORD_DISK
from snapchain.destination.records import DiskRecord, PointRecord
from snapchain.nbd.exports import OpenedExport
from snapchain.nbd.read_ahead import ReadAhead
from snapchain.ops.mount.run import PointTree, _Handle
from snapchain.ops.mount.tree import Link, PointFile, files_of, find

AT = datetime(2026, 11, 30, 1, 0, 0, 300_000, tzinfo=UTC)


def disk(name: str, *times: datetime) -> DiskRecord:
    points = tuple(
        PointRecord(point=number, time=time, labels=(), virtual_size=512, content_id="c", layers=1)
        for number, time in enumerate(times, 1)
    )
    return DiskRecord(name=name, epoch=1, points=points)


def test_points_by_number_by_time_and_the_latest() -> None:
    second = AT + timedelta(microseconds=5)
    third = (AT + timedelta(hours=1)).astimezone(timezone(timedelta(hours=3)))
    files = files_of([disk("web1/vda", AT, second, third), disk("web1"), disk(f"web1/{RECORD_DISK}", AT)])
    assert (files.disks, files.points, files.left_out) == (1, 3, ())
    assert list(files.root) == ["web1"]
    found = find(files.root, "/web1/vda/2.raw")
    assert isinstance(found, PointFile)
    assert (found.disk, found.record.point) == ("web1/vda", 2)
    assert find(files.root, "/web1/vda/latest.raw") == Link("3.raw")
    assert find(files.root, "/web1/vda/by-time") == {
        "2026-11-30T01.00.00Z.raw": Link("../2.raw"),
        "2026-11-30T02.00.00Z.raw": Link("../3.raw"),
    }
    assert find(files.root, "/") == files.root
    for path in ("/web2", "/web1/vda/2.raw/more", "/web1/vda/by-time/none", "/web1/vdb"):
        assert find(files.root, path) is None


def test_names_that_meet_and_names_that_no_path_can_have() -> None:
    files = files_of([disk("a", AT), disk("a/1.raw", AT), disk("b/../a", AT), disk("./c", AT)])
    assert files.disks == 2
    assert isinstance(find(files.root, "/a/1.raw"), dict), "a folder, so that no disk is out of reach"
    assert find(files.root, "/a/latest.raw") == Link("1.raw")
    assert isinstance(find(files.root, "/a/1.raw/1.raw"), PointFile)
    assert files.left_out == (
        "b/../a is left out: no path can have such a name",
        "./c is left out: no path can have such a name",
        "a: 1.raw is left out, since there is a disk a/1.raw",
    )


def test_a_short_read_is_an_error() -> None:
    """The kernel would take what is missing for zeroes."""
    reading: Any = SimpleNamespace(size=512, most_ahead=0, ready=lambda offset, _length: [(offset, 100, bytes(100))])
    unused: Any = None
    tree = PointTree(unused, None, files_of([]), unused, unused)
    tree._handles[1] = _Handle("a", unused, OpenedExport("a", reading, lambda: None), ReadAhead(0))
    assert tree.read(1, 412, 4096) == bytes(100)
    with pytest.raises(OSError, match=r"Errno 5\] a"):
        tree.read(1, 0, 512)
    assert tree.read(1, 512, 4096) == b""


def test_a_dropped_point_has_a_status_while_it_is_open() -> None:
    unused: Any = None
    tree = PointTree(unused, None, files_of([]), unused, unused)
    entry = find(files_of([disk("a", datetime(2026, 11, 30, tzinfo=UTC))]).root, "/a/1.raw")
    assert isinstance(entry, PointFile)
    tree._handles[1] = _Handle("a/1.raw", entry, OpenedExport("a", unused, lambda: None), ReadAhead(0))
    assert tree.status("/a/1.raw").size == entry.record.virtual_size
    tree.close(1)
    with pytest.raises(FileNotFoundError, match=r"/a/1\.raw"):
        tree.status("/a/1.raw")
