"""Retention: the cases of restic's and PBS's manuals, and what holds for every policy."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, strategies as st
from pydantic import BaseModel, ValidationError

from snapchain.errors import InvalidInput
from snapchain.model.retention import UNLIMITED, Decision, Duration, Period, Policy, decide, parse_duration

BERLIN = ZoneInfo("Europe/Berlin")


@dataclass(frozen=True)
class Point:
    time: datetime
    labels: frozenset[str] = frozenset()


def at(*texts: str, zone: tzinfo = UTC) -> list[Point]:
    return [Point(datetime.fromisoformat(text).replace(tzinfo=zone)) for text in texts]


def kept(points: Sequence[Point], policy: Policy, *, zone: tzinfo = UTC, now: datetime | None = None) -> list[str]:
    return [f"{d.point.time:%Y-%m-%d %H:%M}" for d in decide(points, policy, zone=zone, now=now) if d.kept]


def every(step: timedelta, start: str, count: int) -> list[Point]:
    first = datetime.fromisoformat(start).replace(tzinfo=UTC)
    return [Point(first + n * step) for n in range(count)]


DAY = timedelta(days=1)
HOUR = timedelta(hours=1)

# ---------------------------------------------------------------- golden cases


def test_restic_manual_twelve_sundays() -> None:
    """`--keep-daily 4` keeps the last four days that have a snapshot, however far apart."""
    sundays = every(7 * DAY, "2019-09-01T11:00", 12)
    assert kept(sundays, Policy(daily=4)) == [f"2019-{day} 11:00" for day in ("10-27", "11-03", "11-10", "11-17")]


def test_restic_manual_a_hundred_years_of_days() -> None:
    """7 daily, then 4 weekly, 11 or 12 monthly, 74 or 75 yearly."""
    days = every(DAY, "1919-12-30T23:00", 36525)  # up to a Sunday
    decisions = decide(days, Policy(daily=7, weekly=5, monthly=12, yearly=75), zone=UTC)
    reasons = [[reason.split()[0] for reason in d.reasons] for d in decisions if d.kept]
    assert sum("daily" in r for r in reasons) == 7
    assert sum("weekly" in r and "daily" not in r for r in reasons) == 4
    assert sum("monthly" in r and not {"daily", "weekly"} & set(r) for r in reasons) in {11, 12}
    assert sum(r == ["yearly"] for r in reasons) in {74, 75}


def test_restic_forum_keep_daily_counts_days_with_points() -> None:
    points = at("2023-05-01 08:00", "2023-05-02 08:00", "2023-05-02 11:00", "2023-05-04 09:00", "2023-05-05 10:00")
    assert kept(points, Policy(daily=4)) == [
        "2023-05-01 08:00",
        "2023-05-02 11:00",
        "2023-05-04 09:00",
        "2023-05-05 10:00",
    ]
    # The range reaches back from the newest point: 1 May 10:00.
    assert kept(points, Policy(within=parse_duration("4d")))[0] == "2023-05-02 08:00"


def test_a_point_counts_for_every_rule_that_it_matches() -> None:
    """As restic; PBS would go on to keep the two Sundays before."""
    days = every(DAY, "2026-11-01T12:00", 22)  # 1 and 22 November 2026 are Sundays
    assert kept(days, Policy(daily=1, weekly=2)) == ["2026-11-15 12:00", "2026-11-22 12:00"]


def test_restic_refuses_no_rule_and_we_keep_everything() -> None:
    days = every(DAY, "2026-11-01T12:00", 3)
    for decision in decide(days, Policy(last=0), zone=UTC):
        assert decision == Decision(decision.point, kept=True, reasons=("no rule given",))


def test_last() -> None:
    days = every(DAY, "2026-11-01T12:00", 5)
    assert kept(days, Policy(last=2)) == ["2026-11-04 12:00", "2026-11-05 12:00"]
    assert len(kept(days, Policy(last=9))) == 5
    assert len(kept(days, Policy(last=UNLIMITED))) == 5


def test_the_newest_point_of_each_period_stands_for_it() -> None:
    points = at("2026-11-23 08:10", "2026-11-23 08:50", "2026-11-23 09:05", "2026-11-23 11:00", "2026-11-23 11:59")
    assert kept(points, Policy(hourly=3)) == ["2026-11-23 08:50", "2026-11-23 09:05", "2026-11-23 11:59"]
    assert kept(points, Policy(daily=3)) == ["2026-11-23 11:59"]


def test_weeks_run_from_monday_to_sunday_across_the_year() -> None:
    points = at("2025-12-28 12:00", "2025-12-29 12:00", "2026-01-04 12:00", "2026-01-05 12:00")
    assert kept(points, Policy(weekly=9)) == ["2025-12-28 12:00", "2026-01-04 12:00", "2026-01-05 12:00"]


def test_months_and_years() -> None:
    points = at("2024-02-29 12:00", "2024-12-31 23:59", "2025-01-01 00:00", "2025-06-01 12:00", "2025-06-30 12:00")
    assert kept(points, Policy(monthly=2)) == ["2025-01-01 00:00", "2025-06-30 12:00"]
    assert kept(points, Policy(yearly=9)) == ["2024-12-31 23:59", "2025-06-30 12:00"]


def test_the_time_zone_says_what_a_day_is() -> None:
    points = at("2026-06-01 21:00", "2026-06-01 23:00", "2026-06-02 10:00")  # 23:00 UTC is 01:00 in Berlin
    assert kept(points, Policy(daily=9)) == ["2026-06-01 23:00", "2026-06-02 10:00"]
    assert kept(points, Policy(daily=9), zone=BERLIN) == ["2026-06-01 21:00", "2026-06-02 10:00"]


def test_an_hour_that_the_clock_shows_twice_is_two_hours() -> None:
    hours = every(HOUR, "2026-10-25T00:00", 3)  # 02:00 summer time, 02:00 winter time, 03:00 in Berlin
    assert len(kept(hours, Policy(hourly=9), zone=BERLIN)) == 3


def test_within_reaches_back_from_the_newest_point() -> None:
    points = at("2020-01-01 12:00", "2020-01-02 12:00", "2020-01-03 12:00", "2020-01-03 12:01")
    assert kept(points, Policy(within=Duration(days=1)), now=datetime(2026, 1, 1, tzinfo=UTC)) == [
        "2020-01-03 12:00",
        "2020-01-03 12:01",
    ]


def test_within_leaves_out_points_of_the_future_and_keeps_them() -> None:
    points = at("2026-01-01 12:00", "2026-01-09 12:00", "2026-01-10 12:00", "2099-01-01 12:00")
    policy = Policy(within=Duration(days=2))
    assert kept(points, policy, now=datetime(2026, 1, 11, tzinfo=UTC)) == [
        "2026-01-09 12:00",
        "2026-01-10 12:00",
        "2099-01-01 12:00",
    ]
    assert kept(points, policy) == ["2099-01-01 12:00"]
    assert len(kept(points, policy, now=datetime(2000, 1, 1, tzinfo=UTC))) == 4


def test_labels() -> None:
    days = every(DAY, "2026-11-01T12:00", 3)
    points = [Point(days[0].time, frozenset({"gold", "x"})), Point(days[1].time, frozenset({"silver"})), days[2]]
    assert kept(points, Policy(labels=frozenset({"gold"}))) == ["2026-11-01 12:00", "2026-11-03 12:00"]
    assert len(kept(points, Policy(labels=frozenset({"gold", "silver"})))) == 3


def test_a_clock_that_was_set_back_loses_nothing_that_was_just_shipped() -> None:
    points = at("2026-11-20 12:00", "2026-11-21 12:00", "1970-01-01 00:05")
    assert kept(points, Policy(last=1)) == ["2026-11-21 12:00", "1970-01-01 00:05"]
    assert decide(points, Policy(last=1), zone=UTC)[-1].reasons == ("last shipped",)


def test_of_equal_times_the_later_shipped_is_the_newer() -> None:
    first, second = at("2026-11-20 12:00", "2026-11-20 12:00")
    labelled = Point(second.time, frozenset({"second"}))
    assert [d.kept for d in decide([first, labelled], Policy(last=1), zone=UTC)] == [False, True]


def test_decisions_are_explained() -> None:
    points = [*every(HOUR, "2026-11-22T22:00", 3), Point(datetime(2026, 11, 23, 1, tzinfo=UTC), frozenset({"gold"}))]
    policy = Policy(last=1, daily=2, within=Duration(hours=1), labels=frozenset({"gold"}))
    assert [d.reasons for d in decide(points, policy, zone=UTC)] == [
        (
            "not among the last 1",
            "daily: a newer point stands for 2026-11-22",
            "older than 1h before the newest",
            "no label gold",
        ),
        ("daily 2 of 2: 2026-11-22",),
        (
            "not among the last 1",
            "daily: a newer point stands for 2026-11-23",
            "older than 1h before the newest",
            "no label gold",
        ),
        ("newest", "last 1 of 1", "daily 1 of 2: 2026-11-23", "within 1h of the newest", "label gold"),
    ]
    hours = decide(points, Policy(hourly=1, weekly=UNLIMITED), zone=BERLIN)
    assert hours[1].reasons == (
        "hourly: 2026-11-23 00:00+0100 is not among the last 1",
        "weekly: a newer point stands for 2026-W48",
    )
    assert hours[3].reasons == ("newest", "hourly 1 of 1: 2026-11-23 02:00+0100", "weekly 1 of all: 2026-W48")


def test_refused() -> None:
    with pytest.raises(InvalidInput, match="no zone"):
        decide([Point(datetime.fromisoformat("2026-01-01"))], Policy(last=1), zone=UTC)


@pytest.mark.parametrize(
    ("rules", "subject"),
    [
        ({"weekly": -2}, "weekly"),
        ({"last": "many"}, "last"),
        ({"within": "soon"}, "soon"),
        ({"labels": ["\x1b"]}, None),
        ({"dayly": 7}, "dayly"),
    ],
)
def test_a_wrong_rule(rules: dict[str, Any], subject: str | None) -> None:
    """The user's error where a policy is made, and one with its place where it is part of something."""
    with pytest.raises(InvalidInput) as caught:
        Policy(**rules)
    assert caught.value.subject == subject
    (rule,) = rules
    for text in (json.dumps({"keep": rules}), {"keep": rules}):
        with pytest.raises(ValidationError) as refused:
            _Whole.model_validate(text) if isinstance(text, dict) else _Whole.model_validate_json(text)
        assert refused.value.errors()[0]["loc"][:2] == ("keep", rule)


