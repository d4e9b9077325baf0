"""What a dry run says of points is what the run then does; and both say it in words."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from snapchain.destination.records import HoldRecord, PointRecord
from snapchain.model.retention import Duration, Policy, kept_by_rule
from snapchain.model.retention.tally import rule_of
from snapchain.ops.nightly import outlook
from snapchain.ops.nightly.document import parse
from snapchain.ops.nightly.preview import NightlyPlan, preview
from tests.ops.nightly.evening import House
from tests.ops.nightly.night import Clock, Host, row
from tests.ops.stacks import write

NIGHT = timedelta(days=1)
NOW = datetime(2026, 11, 30, 2, tzinfo=UTC)

TEXT = """
[keep]
last = 2
weekly = 2
[[disks]]
glob = "images/*.qcow2"
[[destinations]]
name = "vault"
url = "repo"
[[destinations]]
name = "standby"
url = "dir:{directory}/replica"
"""


def preview_of(host: Host, text: str, clock: Clock) -> NightlyPlan:
    host.path.write_text(host.whole(text))
    return preview(parse(host.path.read_text(), path=host.path), host.path, clock=clock)


def test_a_run_drops_what_the_dry_run_said(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.repository()
    image, clock, text = host.disk("web1"), Clock(), TEXT.format(directory=tmp_path)
    dropped = 0
    for night in range(6):
        clock.now += NIGHT
        write(image, f"write -P {night + 50} 1M 64k")
        said = preview_of(host, text, clock).disks[0].destinations
        report = row(host.run(text, clock=clock), "web1")
        for told, done in zip(said, report.destinations, strict=True):
            assert done.retention is not None
            assert told.points_dropped == done.retention.points_dropped
            kept = [each.point for each in told.points if each.kept]
            assert [*kept, done.point] == list(done.retention.points_kept)
            dropped += len(told.points_dropped)
    assert dropped > 4, "the test would prove nothing"


def point(number: int, ago: float, *, held: bool = False) -> PointRecord:
    holds = (HoldRecord(tag="audit", since=NOW),) if held else ()
    time = NOW - timedelta(days=ago)
    return PointRecord(
        point=number, time=time, labels=(), virtual_size=0, content_id="", layers=1, holds=holds, of_the_future=False
    )


def test_the_point_to_come_counts() -> None:
    points = [point(1, 3, held=True), point(2, 2), point(3, 1), point(4, -30)]
    found = outlook.of_disk(points, Policy(last=2), disk="d", labels=(), zone=UTC, now=NOW)
    assert [(each.point, each.kept) for each in found] == [(1, True), (2, False), (3, True), (4, True)]
    assert [each.of_the_future for each in found] == [False, False, False, True]
    assert kept_by_rule(each.reasons for each in found if each.kept) == {
        "held": 1,
        "last 2": 1,
        "dated in the future": 1,
    }


@given(st.lists(st.floats(0, 400), max_size=12), st.lists(st.floats(-4000, -1), max_size=5))
@settings(deadline=None)
def test_points_of_the_future_push_no_other_out(past: list[float], future: list[float]) -> None:
    """Whatever they are: each true point is kept or dropped as if they were not there."""
    policy = Policy(last=2, daily=3, weekly=2, monthly=2, within="10d")
    ages = sorted(past, reverse=True)
    true = [point(number, ago) for number, ago in enumerate(ages, 1)]
    false = [point(number, ago) for number, ago in enumerate(future, len(true) + 1)]

    def kept(points: list[PointRecord]) -> dict[int, bool]:
        found = outlook.of_disk(points, policy, disk="d", labels=(), zone=UTC, now=NOW)
        return {each.point: each.kept for each in found}

    alone, together = kept(true), kept([*true, *false])
    assert {number: together[number] for number in alone} == alone
    assert all(together[each.point] for each in false), "they stay until their time has come"


@pytest.mark.parametrize(
    ("reason", "rule"),
    [
        ("last 1 of 7", "last 7"),
        ("daily 2 of all: 2026-11-29", "daily all"),
        ("hourly 3 of 24: 2026-11-29 02:00+0100", "hourly 24"),
        ("held: audit (3 of 4: x)", "held"),
        (f"within {Duration(days=30)} of the newest", f"within {Duration(days=30)}"),
        ("label release", "label release"),
        ("newest", "newest"),
        ("last shipped", "last shipped"),
    ],
)
def test_the_rule_of_a_reason(reason: str, rule: str) -> None:
    assert rule_of(reason) == rule


def test_it_is_told_in_words(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.init()
    house.disk("web1", seed=1)
    text = '[keep]\nlast = {last}\n[[disks]]\npath = "images/web1.qcow2"\nname = "web1/vda"\n'
    text += '[[destinations]]\nname = "vault"\nurl = "vault"\n'
    house.configure(text.format(last=3))
    for night in range(3):
        house.guest_writes("web1", night + 1, night)
        assert "dropped" not in house.nightly().out
    house.configure(text.format(last=2))
    said = house.nightly("--dry-run")
    assert "web1/vda at vault: would drop points 1, 2 and keep 1: last 2 (1)" in said.out
    assert "not among the last 2" not in said.out
    longer = house.nightly("--dry-run", "--points")
    assert "not among the last 2" in longer.out
    assert "last 2 of 2" in longer.out
    plan = house.nightly("--dry-run", "--json").json["plan"]["disks"][0]["destinations"][0]
    assert (plan["points_dropped"], [each["kept"] for each in plan["points"]]) == ([1, 2], [False, False, True])
    house.guest_writes("web1", 9, 9)
    done = house.nightly()
    assert "web1/vda at vault: dropped points 1, 2; kept are 2" in done.out
    assert "--dry-run shows what the next run drops" in done.out
