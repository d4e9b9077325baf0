"""Which point an address means: latest, a number, a label, a time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from snapchain.errors import NotFound
from snapchain.ops.points import find_point
from snapchain.repository.catalogue import Catalogue, Point

START = datetime(2026, 1, 31, 22, tzinfo=UTC)


def catalogue(*points: Point) -> Catalogue:
    return Catalogue(
        disk="web1/vda",
        generation=1,
        previous="",
        nonce="",
        time=START,
        epoch=1,
        next_point=max((point.point for point in points), default=0) + 1,
        points=points,
        parents={},
    )


def point(number: int, hours: float, *labels: str) -> Point:
    time = START + timedelta(hours=hours)
    return Point(point=number, time=time, labels=labels, layer="", size=0, content_id="")


DISK = catalogue(
    point(2, 0, "before update"), point(3, 1), point(7, 2, "weekly", "Übung"), point(8, 3, "weekly"), point(9, 2.5)
)


@pytest.mark.parametrize(
    ("wanted", "number"),
    [
        (None, 9),
        ("latest", 9),
        ("2", 2),
        ("9", 9),
        ("007", 7),
        ("before update", 2),
        ("Übung", 7),
        ("weekly", 8),
        ("2026-01-31T22:00:00Z", 2),
        ("2026-01-31T22:00:00", 2),
        ("2026-01-31T22:59:59Z", 2),
        ("2026-01-31T23:00:00Z", 3),
        ("2026-02-01T00:00:00+01:00", 3),
        ("2026-02-01 00:45:00", 9),
        ("2026-02-01", 7),
        ("2026-02-01T00:00:00Z", 7),
        ("2026-02-01T01:00:00.5Z", 8),
        ("9999-12-31T23:59:59Z", 8),
    ],
)
def test_what_is_meant(wanted: str | None, number: int) -> None:
    assert find_point(DISK, wanted).point == number


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("1", "2 to 9"),
        ("4", "2 to 9"),
        ("0", "2 to 9"),
        ("99999999999999999999", "2 to 9"),
        ("9" * 10_000, "2 to 9"),
        ("-1", "latest, a number, a label, or a time"),
        ("Weekly", "latest, a number, a label, or a time"),
        ("LATEST", "latest, a number, a label, or a time"),
        ("", "latest, a number, a label, or a time"),
        ("٣", "latest, a number, a label, or a time"),
        ("2026-13-01T00:00:00Z", "latest, a number, a label, or a time"),
    ],
)
def test_what_is_not_there_says_what_is(wanted: str, words: str) -> None:
    with pytest.raises(NotFound, match=r"has no point|is no label of this disk") as raised:
        find_point(DISK, wanted)
    assert raised.value.hint is not None
    assert words in raised.value.hint
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("wanted", ["2026-01-31T21:59:59Z", "0001-01-01T00:00:00+14:00", "1970-01-01"])
def test_a_time_before_all_points(wanted: str) -> None:
    with pytest.raises(NotFound, match="no point as old"):
        find_point(DISK, wanted)


def test_a_disk_without_points() -> None:
    for wanted in (None, "latest", "1", "weekly"):
        with pytest.raises(NotFound, match="no point"):
            find_point(catalogue(), wanted)


def test_of_two_points_of_one_time_the_later_number() -> None:
    assert find_point(catalogue(point(1, 0), point(2, 0)), START.isoformat()).point == 2