class _Whole(BaseModel):
    keep: Policy


def test_no_points() -> None:
    assert decide([], Policy(last=3, within=Duration(days=1)), zone=UTC) == ()


# ---------------------------------------------------------------- what holds for every policy

POINTS = st.lists(
    st.builds(
        Point,
        st.integers(0, 325 * 24 * 60).map(
            lambda minutes: datetime(2023, 12, 20, tzinfo=UTC) + timedelta(minutes=minutes)
        ),
        st.frozensets(st.sampled_from(["gold", "silver"])),
    ),
    max_size=15,
)
COUNTS = st.sampled_from([0, 0, 1, 2, 5, UNLIMITED])
POLICIES = st.builds(
    Policy,
    last=COUNTS,
    hourly=COUNTS,
    daily=COUNTS,
    weekly=COUNTS,
    monthly=COUNTS,
    yearly=COUNTS,
    within=st.none() | st.builds(Duration, months=st.integers(0, 3), days=st.integers(0, 9), hours=st.integers(1, 30)),
    labels=st.frozensets(st.sampled_from(["gold", "silver"])),
)
ZONES = st.sampled_from([UTC, BERLIN, ZoneInfo("Pacific/Apia")])


def only(name: str, value: Any) -> Policy:
    """The policy of one rule."""
    options = {name: value}
    return Policy(**options)


