"""Pure decisions: windows, order, limits, which layers to merge."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, strategies as st

from snapchain.ops.nightly.maintenance import turns
from snapchain.ops.nightly.plan import CutOffError, Limits, limits_of, order
from snapchain.ops.nightly.report import Outcome
from snapchain.ops.nightly.values import Window

BERLIN = ZoneInfo("Europe/Berlin")
NIGHT = Window.parse("22:00-06:00")


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN)


@pytest.mark.parametrize(
    ("now", "closes"),
    [
        ("2026-03-10 21:59", None),
        ("2026-03-10 22:00", "2026-03-11 06:00"),
        ("2026-03-11 05:59", "2026-03-11 06:00"),
        ("2026-03-11 06:00", None),
        ("2026-03-28 22:30", "2026-03-29 06:00"),
        ("2026-10-25 01:00", "2026-10-25 06:00"),
    ],
)
def test_a_window_over_midnight(now: str, closes: str | None) -> None:
    assert NIGHT.closes(at(now), BERLIN) == (None if closes is None else at(closes))


def test_a_window_has_as_many_hours_as_the_clock_gives_it() -> None:
    def hours(now: str) -> float:
        closes = NIGHT.closes(at(now), BERLIN)
        assert closes is not None
        return (closes - at(now).astimezone(UTC)).total_seconds() / 3600

    assert hours("2026-03-10 22:00") == 8
    assert hours("2026-03-28 22:00") == 7
    assert hours("2026-10-24 22:00") == 9


def test_a_window_within_a_day() -> None:
    lunch = Window.parse("12:00 - 13:30")
    assert lunch.closes(at("2026-03-10 12:00"), BERLIN) == at("2026-03-10 13:30")
    assert lunch.closes(at("2026-03-10 23:00"), BERLIN) is None
    assert str(lunch) == "12:00-13:30"


@pytest.mark.parametrize("text", ["", "22-06", "24:00-06:00", "22:00-06:60", "22:00", "22:00-22:00", "٢٢:00-06:00"])
def test_what_is_no_window(text: str) -> None:
    with pytest.raises(ValueError, match="is not a window"):
        Window.parse(text)


def test_disks_that_were_not_reached_come_first() -> None:
    moment = datetime(2026, 3, 10, tzinfo=UTC)
    reached = {"a": moment + timedelta(1), "b": moment, "d": moment + timedelta(1)}
    assert order(["a", "b", "c", "d"], str, reached) == ["c", "b", "a", "d"]


@given(st.lists(st.sets(st.sampled_from("abcdef"), min_size=1, max_size=4), max_size=20))
def test_every_disk_has_its_turn_while_each_night_reaches_some(nights: list[set[str]]) -> None:
    """However few a night reaches, no disk waits longer than it takes to reach all the others once."""
    moment = datetime(2026, 3, 10, tzinfo=UTC)
    reached: dict[str, datetime] = {}
    waiting = dict.fromkeys("abcdef", 0)
    for number, some in enumerate(nights):
        for disk in order(list("abcdef"), str, reached)[: len(some)]:
            reached[disk] = moment + timedelta(number)
            waiting[disk] = -1
        waiting = {disk: count + 1 for disk, count in waiting.items()}
        assert max(waiting.values()) < 6


def test_the_sample_turns_through_all_disks() -> None:
    moment = datetime(2026, 3, 10, tzinfo=UTC)
    assert turns(["a", "b", "c"], {"a": moment, "c": moment - timedelta(1)}, 2) == ["b", "c"]


def test_a_turn_of_the_future_counts_as_none() -> None:
    """Of a night with a wrong clock: the disk would be the last for years, its sample never taken again."""
    now = datetime(2026, 3, 10, tzinfo=UTC)
    had = {"a": now + timedelta(days=3300), "b": now - timedelta(days=1), "c": now - timedelta(days=2)}
    assert order(["c", "b", "a"], str, had, now=now) == ["a", "c", "b"]
    assert turns(["a", "b", "c"], had, 2, now=now) == ["a", "c"]


def test_limits_end_by_the_nearer_of_window_and_time() -> None:
    now = at("2026-03-11 05:00").astimezone(UTC)

    def made(seconds: float | None, window: Window | None = NIGHT) -> Limits:
        return limits_of(now=now, clock=lambda: now, window=window, zone=BERLIN, seconds=seconds, ship=None, merge=None)

    assert made(None).closes == now + timedelta(hours=1)
    assert made(60).closes == now + timedelta(minutes=1)
    assert made(None, None).closes is None
    made(None, None).check()
    with pytest.raises(CutOffError, match="outside of the window"):
        made(None, Window.parse("12:00-13:00")).check()


def test_a_budget_lets_the_first_piece_go_and_then_only_what_fits() -> None:
    limits = Limits(clock=lambda: datetime.now(UTC), closes=None, why="", ship=100, merge=None)
    limits.take("ship", 0)
    limits.take("ship", 70)
    with pytest.raises(CutOffError, match="30 left"):
        limits.take("ship", 31)
    limits.take("ship", 30)
    limits.take("merge", 1 << 60)
    big = Limits(clock=lambda: datetime.now(UTC), closes=None, why="", ship=100, merge=None)
    big.take("ship", 5000)
    with pytest.raises(CutOffError, match="bytes to ship has 0 left"):
        big.take("ship", 1)


def test_the_worst_outcome_wins() -> None:
    assert Outcome.worst([]) is Outcome.OK
    assert Outcome.worst([Outcome.OK, Outcome.BUSY]) is Outcome.BUSY
    assert Outcome.worst([Outcome.LEFT, Outcome.BUSY]) is Outcome.LEFT
    assert Outcome.worst([Outcome.FAILED, Outcome.LEFT, Outcome.OK]) is Outcome.FAILED
