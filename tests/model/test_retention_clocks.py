"""One run with a wrong clock, ahead or behind, costs no history."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from hypothesis import assume, given, strategies as st

from snapchain.model.retention import TOLERANCE, UNLIMITED, Doubt, Duration, Policy, decide

NOW = datetime(2026, 11, 29, 2, tzinfo=UTC)
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
NINE_YEARS = 9 * 365 * DAY


@dataclass(frozen=True)
class Point:
    time: datetime
    labels: frozenset[str] = frozenset()


COUNTS = st.sampled_from([0, 0, 1, 2, 5, UNLIMITED])
POLICIES = st.builds(
    Policy,
    last=COUNTS,
    hourly=COUNTS,
    daily=COUNTS,
    weekly=COUNTS,
    monthly=COUNTS,
    yearly=COUNTS,
    within=st.none() | st.builds(Duration, months=st.integers(0, 3), days=st.integers(0, 40), hours=st.integers(1, 30)),
)
HISTORIES = st.lists(
    st.integers(0, 60 * 24).map(lambda hours: hours * HOUR)
    | st.integers(0, 3 * 365).map(lambda days: days * DAY)
    | st.integers(0, 90).map(lambda minutes: timedelta(minutes=minutes)),
    max_size=12,
).map(lambda ages: [Point(NOW - age) for age in sorted(ages, reverse=True)])


def kept(points: list[Point], policy: Policy, now: datetime) -> list[Point]:
    return [each.point for each in decide(points, policy, zone=UTC, now=now) if each.kept]


def after_a_wrong_run(points: list[Point], policy: Policy, clock: datetime, *, ships: bool) -> list[Point]:
    """What a run leaves that takes `clock` for the time."""
    return kept([*points, Point(clock)] if ships else points, policy, clock)


def check_nothing_lost(points: list[Point], policy: Policy, clock: datetime, *, wrong: bool, right: bool) -> None:
    """All that the rules name of the true points is there after a run with a wrong clock, and after the next right one.

    wrong, right: whether the run with the wrong clock, and the next one, ship a point before they apply the rules
    """
    later = NOW + timedelta(minutes=20)
    fresh = [Point(later)] if right else []
    believed = [Point(clock)] if wrong and _nothing_contradicts(points, clock) else []
    named = {id(each.point) for each in decide([*points, *believed, *fresh], policy, zone=UTC) if each.kept}
    named -= {id(each) for each in believed}
    left = after_a_wrong_run(points, policy, clock, ships=wrong)
    assert named <= {id(each) for each in kept([*left, *fresh], policy, later)}


def _nothing_contradicts(points: list[Point], clock: datetime) -> bool:
    """A clock that is behind, but not before the newest point: its run looks like one that took place then."""
    return clock < NOW and all(point.time <= clock + TOLERANCE for point in points)


@given(HISTORIES, POLICIES, st.integers(1, 30 * 365 * 24), st.booleans(), st.booleans())
def test_a_clock_that_is_behind_for_one_run_costs_nothing(
    points: list[Point], policy: Policy, hours: int, wrong: bool, right: bool
) -> None:
    check_nothing_lost(points, policy, NOW - hours * HOUR, wrong=wrong, right=right)


@given(HISTORIES, POLICIES, st.integers(61, 30 * 365), st.booleans(), st.booleans())
def test_a_clock_that_is_ahead_for_one_run_costs_nothing(
    points: list[Point], policy: Policy, days: int, wrong: bool, right: bool
) -> None:
    clock = NOW + days * DAY
    if len(points) > 1 and wrong:  # that seldom, and it cannot be told from the disk's usual pace
        assume(clock - points[-1].time > 3 * (points[-1].time - points[-2].time))
    check_nothing_lost(points, policy, clock, wrong=wrong, right=right)


@given(HISTORIES, POLICIES, st.integers(1, 60 * 24))
def test_a_clock_that_is_ahead_a_little_does_what_it_will_do_then(
    points: list[Point], policy: Policy, hours: int
) -> None:
    """No rule drops more than it would have dropped so much later."""
    clock = NOW + hours * HOUR
    left = after_a_wrong_run(points, policy, clock, ships=True)
    fresh = Point(clock)
    assert set(kept([*points, fresh], policy, clock)) <= set(left)


@given(HISTORIES, POLICIES, st.lists(st.integers(1, 20 * 365 * 24), min_size=1, max_size=4))
def test_points_of_the_future_stay_and_take_no_place(points: list[Point], policy: Policy, ahead: list[int]) -> None:
    if policy.is_empty:
        return
    future = [Point(NOW + hours * HOUR) for hours in ahead]
    decisions = decide([*points, *future], policy, zone=UTC, now=NOW)
    for each in decisions[len(points) :]:
        assert (each.kept, each.reasons) == (True, (Doubt.FUTURE.value,))
    mine = {id(each.point) for each in decisions[: len(points)] if each.kept}
    # all but the one that stays as the last shipped, which the future ones are now
    last = {id(points[-1])} if points else set()
    assert mine | last == {id(each) for each in kept(points, policy, NOW)} | last


def test_a_little_ahead_is_no_future() -> None:
    points = [Point(NOW - DAY), Point(NOW + TOLERANCE), Point(NOW + TOLERANCE + timedelta(seconds=1))]
    decisions = decide(points, Policy(last=1), zone=UTC, now=NOW)
    assert [Doubt.FUTURE.value in each.reasons for each in decisions] == [False, False, True]


def test_the_clock_counts_where_it_is_earlier_than_the_newest_point() -> None:
    """A point of another host, within the tolerance, does not push one out that the clock keeps."""
    edge, newest = Point(NOW - 7 * DAY + timedelta(seconds=1)), Point(NOW + TOLERANCE)
    assert kept([edge, newest], Policy(within=Duration(days=7)), NOW) == [edge, newest]


def test_a_jump_counts_once_more_than_a_day_confirms_it() -> None:
    history = [Point(NOW - n * DAY) for n in (3, 2, 1)]
    first, second = Point(NOW + NINE_YEARS), Point(NOW + NINE_YEARS + DAY + HOUR)
    month = Policy(within=Duration(days=30))
    alone = decide([*history, first], month, zone=UTC, now=first.time)
    assert [each.kept for each in alone] == [True] * 4
    assert alone[-1].reasons == (Doubt.UNCONFIRMED.value,)
    assert kept([*history, first, second], month, second.time) == [first, second]


def test_a_disk_that_is_shipped_seldom_makes_no_jumps() -> None:
    halves = [Point(NOW - n * 180 * DAY) for n in (4, 3, 2, 1, 0)]
    assert kept(halves, Policy(last=2), NOW) == halves[-2:]


def test_a_point_dated_back_does_not_stand_for_a_true_one_of_its_month() -> None:
    """To the run with that clock it is the newest; the next right run lets it go where the rules do."""
    october, november = Point(datetime(2026, 10, 10, 2, tzinfo=UTC)), Point(NOW)
    clock = datetime(2026, 10, 20, 2, tzinfo=UTC)
    months = Policy(monthly=2)
    left = after_a_wrong_run([october, november], months, clock, ships=True)
    assert left == [october, november, Point(clock)]
    assert kept([*left, Point(NOW + DAY)], months, NOW + DAY)[:1] == [october]
