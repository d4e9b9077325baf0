"""Keeping guest points: merge by rules, holds, verify and diff, at each kind of destination."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from snapchain.destination.protocol import Destination
from snapchain.destination.reading import ReadableDestination
from snapchain.destination.writing import Moment
from snapchain.destinations import open_destination
from snapchain.errors import Busy, InvalidInput, NotFound, Unavailable
from snapchain.model.consistency import Consistency
from snapchain.model.retention import Policy
from snapchain.ops import guest_points_merge, guest_verify
from snapchain.ops.guest_diff import diff_guests
from snapchain.ops.guest_points_merge import guest_at
from snapchain.ops.hold import hold_guest, list_holds, release_guest
from snapchain.ops.restore.guest import GuestRestoration, GuestRestoreRequest
from snapchain.ops.ship.run import ShipRequest, run as ship
from snapchain.repository.opening import create_repository
from snapchain.testing.history import identical
from tests.ops.guest_points import GUEST, Guest, Open, instant, numbers, opened, publish, publish_bytes


@pytest.fixture(params=["directory", "replica", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    return opened(request.param, request, tmp_path)


@pytest.fixture(params=["directory", "replica"])
def near(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Empty."""
    return opened(request.param, request, tmp_path)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Guest]:
    """A repository and a replica, each with three guest points of two disks."""
    folder = tmp_path_factory.mktemp("history")
    guest = Guest(folder / "g")
    create_repository(str(folder / "directory"), passphrase=lambda: None, encryption="none")
    for number in (1, 2, 3):
        guest.grow(number)
        for url in (f"{folder}/directory", f"dir:{folder}/replica"):
            guest.ship(open_destination(url, writing=True), number)
    return folder, guest


@dataclass(frozen=True)
class Three:
    """A copy of the history. guest: what its points must show."""

    url: str
    guest: Guest

    def __call__(self) -> Destination:
        return open_destination(self.url, writing=True)


@pytest.fixture(params=["directory", "replica"])
def three(request: pytest.FixtureRequest, history: tuple[Path, Guest], tmp_path: Path) -> Three:
    folder, guest = history
    shutil.copytree(folder / request.param, tmp_path / request.param)
    return Three(f"{'dir:' if request.param == 'replica' else ''}{tmp_path}/{request.param}", guest)


def comes_back(place: Open, guest: Guest, number: int, out: Path) -> None:
    destination = place()
    view = guest_at(destination, GUEST)
    point = next(each for each in view.points if each.instant == instant(number))
    request = GuestRestoreRequest(directory=out, point=str(point.point))
    GuestRestoration(destination, view, request).run()
    for name in guest.names:
        assert identical(out / f"{name}.qcow2", guest.shown[instant(number), name])


def test_guest_points_go_whole(place: Open, tmp_path: Path) -> None:
    guest = Guest(tmp_path / "g")
    for number in range(1, 5):
        guest.point(place(), number, labels=["release"] if number == 1 else [])
    guest.point(place(), 5, names=["vda"], with_record=False)  # interrupted
    guest.point(place(), 6)
    guest.point(place(), 7, names=["vda"], with_record=False)  # may be under way
    policy = Policy(last=1, labels=frozenset({"release"}))
    plan = guest_points_merge.plan(place(), GUEST, policy)
    before = numbers(place())
    assert [each.point for each in plan.points if each.kept] == [1, 5]
    assert plan.leftovers == 1
    report = guest_points_merge.run(place(), GUEST, policy)
    assert before != numbers(place()) == {"vda": [1, 6, 7], "vdb": [1, 6], ".guest": [1, 6]}
    assert (report.points_kept, report.points_dropped, report.leftovers) == ((1, 5), (2, 3, 4), 1)
    assert (report.layers_before, report.layers_after) == (plan.layers_before, plan.layers_after)
    assert [each.disk for each in report.disks] == ["web1/.guest", "web1/vda", "web1/vdb"]
    for number in (1, 6):
        comes_back(place, guest, number, tmp_path / f"out{number}")
    found = guest_verify.verify(place(), share=1.0)
    assert found.ok, found.findings
    assert guest_points_merge.run(place(), GUEST, policy).points_dropped == ()


