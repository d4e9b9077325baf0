"""ship --bitmap of a guest that runs: what is stored is judged by qemu-img, what is read by counting."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapchain.cli import main
from snapchain.errors import Busy, Unavailable
from snapchain.guest import journal
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.guest.capture import CaptureRequest
from snapchain.guest.qmp import Monitor
from snapchain.model.events import Event, Notice, OnEvent, Progress, ignore
from snapchain.ops import doctor
from snapchain.ops.guest_doctor import left_behind, treat
from snapchain.ops.ship import guest_bitmap, run as at_rest
from snapchain.ops.ship.guest import GuestShipReport, GuestShipRequest
from snapchain.ops.ship.request import CapturedBy, ShipRequest
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from tests.exhaustive import some
from tests.guest.captures import bitmaps, left_in
from tests.guest.spy import KILL, Spy, changing, every
from tests.ops.test_ship_running import NAMES, REPLICA, REPOSITORY, KiB, MiB, Running

BITMAP, COMPARED, WHOLE = CapturedBy.BITMAP, CapturedBy.COMPARED, CapturedBy.WHOLE


class Captured(Running):
    """The same guest, shipped without overlays."""

    def ship(
        self, on_event: OnEvent = ignore, *, capture: CaptureRequest | None = None, by: Path | None = None
    ) -> GuestShipReport:
        """by: another socket than the machine's"""
        expected = self.now()
        with open_guest(GuestAddress(qmp=by or self.machine.qmp)) as guest:
            report = guest_bitmap.run(
                guest, GuestShipRequest(), capture or CaptureRequest(), self.open(), on_event=on_event
            )
        self.shown[report.guest_point] = expected
        return report

    def settled(self) -> None:
        assert left_in(self.machine) == []
        assert not list(self.folder.glob("*/.snapchain-capture*"))
        assert self.machine.status() == "running"
        assert journal.find() == ([], [])


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one: beside the images QEMU gets a socket, whose path has at most 107 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(params=[REPOSITORY, REPLICA])
def running(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Captured]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", "correct horse")
    found = Captured(tmp_path, request.param)
    with found.machine:
        yield found


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """For sockets: their paths must be short."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


def ways(report: GuestShipReport) -> set[CapturedBy | None]:
    return {each.captured_by for each in report.disks}


def test_points_without_overlays_of_a_guest_that_writes_all_the_time(running: Captured) -> None:
    """Only what a bitmap lists is read, and what is written after the instant is in the next point."""

    def writes(event: Event) -> None:
        if isinstance(event, Progress) and event.done:
            running.write(4 * MiB, 64 * KiB)

    first = running.ship(writes)
    assert ways(first) == {WHOLE}
    running.write(MiB, 128 * KiB)
    second = running.ship(writes)
    assert ways(second) == {BITMAP}
    # Compared, and read again to be stored; what was written during the first shipment is listed, too.
    assert all(each.bytes_read <= 2 * (128 + 64) * KiB for each in second.disks)
    third = running.ship()
    assert ways(third) == {BITMAP}
    nothing = running.ship()
    assert [each.layers_sent for each in nothing.disks] == [0, 0, 0]
    assert [each.unchanged for each in nothing.disks] == [True, True, True]
    assert [each.bytes_read for each in nothing.disks] == [0, 0, 0]
    assert [each.content_id for each in nothing.disks] == [each.content_id for each in third.disks]
    running.settled()
    assert [len(bitmaps(running.machine, f"{name}-top")) for name in NAMES] == [1, 1, 1]
    running.check([2])


def test_the_destinations_of_a_captured_guest_know_of_each_other(running: Captured) -> None:
    """Before the first point is at the second one: a failover there asks the first."""
    running.ship()
    other = ReplicaDestination(DirectoryEndpoint(running.folder / "other"))
    with open_guest(GuestAddress(qmp=running.machine.qmp)) as guest:
        guest_bitmap.run(guest, GuestShipRequest(), CaptureRequest(), other)
    assert [each.url for each in other.guest_state("web1").others] == [running.open().url]


def test_bitmap_comparison_and_rest_agree_on_the_content_id(running: Captured) -> None:
    running.ship()
    for turn in range(2):
        running.write((turn * 3 + 1) * 200 * KiB, 70 * KiB)
        running.machine.io("vda", f"discard {turn * 128}k 64k")
        running._content["vda"][turn * 128 * KiB : (turn * 128 + 64) * KiB] = bytes(64 * KiB)
        by_bitmap = running.ship()
        assert ways(by_bitmap) == {BITMAP}
        for name in NAMES:
            for bitmap in bitmaps(running.machine, f"{name}-top"):
                running.machine.ask("block-dirty-bitmap-remove", node=f"{name}-top", name=bitmap)
        compared = running.ship()
        assert ways(compared) == {COMPARED}
        assert [each.layers_sent for each in compared.disks] == [0, 0, 0]
        assert [each.content_id for each in compared.disks] == [each.content_id for each in by_bitmap.disks]
    running.machine.quit()
    for name, each in zip(NAMES, by_bitmap.disks, strict=True):
        image = running.folder / name / f"{name}.qcow2"
        shipped = at_rest.run(ShipRequest(image=image, disk=f"web1/{name}"), running.open())
        assert shipped.content_id == each.content_id
        assert shipped.bytes_stored < 64 * KiB, "it is known as the same content"


def test_a_lost_bitmap_is_told_and_only_the_difference_is_stored(running: Captured) -> None:
    running.ship()
    running.write(MiB, 64 * KiB)
    for name in NAMES:
        (bitmap,) = bitmaps(running.machine, f"{name}-top")
        running.machine.ask("block-dirty-bitmap-remove", node=f"{name}-top", name=bitmap)
    notices: list[str] = []
    report = running.ship(lambda event: notices.append(event.message) if isinstance(event, Notice) else None)
    assert ways(report) == {COMPARED}
    assert all(each.captured_why == "no dirty bitmap goes back to its newest point" for each in report.disks)
    assert sum("read as a whole: no dirty bitmap goes back" in each for each in notices) == 3
    assert all(each.data_bytes <= 64 * KiB for each in report.disks)
    assert ways(running.ship()) == {BITMAP}
    running.check([2])


@pytest.mark.parametrize("running", [REPOSITORY], indirect=True)
def test_a_full_scratch_file_fails_the_shipment_and_the_next_one_is_fine(running: Captured) -> None:
    running.write(0, 6 * MiB)
    running.ship()
    running.write(0, MiB)

    def writes(event: Event) -> None:
        if isinstance(event, Progress):
            running.write(0, 6 * MiB)

    points = set(running.shown)
    with pytest.raises(Unavailable, match=r"no guest point of web1 is published.*the view of its disk vd. broke"):
        running.ship(writes, capture=CaptureRequest(scratch_bytes=MiB))
    running.shown = {point: shown for point, shown in running.shown.items() if point in points}
    running.settled()
    assert ways(running.ship()) == {BITMAP}, "the older bitmaps went on recording"
    running.check([max(running.shown)])


def test_an_overlay_between_two_captures_is_compared(running: Captured) -> None:
    running.ship()
    running.write(MiB, 64 * KiB)
    Running.ship(running)
    running.write(2 * MiB, 64 * KiB)
    report = running.ship()
    assert ways(report) == {COMPARED}
    running.write(3 * MiB, 64 * KiB)
    assert ways(running.ship()) == {BITMAP}
    running.check([3])


@pytest.mark.sampled
@pytest.mark.parametrize("running", [REPOSITORY], indirect=True)
def test_a_kill_at_many_commands(running: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated by a monitor that answers nothing any more; the doctor, or the next run, ends clean."""
    running.ship()
    original = Monitor.execute
    killed = 0
    for at in some(range(1000), each=19):
        count = 0

        def dying(self: Monitor, command: str, *arguments: object, at: int = at, **more: object) -> object:
            nonlocal count
            count += 1
            if count > at:
                raise Kill
            return original(self, command, *arguments, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(Monitor, "execute", dying)
        running.write(at % 64 * 64 * KiB, 4 * KiB)
        try:
            running.ship()
        except Kill:
            killed += 1
        else:
            break
        finally:
            monkeypatch.setattr(Monitor, "execute", original)
        running.write(at % 64 * 64 * KiB, 4 * KiB)  # the guest goes on with whatever is there
        monkeypatch.setattr(journal.InFlight, "is_abandoned", property(lambda _self: True))
        if at % 2:
            for found in list(left_behind()):
                treat(found.path, on_event=ignore)
            running.settled()
    assert killed > 2
    running.ship()
    running.settled()
    running.check([max(running.shown)])


class Kill(BaseException):
    """Nothing of this process reaches QEMU any more."""


def ends_by_signal(function: Callable[[], object]) -> int | None:
    """Run it in a forked child; the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


@pytest.mark.sampled
@pytest.mark.parametrize("running", [REPOSITORY, REPLICA], indirect=True)
def test_sigkill_at_any_command(running: Captured, run_dir: Path) -> None:
    """Of all that change something in QEMU; the doctor, or the next run, ends clean, and nothing adds up."""
    running.ship()
    with Spy(run_dir / "spy", running.machine.qmp, counts=changing) as spy:
        running.ship(by=spy.path)
        faults = list(every(spy.commands, (KILL,)))
    assert {"blockdev-add", "transaction", "nbd-server-start"} <= set(spy.names())
    for number, fault in enumerate(some(faults, each=37)):
        running.write(number % 64 * 64 * KiB, 4 * KiB)
        with Spy(run_dir / "spy", running.machine.qmp, fault, counts=changing) as spy:
            assert ends_by_signal(lambda path=spy.path: running.ship(by=path)) == signal.SIGKILL, fault  # type: ignore[misc]
            assert spy.happened, fault
            for point in {point.point for point in running.view().points} - set(running.shown):
                running.shown[point] = running.now()  # it died after the record was published
            running.write(number % 64 * 64 * KiB, 4 * KiB)  # the guest goes on with whatever is there
            if number % 2:
                report = doctor.run(doctor.plan([]))
                assert report.well, (fault, report)
                running.settled()
            running.ship(by=spy.path)
        running.settled()
    running.check([1, 2, max(running.shown)])


@pytest.mark.parametrize("running", [REPOSITORY], indirect=True)
def test_two_captures_at_once(running: Captured) -> None:
    heard: list[str] = []

    def again(event: Event) -> None:
        if isinstance(event, Progress) and not heard:
            heard.append("")
            with open_guest(GuestAddress(qmp=running.machine.qmp)) as guest:
                guest_bitmap.run(guest, GuestShipRequest(name="other"), CaptureRequest(), running.open())

    with pytest.raises((Busy, Unavailable), match=r"NBD server is in use|is at work|other QMP client|connected"):
        running.ship(again)
    running.settled()


@pytest.mark.parametrize("running", [REPOSITORY], indirect=True)
def test_the_command(running: Captured, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ship", "--qmp", str(running.machine.qmp), running.url, "--bitmap", "--json"]
    assert main([*arguments, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert [(each["disk"], each["captured_by"]) for each in plan["disks"]] == [(name, "whole") for name in NAMES]
    for number, way in enumerate(["whole", "bitmap"], start=1):
        running.shown[number] = running.now()
        assert main(arguments) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["guest_point"] == number
        assert [each["captured_by"] for each in report["disks"]] == [way] * 3
    running.settled()
    assert main(["ship", str(running.folder), f"{running.url}::web1/vda", "--bitmap"]) == 2
    assert "are for a guest" in capsys.readouterr().err