def alone(policy: Policy) -> Iterable[Policy]:
    """Each rule of the policy by itself."""
    for name in ("last", *(period.value for period in Period), "within"):
        if getattr(policy, name):
            yield only(name, getattr(policy, name))
    for label in policy.labels:
        yield Policy(labels=frozenset({label}))


@given(POINTS, POLICIES, ZONES)
def test_a_point_goes_only_when_every_rule_lets_it_go(points: list[Point], policy: Policy, zone: tzinfo) -> None:
    together = [d.kept for d in decide(points, policy, zone=zone)]
    single = [[d.kept for d in decide(points, rule, zone=zone)] for rule in alone(policy)]
    if single:
        assert together == [any(rule[place] for rule in single) for place in range(len(points))]
    else:
        assert all(together)


@given(POINTS, POLICIES, ZONES)
def test_newest_and_last_shipped_stay_and_all_is_explained(points: list[Point], policy: Policy, zone: tzinfo) -> None:
    decisions = decide(points, policy, zone=zone)
    assert [d.point for d in decisions] == points
    assert all(d.reasons for d in decisions)
    if points:
        assert decisions[-1].kept
        assert max(p.time for p in points) in {d.point.time for d in decisions if d.kept}


@given(POINTS, POLICIES, ZONES)
def test_deciding_again_lets_nothing_more_go(points: list[Point], policy: Policy, zone: tzinfo) -> None:
    """A nightly job that runs twice does what one run does."""
    left = [d.point for d in decide(points, policy, zone=zone) if d.kept]
    assert all(d.kept for d in decide(left, policy, zone=zone))


@given(POINTS, st.sampled_from(Period), st.integers(1, 4), ZONES)
def test_a_period_rule_against_sets_of_periods(points: list[Point], period: Period, count: int, zone: tzinfo) -> None:
    """Its definition, told the other way round: group by period, take the newest of each, and the newest of those."""
    ordered = sorted(points, key=lambda point: point.time)  # shipped in order: no clock was set back
    groups: dict[str, Point] = {}
    for point in ordered:
        groups[period.name_of(point.time.astimezone(zone))] = point
    want = sorted((p.time for p in groups.values()), reverse=True)[:count]
    got = [d.point.time for d in decide(ordered, only(period.value, count), zone=zone) if d.kept]
    assert sorted(set(got)) == sorted(set(want))


@given(POINTS, st.sampled_from(["last", *(period.value for period in Period)]), st.integers(1, 6), ZONES)
def test_a_larger_count_keeps_no_less(points: list[Point], name: str, count: int, zone: tzinfo) -> None:
    fewer = [d.kept for d in decide(points, only(name, count), zone=zone)]
    more = [d.kept for d in decide(points, only(name, count + 1), zone=zone)]
    assert all(later for earlier, later in zip(fewer, more, strict=True) if earlier)
