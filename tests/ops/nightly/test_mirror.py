"""A destination that is a copy of another one: a second site without a timer of its own."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from snapchain.errors import InvalidInput
from snapchain.ops.nightly.document import parse
from snapchain.ops.nightly.preview import preview
from snapchain.ops.nightly.report import DestinationReport, NightlyReport, Outcome
from snapchain.ops.restore.run import Restoration
from snapchain.ops.ship.request import ShipRequest
from snapchain.ops.ship.run import run as ship
from snapchain.repository.destination import RepositoryDestination
from tests.ops.nightly.night import EVENING, Clock, Host, row
from tests.ops.stacks import flat, same, write

NIGHT = timedelta(days=1)
TEXT = """
[keep]
last = 5
[[disks]]
glob = "images/*.qcow2"
[[destinations]]
name = "away"
url = "second"
copy_of = "vault"
keep = { last = 2 }
[[destinations]]
name = "vault"
url = "repo"
"""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    made.repository()
    made.repository("second")
    return made


def away(report: NightlyReport) -> DestinationReport:
    (found,) = (each for each in report.destinations if each.destination == "away")
    return found


def test_a_week_of_nights_and_a_copy_with_rules_of_its_own(host: Host, tmp_path: Path) -> None:
    image, clock = host.disk("web1"), Clock()
    for night in range(1, 6):
        clock.now += NIGHT
        report = host.run(TEXT, clock=clock)
        assert (report.outcome, report.faults) == (Outcome.OK, ())
        assert [each.destination for each in row(report, "web1").destinations] == ["vault"], "nothing is shipped there"
        (copied,) = away(report).copied
        assert copied.points == (night,), "what the copy has dropped does not come back"
        assert away(report).gc is not None
        assert sum(each.checked_bytes for each in away(report).verified) > 0
        assert host.metric("points", disk="web1", destination="away") == min(night, 2)
        assert host.metric("rpo_lag_seconds", disk="web1", destination="away") == 0
        write(image, f"write -P {night + 10} {night * 256}k 64k")
    assert [point.point for point in host.repository("second").catalogue("web1").points] == [4, 5]
    assert [point.point for point in host.repository().catalogue("web1").points] == [1, 2, 3, 4, 5]
    again = host.run(TEXT, clock=clock)
    assert [each.points for each in away(again).copied] == [(6,)]


def test_a_copy_that_is_away_fails_and_the_rest_is_done(host: Host, tmp_path: Path) -> None:
    host.disk("web1")
    host.run(TEXT)
    (tmp_path / "second").rename(tmp_path / "unplugged")
    report = host.run(TEXT, clock=Clock(EVENING + NIGHT))
    assert (report.outcome, away(report).outcome) == (Outcome.FAILED, Outcome.FAILED)
    assert row(report, "web1").outcome is Outcome.OK
    plan = preview(parse(host.whole(TEXT), path=host.path), host.path)
    assert (plan.sound, [each.destination for each in plan.destinations if each.faults]) == (False, ["away"])
    (tmp_path / "unplugged").rename(tmp_path / "second")
    plan = preview(parse(host.whole(TEXT), path=host.path), host.path)
    there = next(each for each in plan.destinations if each.destination == "away")
    assert (plan.sound, there.copy_of, there.would_copy) == (True, "vault", 1)
    assert [each.points for each in away(host.run(TEXT, clock=Clock(EVENING + 2 * NIGHT))).copied] == [(2, 3)]


def test_one_disk_that_cannot_be_copied_stops_no_other(host: Host) -> None:
    for name in ("db1", "web1"):
        host.disk(name)
    # A point of another origin, newer than the one that is to come.
    request = ShipRequest(image=host.images / "db1.qcow2", disk="db1", time=EVENING + NIGHT)
    ship(request, RepositoryDestination(host.repository("second")))
    report = host.run(TEXT)
    (fault,) = away(report).faults
    assert "cannot be copied, the first: db1@" in fault.message
    assert {each.name: each.points for each in away(report).copied}["web1"] == (1,)
    assert row(report, "db1").outcome is Outcome.OK


def test_the_end_of_the_window_leaves_the_copy_for_the_next_night(host: Host, tmp_path: Path) -> None:
    image = host.disk("web1")
    shown = flat(image, tmp_path / "shown.raw")
    steps = timedelta(seconds=20)
    left = None
    for minutes in range(2, 12):
        text = f'window = "22:00-22:{minutes:02}"\n{TEXT}'
        report = host.run(text, clock=Clock(step=steps))
        if row(report, "web1").outcome is Outcome.OK and away(report).outcome is Outcome.LEFT:
            left = report
            break
    assert left is not None
    assert any("copy" in words for words in away(left).left)
    done = host.run(TEXT)
    assert away(done).outcome is Outcome.OK
    out = tmp_path / "out.qcow2"
    Restoration(RepositoryDestination(host.repository("second")), "web1", out).run()
    assert same(out, shown)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (('copy_of = "vault"', 'copy_of = "volt"'), 'destinations[0].copy_of: "volt" is not a destination'),
        (('copy_of = "vault"', 'copy_of = "away"'), 'destinations[0].copy_of: "away" is itself a copy'),
        (('url = "second"', 'url = "dir:/srv/replica"'), "points are copied to repositories, and this is a replica"),
        (('qcow2"', 'qcow2"\ndestinations = ["away"]'), '"away" is a copy of "vault", and nothing else is shipped'),
    ],
)
def test_contradictions(change: tuple[str, str], told: str, host: Host) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(host.whole(TEXT.replace(*change)), path=host.path)
    assert told in caught.value.message
