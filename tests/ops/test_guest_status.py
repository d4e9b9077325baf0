"""status: the state of each guest, how far behind a destination is, and what is owed in each state."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path

import pytest

from snapchain.cli import main
from snapchain.errors import NotFound
from snapchain.model.guest_checks import CheckKind, GuestCheck
from snapchain.model.guest_state import GuestStanding, GuestState, Vouched
from snapchain.model.lease import Lease
from snapchain.ops import guest_checks, guest_verify
from snapchain.ops.guest_status import GuestStatus, owed, status
from snapchain.ops.status import DestinationStatus, DiskStatus, StatusReport
from tests.ops.guest_points import BEGIN, Guest, Open, instant, opened, publish
from tests.ops.stacks import write
from tests.ops.test_failover import failover
from tests.ops.test_fence import fenced


@pytest.fixture(params=["directory", "replica"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    return opened(request.param, request, tmp_path)


def test_from_protected_to_diverged(place: Open, tmp_path: Path) -> None:
    guest = Guest(tmp_path / "kvm1")
    guest.point(place(), 1)
    guest.point(place(), 2)
    guest.point(place(), 3, names=["vda"], with_record=False)
    now = BEGIN + timedelta(days=2, hours=12)
    (row,) = status([(place(), None)], now=now).guests
    assert (row.guest, row.state, row.epoch, row.master, row.owed) == ("web1", GuestState.PROTECTED, 1, None, ())
    assert (row.guest_point, row.lag_seconds) == (2, 12 * 3600)
    assert row.lag_bytes is not None
    assert 0 < row.lag_bytes < 1 << 20, "half of what a day wrote"
    assert row.ahead_bytes > 0
    assert row.torn == 1
    failover(place, tmp_path / "out").run()
    (row,) = status([(place(), "web1")]).guests
    assert (row.state, row.epoch, row.master, row.former) == (GuestState.ACTIVE, 2, "kvm2", "kvm1")
    assert row.owed == ("kvm1 must not start it: run `snapchain fence` there before its guests start",)
    write(guest.images["vdb"], "write -P 7 1536k 64k")
    fenced(place, guest)
    (row,) = status([(place(), "web1")]).guests
    assert row.state is GuestState.DIVERGED
    assert "kvm1 holds data that no point has" in row.owed[0]
    with pytest.raises(NotFound, match="there is no such guest"):
        status([(place(), "web2")])


def test_the_last_checks_are_shown(place: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guest = Guest(tmp_path / "kvm1")
    guest.point(place(), 1)
    record = guest.point(place(), 2)
    (row,) = status([(place(), None)]).guests
    assert (row.verified, row.booted) == (None, None)
    assert guest_verify.verify(place(), share=1.0).ok
    (row,) = status([(place(), None)]).guests
    assert row.verified is not None
    assert (row.verified.ok, row.verified.point, row.verified.share) == (True, 2, 1.0)
    guest.point(place(), 3, names=["vda"], with_record=False)
    publish(place(), record.model_copy(update={"instant": instant(3)}), tmp_path)
    guest_checks.record(place(), "web1", CheckKind.BOOTED, ok=False, point=2, words="no agent", on_event=print)
    assert not guest_verify.verify(place(), "web1").ok
    (row,) = status([(place(), None)]).guests
    assert row.verified is not None
    assert (row.verified.ok, row.verified.share) == (False, 0)
    assert [each.split(":")[0] for each in row.owed] == [
        "the last verification found damage",
        "the last boot of a clone failed",
    ]


@pytest.mark.parametrize("state", list(GuestState))
def test_each_state_that_cannot_stay_is_owed(state: GuestState) -> None:
    word = Vouched(how="person", who="root@kvm2")
    standing = GuestStanding(guest="web1", number=1, state=state, epoch=2, master="kvm2", former="kvm1", vouched=word)
    assert bool(owed(standing)) == (state is not GuestState.PROTECTED)


def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    place = opened("replica", request, tmp_path)
    Guest(tmp_path / "kvm1", names=("vda",)).point(place(), 1)
    assert main(["status", f"dir:{tmp_path}/replica"]) == 0
    assert "web1: protected, epoch 1" in capsys.readouterr().out
    assert main(["status", f"dir:{tmp_path}/replica::web1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["guests"][0]["state"] == "protected"


def test_the_fields_are_documented() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "scripting.md").read_text()
    section = page.partition("### `status`\n")[2].partition("\n### ")[0]
    of_disks, _, of_guests = section.partition("`guests[]`")
    said = set(re.findall(r"`([a-z_]+)(?:\[\])?`", of_guests))
    assert said == {*GuestStatus.model_fields, *GuestCheck.model_fields, *Lease.model_fields}
    for name, shape in (("disks", DiskStatus), ("destinations", DestinationStatus)):
        assert set(re.findall(rf"`{name}\[\]\.([a-z_]+)(?:\[\])?`", of_disks)) == {*shape.model_fields}
    assert {*StatusReport.model_fields} == {"guests", "disks", "destinations", "time", "max_age_seconds"}