@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_a_run_that_dies_is_finished_by_the_next(
    three: Three, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    """Between two disks no guest point is shown that lacks one."""
    destination = three()
    real, calls = destination.merging, 0

    def merging(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(destination, "merging", merging)
    with pytest.raises(KeyboardInterrupt):
        guest_points_merge.run(destination, GUEST, Policy(last=1))
    view = guest_at(three(), GUEST)
    assert all(set(each.disks) == {"web1/vda", "web1/vdb"} for each in view.points)
    assert len(view.points) == (3 if dies_at == 1 else 1)
    assert guest_verify.verify(three()).ok
    guest_points_merge.run(three(), GUEST, Policy(last=1))
    assert numbers(three()) == {"vda": [3], "vdb": [3], ".guest": [3]}
    comes_back(three, three.guest, 3, tmp_path / "out")


def test_a_disk_that_cannot_be_merged_is_left_to_the_next_run(three: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    destination = three()
    real = destination.merging

    def merging(disk: str, *args: Any, **more: Any) -> Any:
        if disk == "web1/vda":
            raise Busy("somebody has it open", subject=disk)
        return real(disk, *args, **more)

    monkeypatch.setattr(destination, "merging", merging)
    report = guest_points_merge.run(destination, GUEST, Policy(last=1))
    assert [(each.disk, each.kind) for each in report.failed] == [("web1/vda", "busy")]
    assert numbers(three()) == {"vda": [1, 2, 3], "vdb": [3], ".guest": [3]}
    assert guest_points_merge.run(three(), GUEST, Policy(last=1)).failed == ()
    assert numbers(three())["vda"] == [3]


def test_what_is_held_meanwhile_keeps_its_guest_point(three: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    real = guest_points_merge._decided

    def decided(*args: Any, **more: Any) -> Any:
        found = real(*args, **more)
        three().hold("web1/.guest", "1", "audit")
        return found

    monkeypatch.setattr(guest_points_merge, "_decided", decided)
    report = guest_points_merge.run(three(), GUEST, Policy(last=1))
    assert (report.points_kept, report.points_dropped) == ((1, 3), (2,))
    assert numbers(three()) == {"vda": [1, 3], "vdb": [1, 3], ".guest": [1, 3]}


def test_one_disk_of_a_guest_is_not_thinned_alone(three: Three) -> None:
    before = numbers(three())
    for disk in three().disks():
        for act in ("plan", "run"):
            with pytest.raises(InvalidInput) as refused:
                getattr(three().merging(disk.name, Policy(last=1)), act)()
            assert refused.value.hint == "name the guest: DEST::web1"
    assert numbers(three()) == before
    with pytest.raises(NotFound, match="no such guest"):
        guest_points_merge.run(three(), "web9", Policy(last=1))
    with pytest.raises(InvalidInput, match="no rule"):
        guest_points_merge.run(three(), GUEST, Policy())


def test_points_of_a_time_before_the_guest_go_on_their_own(near: Open, tmp_path: Path) -> None:
    guest = Guest(tmp_path / "g")
    for number in (1, 2):
        guest.grow(number)
        ship(ShipRequest(image=guest.images["vda"], disk="web1/vda"), near())
    for number in (3, 4):
        guest.point(near(), number)
    guest_points_merge.run(near(), GUEST, Policy(last=1))
    assert numbers(near()) == {"vda": [0, 4], "vdb": [4], ".guest": [4]}


def test_a_held_guest_point_stays(three: Three) -> None:
    assert hold_guest(three(), GUEST, "audit", point="1", dry_run=True).holds
    assert not guest_at(three(), GUEST).point("1").holds
    report = hold_guest(three(), GUEST, "audit", point="1", reason="case 7")
    assert [(each.disk, each.point) for each in report.disks] == [("web1/vda", 1), ("web1/vdb", 1)]
    assert (report.address, report.holds[0].tag) == (f"{three().url}::web1@1", "audit")
    three().hold("web1/vdb", "3", "lab")
    listed = list_holds(three()).holds
    assert [(each.name, each.point, each.tag, each.disks) for each in listed] == [
        ("web1", 1, "audit", ("web1/vda", "web1/vdb")),
        ("web1", 3, "lab", ("web1/vdb",)),
    ]
    assert list_holds(three(), "web1/vdb").holds[-1].name == "web1/vdb", "of a disk alone the disk's own"
    three().release("web1/vdb", "3", "lab")
    guest_points_merge.run(three(), GUEST, Policy(last=1))
    assert numbers(three()) == {"vda": [1, 3], "vdb": [1, 3], ".guest": [1, 3]}
    # One of the holds was released already, as by a run that was cut off.
    three().release("web1/.guest", "1", "audit")
    assert guest_points_merge.run(three(), GUEST, Policy(last=1)).points_dropped == ()
    assert release_guest(three(), GUEST, "audit", point="1").holds == ()
    with pytest.raises(NotFound, match="is not held"):
        release_guest(three(), GUEST, "audit", point="1")
    with pytest.raises(InvalidInput, match="none is named"):
        hold_guest(three(), GUEST, "audit", point=None)
    guest_points_merge.run(three(), GUEST, Policy(last=1))
    assert numbers(three()) == {"vda": [3], "vdb": [3], ".guest": [3]}


def test_a_hold_that_fails_in_the_middle_leaves_nothing(three: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    three().hold("web1/vda", "1", "old")
    destination = three()
    real = destination.hold

    def hold(disk: str, *args: Any, **more: Any) -> Any:
        if disk == "web1/.guest":
            raise Unavailable("the link broke")
        return real(disk, *args, **more)

    monkeypatch.setattr(destination, "hold", hold)
    for tag in ("audit", "old"):
        with pytest.raises(Unavailable, match="the link broke"):
            hold_guest(destination, GUEST, tag, point="1")
        assert three().disks("web1/vdb")[0].points[0].holds == ()
    assert [each.tag for each in three().disks("web1/vda")[0].points[0].holds] == ["old"]


def test_verify_names_the_guest_point_and_what_it_lacks(place: Open, tmp_path: Path) -> None:
    guest = Guest(tmp_path / "g")
    record = guest.point(place(), 1)
    assert guest_verify.verify(place(), GUEST).ok
    whole = guest_verify.verify(place(), GUEST, share=1.0)
    assert (whole.ok, whole.disks, whole.points, whole.data_read) == (True, 3, 3, True)
    assert guest_verify.verify(place(), "web1/vda").disks == 1
    lost = record.disks[0].model_copy(update={"name": "vdz", "disk": "web1/vdz"})
    other = record.disks[1].model_copy(update={"content_id": "0" * 64})
    forged = record.model_copy(update={"instant": instant(2), "disks": (record.disks[0], other, lost)})
    guest.grow(2)
    for name in guest.names:
        moment = Moment(instant(2), Consistency.CRASH)
        ship(ShipRequest(image=guest.images[name], disk=f"web1/{name}", moment=moment), place())
    publish(place(), forged, tmp_path)
    for report in (guest_verify.verify(place()), guest_verify.verify(place(), GUEST)):
        assert not report.ok
        found = {(each.kind, each.disk, each.points, each.subject) for each in report.findings}
        assert found == {("not-found", "web1/.guest", (2,), "web1@2"), ("corrupt", "web1/.guest", (2,), "web1@2")}
        text = " ".join(each.message for each in report.findings)
        for name in ("vdz", "vda", "vdb"):
            assert name in text
    with pytest.raises(NotFound, match="web9"):
        guest_verify.verify(place(), "web9")


def test_verify_finds_what_is_no_record(near: Open, tmp_path: Path) -> None:
    guest = Guest(tmp_path / "g")
    record = guest.point(near(), 1, with_record=False)
    publish_bytes(near(), b"{}".ljust(512), tmp_path, instant(1), record.time)
    (finding,) = guest_verify.verify(near()).findings
    assert (finding.kind, finding.disk, finding.points) == ("corrupt", "web1/.guest", (1,))


def test_two_guest_points_are_compared_disk_by_disk(near: Open, tmp_path: Path) -> None:
    guest = Guest(tmp_path / "g")
    guest.point(near(), 1)
    guest.names = ["vda"]
    guest.point(near(), 2)

    def compared(one: str, other: str) -> Any:
        place: ReadableDestination = near()
        view = guest_at(place, GUEST)
        return diff_guests((place, view, one), (place, view, other))

    same = compared("1", "1")
    assert (same.identical, same.changed_bytes, len(same.disks)) == (True, 0, 2)
    report = compared("1", "2")
    assert (report.identical, [(each.disk, each.only_in) for each in report.disks]) == (
        False,
        [("vda", None), ("vdb", "old")],
    )
    assert report.disks[0].difference.changed_bytes == report.changed_bytes > 0
    assert [each.only_in for each in compared("2", "1").disks] == [None, "new"]
    with pytest.raises(NotFound, match="has no point 9"):
        compared("1", "9")
