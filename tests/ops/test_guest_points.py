"""Which disks are of one guest, and its guest points: grouped by instant."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from snapchain.destination.guest_record import GuestRecord, RecordedDisk
from snapchain.destination.records import DiskRecord, HoldRecord, PointRecord
from snapchain.errors import NotFound
from snapchain.model.consistency import Consistency
from snapchain.ops.guest_points import guest_named, guests_of
from tests.ops.guest_points import missing_disks

START = datetime(2026, 11, 30, tzinfo=UTC)
A, B, C = ("a" * 32, "b" * 32, "c" * 32)


def disk(name: str, *instants: str | None, labels: tuple[str, ...] = ()) -> DiskRecord:
    """One point for each instant, the n-th n hours after START, of n MiB."""
    points = [
        PointRecord(
            point=number,
            time=START + timedelta(hours="abc".index(instant[0]) if instant else number),
            labels=labels,
            virtual_size=number << 20,
            content_id=f"{name}{number}",
            layers=1,
            instant=instant,
            consistency=Consistency.CRASH if instant else None,
        )
        for number, instant in enumerate(instants, 1)
    ]
    return DiskRecord(name=name, epoch=1, points=tuple(points))


def test_points_of_one_instant_are_a_guest_point() -> None:
    (web,) = guests_of(
        [
            disk("web1/.guest", A, B, labels=("nightly",)),
            disk("web1/vda", None, A, B),
            disk("web1/vdb", A, B),
            disk("db", None),
        ]
    )
    assert (web.name, web.disks, web.record_disk) == ("web1", ("web1/vda", "web1/vdb"), "web1/.guest")
    assert [(each.point, each.instant) for each in web.points] == [(1, A), (2, B)]
    first = web.points[0]
    assert {name: point.point for name, point in first.disks.items()} == {"web1/vda": 2, "web1/vdb": 1}
    assert (first.time, first.labels, first.consistency, first.virtual_size) == (
        START, ("nightly",), Consistency.CRASH, 3 << 20,
    )  # fmt: skip
    assert web.leftovers == ()
    assert [web.point(wanted).point for wanted in (None, "latest", "1", "nightly", "2026-11-30T00:30:00Z")] == [
        2, 2, 1, 2, 1,
    ]  # fmt: skip
    with pytest.raises(NotFound, match="has no point 7"):
        web.point("7")


def test_without_its_record_it_is_no_guest_point() -> None:
    (web,) = guests_of([disk("web1/.guest", A), disk("web1/vda", A, B), disk("web1/vdb", A, C)])
    assert [each.instant for each in web.points] == [A]
    assert [(each.instant, sorted(each.disks)) for each in web.leftovers] == [(B, ["web1/vda"]), (C, ["web1/vdb"])]
    (new,) = guests_of([disk("web1/vda", A)])
    assert (new.points, [each.instant for each in new.leftovers]) == ((), [A])
    with pytest.raises(NotFound, match="the guest has no guest point"):
        new.point(None)


def test_guests_are_told_apart() -> None:
    """Also one below another's name, and disks that no guest point has."""
    of_guests = [disk("a/b/.guest", A), disk("a/b/vda", A), disk("a/.guest", B), disk("a/vda", B)]
    found = guests_of([*of_guests, disk("a/old", None), disk("c/vda", None), disk(".guest", A)])
    assert [(each.name, each.disks, [point.instant for point in each.points]) for each in found] == [
        ("a", ("a/old", "a/vda"), [B]),
        ("a/b", ("a/b/vda",), [A]),
    ]


def test_a_disk_of_that_name_comes_first() -> None:
    disks = [disk("web1/.guest", A), disk("web1/vda", A)]
    found = guest_named(disks, "web1")
    assert found is not None
    assert found.name == "web1"
    assert guest_named(disks, "web2") is None
    assert guest_named([*disks, disk("web1", None)], "web1") is None


def test_the_newer_one_counts_where_an_instant_was_published_twice() -> None:
    (web,) = guests_of([disk("web1/.guest", A, A), disk("web1/vda", A, A)])
    assert [(each.point, each.disks["web1/vda"].point) for each in web.points] == [(2, 2)]


def test_a_guest_point_has_the_holds_of_its_record() -> None:
    record = disk("web1/.guest", A)
    hold = HoldRecord(tag="audit", since=START)
    held = record.points[0].model_copy(update={"holds": (hold,)})
    (web,) = guests_of([record.model_copy(update={"points": (held,)}), disk("web1/vda", A)])
    assert web.points[0].holds == (hold,)


def test_the_record_tells_what_is_missing() -> None:
    names = ("vda", "vdb", "vdc")
    record = GuestRecord(
        guest="web1",
        instant=A,
        time=START,
        consistency=Consistency.CRASH,
        host="kvm1",
        kind="qmp",
        disks=tuple(
            RecordedDisk(
                name=name, disk=f"web1/{name}", path=f"/images/{name}", virtual_size=1 << 20, content_id=f"web1/{name}1"
            )
            for name in names
        ),
    )
    (web,) = guests_of([disk("web1/.guest", A), disk("web1/vda", A), disk("web1/vdb", B, A)])
    assert missing_disks(web.points[0], record) == ("web1/vdb", "web1/vdc")
