"""Which point an address means: latest, a number, a label, a time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, strategies as st

from snapchain.cli.quantities import heading, moment
from snapchain.destination.address import in_full
from snapchain.errors import NotFound
from snapchain.model.points import instant
from snapchain.repository.catalogue import Catalogue, Point, find_point

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
        ("2026-02-01", 8),
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
    with pytest.raises(NotFound, match="no point as old") as raised:
        find_point(DISK, wanted)
    assert raised.value.hint == "its oldest is point 2 of 2026-01-31T22:00:00+00:00"


def test_a_disk_without_points() -> None:
    for wanted in (None, "latest", "1", "weekly"):
        with pytest.raises(NotFound, match="no point"):
            find_point(catalogue(), wanted)


def test_of_two_points_of_one_time_the_later_number() -> None:
    assert find_point(catalogue(point(1, 0), point(2, 0)), START.isoformat()).point == 2


BERLIN = ZoneInfo("Europe/Berlin")
NOW = datetime(2026, 11, 30, 23, 30, tzinfo=UTC)  # in Berlin it is December already


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("2026-11-30", "2026-11-30T22:59:59.999999+00:00"),
        ("2026-07-01", "2026-07-01T21:59:59.999999+00:00"),
        ("2026-11", "2026-11-30T22:59:59.999999+00:00"),
        ("2024-02", "2024-02-29T22:59:59.999999+00:00"),
        ("today", "2026-12-01T22:59:59.999999+00:00"),
        ("yesterday", "2026-11-30T22:59:59.999999+00:00"),
        ("2026-11-30 22:15", "2026-11-30T21:15:59.999999+00:00"),
        ("2026-11-30T22:15:07", "2026-11-30T21:15:07.999999+00:00"),
        ("2026-11-30 22:15+02:00", "2026-11-30T20:15:59.999999+00:00"),
        ("2026-10-25 02:30", "2026-10-25T01:30:59.999999+00:00"),  # that half hour came twice
        ("2026-11-30T22:15:07Z", "2026-11-30T22:15:07+00:00"),
        ("2026-11-30t22:15:07.25+01:00", "2026-11-30T21:15:07.250000+00:00"),
    ],
)
def test_a_date_means_its_end_where_it_is_asked(text: str, last: str) -> None:
    found = instant(text, now=NOW, zone=BERLIN)
    assert found is not None
    assert found.astimezone(UTC) == datetime.fromisoformat(last)


@pytest.mark.parametrize(
    "text",
    ["latest", "2026", "7", "2026-13", "2026-02-30", "2026-1-1", "Yesterday", "", "20261130", "٢٠٢٦-11"],
)
def test_what_is_no_date(text: str) -> None:
    assert instant(text, now=NOW, zone=BERLIN) is None


ZONES = st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kolkata"])


@given(st.integers(0, 32_000_000_000 * 10**6), ZONES)
def test_a_time_that_is_shown_names_no_earlier_point(microseconds: int, zone: str) -> None:
    """What `log` prints, pasted after the '@': the point itself, or a later one of the same minute."""
    time = datetime(1970, 1, 2, tzinfo=UTC) + timedelta(microseconds=microseconds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", zone)
        shown = moment(time)
    found = instant(shown, now=NOW, zone=ZoneInfo(zone))
    assert found is not None
    assert timedelta(0) <= found - time < timedelta(minutes=1)


def test_dates_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # its 31st of January ends at 15:00 UTC
    with pytest.raises(NotFound, match="no point as old"):
        find_point(DISK, "2026-01-31")
    assert find_point(DISK, "2026-02-01").point == 8
    assert find_point(DISK, "today").point == 8
    assert in_full("2026-01-31") == "2026-01-31T14:59:59.999999+00:00"
    assert (in_full("weekly"), in_full("7"), in_full(None)) == ("weekly", "7", None)


def test_an_hour_that_comes_twice_is_shown_with_its_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    first, second = (datetime(2026, 10, 25, hour, 30, tzinfo=UTC) for hour in (0, 1))
    assert (moment(first), moment(second)) == ("2026-10-25 02:30+02:00", "2026-10-25 02:30+01:00")
    assert moment(datetime(2026, 10, 25, 12, tzinfo=UTC)) == "2026-10-25 13:00"
    assert moment(datetime(2026, 10, 25, 12, tzinfo=UTC), zone=True) == "2026-10-25 13:00+01:00"
    assert heading("time") == "time (Europe/Berlin)"
    monkeypatch.setenv("TZ", "UTC")
    assert (moment(first, zone=True), heading("time")) == ("2026-10-25 00:30", "time")
