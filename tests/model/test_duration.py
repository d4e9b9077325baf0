"""Durations as restic writes them, counted back along a calendar."""

from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, strategies as st

from snapchain.errors import InvalidInput
from snapchain.model.retention import Duration, parse_duration

BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1y5m7d2h", Duration(years=1, months=5, days=7, hours=2)),
        ("2y5m7d3h", Duration(years=2, months=5, days=7, hours=3)),
        ("3d12h", Duration(days=3, hours=12)),
        ("14d", Duration(days=14)),
        ("2w", Duration(days=14)),
        ("1w1d", Duration(days=8)),
        ("6m", Duration(months=6)),
        ("7d1y", Duration(years=1, days=7)),
        (" 12h ", Duration(hours=12)),
        ("007d", Duration(days=7)),
    ],
)
def test_parsed(text: str, want: Duration) -> None:
    assert parse_duration(text) == want


@pytest.mark.parametrize(
    "text", ["", "7", "d", "-7d", "7d7d", "7 d", "7D", "1.5d", "7d!", "!7d", "7s", "0d", "0y0h", "9" * 8 + "d", "١d"]
)
def test_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"not a duration|longer than nothing") as caught:
        parse_duration(text)
    assert caught.value.hint is not None


@given(*[st.integers(0, 9999)] * 4)
def test_written_as_read(years: int, months: int, days: int, hours: int) -> None:
    duration = Duration(years, months, days, hours)
    if duration == Duration():
        assert str(duration) == "0h"
    else:
        assert parse_duration(str(duration)) == duration


@pytest.mark.parametrize(
    ("moment", "text", "want"),
    [
        ("2026-03-31T12:00:00+00:00", "1m", "2026-02-28T12:00:00+00:00"),
        ("2024-03-31T12:00:00+00:00", "1m", "2024-02-29T12:00:00+00:00"),
        ("2024-02-29T12:00:00+00:00", "1y", "2023-02-28T12:00:00+00:00"),
        ("2026-01-15T12:00:00+00:00", "1m", "2025-12-15T12:00:00+00:00"),
        ("2026-01-15T12:00:00+00:00", "25m", "2023-12-15T12:00:00+00:00"),
        ("2026-03-01T00:30:00+00:00", "1d1h", "2026-02-27T23:30:00+00:00"),
    ],
)
def test_counted_back(moment: str, text: str, want: str) -> None:
    assert parse_duration(text).before(datetime.fromisoformat(moment), UTC) == datetime.fromisoformat(want)


def test_days_follow_the_wall_clock_and_hours_the_true_one() -> None:
    # Summer time began in Berlin on 29 March 2026: that day had 23 hours.
    noon = datetime(2026, 3, 29, 12, tzinfo=BERLIN)
    assert Duration(days=1).before(noon, BERLIN) == datetime(2026, 3, 28, 12, tzinfo=BERLIN)
    assert Duration(hours=24).before(noon, BERLIN) == datetime(2026, 3, 28, 11, tzinfo=BERLIN)


@given(
    st.integers(100_000, 7_000_000_000).map(lambda seconds: datetime.fromtimestamp(seconds, UTC)),
    st.builds(Duration, *[st.integers(0, 9_999_999)] * 4),
)
def test_always_before_and_never_a_crash(moment: datetime, duration: Duration) -> None:
    for zone in (UTC, BERLIN, timezone(timedelta(hours=14))):
        assert duration.before(moment, zone) <= moment
