"""Whole runs on real images and real repositories."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import threading
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from snapchain.errors import Busy, Interrupted, Unavailable
from snapchain.model.events import Event
from snapchain.ops.hold import hold_image, release_image
from snapchain.ops.nightly.report import Outcome
from snapchain.ops.restore.run import Restoration
from snapchain.ops.single_run import only_run
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.verification import verify
from tests.ops.nightly.night import EVENING, Clock, Host, MiB, in_use, row
from tests.ops.stacks import flat, names, same, write


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    made.repository()
    return made


def test_a_week_of_nights_ships_each_change_once_and_every_point_restores(host: Host, tmp_path: Path) -> None:
    image = host.disk("web1")
    text = "[keep]\nlast = 3\n[[disks]]\npath = 'images/web1.qcow2'\nname = '{stem}/vda'\nmerge_above = 4\n"
    clock = Clock(step=timedelta(seconds=1))
    for night in range(7):
        flat(image, tmp_path / f"{night}.raw")
        report = host.run(text, clock=clock)
        disk = row(report, "web1/vda")
        assert (report.outcome, disk.faults, disk.left) == (Outcome.OK, (), ())
        assert disk.snapshot == "made"
        (shipped,) = disk.destinations
        # Merged files are known again: never more is read than what the guest has written since the night before.
        assert shipped.bytes_read == 256 << 10, night
        assert disk.chain_length == min(night + 2, 4)
        assert (disk.merge is not None) == (night > 2)
        write(image, f"write -P {100 + night} {night * 256}k 256k", "write -P 99 3M 0k")
    assert len(names(host.images)) == 4
    points = host.repository().catalogue("web1/vda").points
    assert [point.point for point in points] == [5, 6, 7]
    assert all(EVENING < point.time < clock.now for point in points), "when it was sealed, not when it had arrived"
    for point in points:
        out = tmp_path / f"restored-{point.point}.raw"
        Restoration(RepositoryDestination(host.repository()), "web1/vda", out, point=str(point.point)).run()
        assert out.read_bytes() == (tmp_path / f"{point.point - 1}.raw").read_bytes()
    assert host.metric("chain_length", disk="web1/vda") == 4
    assert host.metric("points", disk="web1/vda", destination="vault") == 3
    assert host.metric("shipped_bytes", disk="web1/vda", destination="vault") == 256 << 10


def test_a_disk_that_nobody_wrote_to_gets_a_point_and_no_layer(host: Host) -> None:
    host.disk("web1")
    host.run("")
    before = names(host.images)
    again = row(host.run(""), "web1")
    assert (again.snapshot, again.outcome) == ("unchanged", Outcome.OK)
    assert names(host.images) == before
    catalogue = host.repository().catalogue("web1")
    assert [point.point for point in catalogue.points] == [1, 2]
    assert len(catalogue.parents) == 1


def test_an_image_in_use_is_a_failure_unless_it_may_be(host: Host) -> None:
    host.disk("web1")
    host.disk("web2")
    with in_use(host.images / "web1.qcow2"):
        told = host.run("")
        assert (told.outcome, told.complete) == (Outcome.FAILED, False)
        assert row(told, "web1").faults[0].kind == "busy"
        assert "qemu-io" in row(told, "web1").faults[0].message
        assert row(told, "web2").outcome is Outcome.OK
        skipped = host.run("[[disks]]\nglob = 'images/*.qcow2'\nwhen_busy = 'skip'\n")
        assert (skipped.outcome, skipped.complete) == (Outcome.BUSY, True)
        assert skipped.counts == {
            Outcome.OK: 1,
            Outcome.BUSY: 1,
            Outcome.LEFT: 0,
            Outcome.DAMAGED: 0,
            Outcome.FAILED: 0,
        }
    assert host.metric("disk_success", disk="web1") == 0
    assert host.metric("last_success_timestamp_seconds", disk="web1", destination="vault") == 0
    assert host.metric("rpo_lag_seconds", disk="web1", destination="vault") == math.inf


def test_outside_of_its_window_nothing_is_begun(host: Host, tmp_path: Path) -> None:
    host.disk("web1")
    text = f'window = "22:00-06:00"\n[hooks]\nbefore = ["touch", "{tmp_path}/began"]\n'
    noon = Clock(EVENING.replace(hour=12))
    report = host.run(text, clock=noon)
    assert report.outcome is Outcome.LEFT
    assert "outside of the window 22:00-06:00" in report.left[0]
    assert names(host.images) == ["web1.qcow2"]
    assert not (tmp_path / "began").exists()
    assert host.run(text, clock=noon, any_time=True).outcome is Outcome.OK


def test_a_destination_that_is_down_keeps_local_layers_and_stops_no_other(host: Host) -> None:
    image = host.disk("web1")
    text = (
        "[[disks]]\nglob = 'images/*.qcow2'\nmerge_above = 4\n"
        "[[destinations]]\nname = 'vault'\nurl = 'repo'\n[[destinations]]\nname = 'away'\nurl = 'away'\n"
    )
    for night in range(5):
        report = host.run(text)
        disk = row(report, "web1")
        assert report.outcome is disk.outcome is Outcome.FAILED
        assert [each.outcome for each in disk.destinations] == [Outcome.OK, Outcome.FAILED]
        assert disk.merge is None
        assert disk.why_not_merged == "not every destination holds it"
        assert disk.chain_length == night + 2
        write(image, f"write -P {night + 50} {night * 128}k 128k")
    assert [each.outcome for each in report.destinations] == [Outcome.OK, Outcome.FAILED]
    host.repository("away")
    back = row(host.run(text), "web1")
    assert back.outcome is Outcome.OK
    assert back.destinations[1].layers_sent == 3, "the root, all that came since, composed, and the newest"
    assert back.merge is not None
    assert back.chain_length == 4
    assert {each.name for each in host.images.iterdir()} >= {"web1.1.qcow2", "web1.6.qcow2", "web1.qcow2"}


def test_with_no_destination_at_all_no_snapshot_is_made(host: Host) -> None:
    host.disk("web1")
    report = host.run("[[destinations]]\nname = 'away'\nurl = 'away'\n")
    assert row(report, "web1").faults[0].kind == "not-found"
    assert names(host.images) == ["web1.qcow2"]


def test_what_another_destination_lacks_is_never_merged_even_when_both_ships_went_well_once(host: Host) -> None:
    """A destination that was put back to an older state lacks layers: told from its catalogue, not from our memory."""
    image = host.disk("web1")
    text = (
        "[[disks]]\nglob = 'images/*.qcow2'\nmerge_above = {cap}\n"
        "[[destinations]]\nname = 'vault'\nurl = 'repo'\n[[destinations]]\nname = 'two'\nurl = 'two'\n"
    )
    host.repository("two")
    for night in range(3):
        host.run(text.format(cap=9))
        write(image, f"write -P {night + 50} {night * 128}k 128k")
        if night == 0:
            shutil.copytree(host.directory / "two", host.directory / "older")
    shutil.rmtree(host.directory / "two")
    (host.directory / "older").rename(host.directory / "two")
    refused = row(host.run(text.format(cap=4)), "web1")
    assert [each.outcome for each in refused.destinations] == [Outcome.OK, Outcome.FAILED]
    assert refused.merge is None
    for known in (Path(os.environ["XDG_STATE_HOME"]) / "snapchain" / "repositories").glob("*.generations"):
        known.unlink()  # as the refusal says, for one that was put back on purpose
    report = row(host.run(text.format(cap=4)), "web1")
    assert [each.bytes_read for each in report.destinations] == [0, 3 * 128 << 10]
    assert report.outcome is Outcome.OK
    assert report.merge is not None, "by now both hold everything"


def test_layers_on_hold_stay(host: Host) -> None:
    image = host.disk("web1")
    text = "[[disks]]\npath = 'images/web1.qcow2'\nmerge_above = 4\n"
    for night in range(6):
        report = row(host.run(text), "web1")
        write(image, f"write -P {night + 50} {night * 128}k 128k")
        if night == 2:
            hold_image(host.images / "web1.3.qcow2", "golden")
    assert report.outcome is Outcome.OK
    assert "web1.3.qcow2" in names(host.images)
    assert report.chain_length == 6, "root, 2, what is held, 4 and 5, what the next shipment builds on, top"
    assert report.why_not_merged is not None
    assert "web1.3.qcow2 (held: golden)" in report.why_not_merged
    release_image(host.images / "web1.3.qcow2", "golden")
    released = row(host.run(text), "web1")
    assert (released.chain_length, released.why_not_merged) == (4, None)
    assert released.destinations[0].bytes_read == 128 << 10


def test_a_budget_of_merging_is_spent_on_what_it_suffices_for(host: Host) -> None:
    for name in ("a", "b"):
        image = host.disk(name)
        for night in range(4):
            host.run("")
            write(image, f"write -P {night + 50} {night * 256}k 256k")
    text = '[budget]\nmerge = 1000\n[[disks]]\nglob = "images/*.qcow2"\nmerge_above = 4\n'
    first = host.run(text, clock=Clock(EVENING + timedelta(days=1), timedelta(seconds=1)))
    done, left = first.disks
    if done.merge is not None and done.merge.bytes_moved == 0:
        assert left.outcome is Outcome.OK, "where blocks are shared nothing is moved"
        return
    assert (done.outcome, done.chain_length) == (Outcome.OK, 4), "what is larger than a whole budget has its turn"
    assert left.outcome is Outcome.LEFT
    assert "the budget of bytes to merge" in left.left[0]
    assert left.destinations[0].outcome is Outcome.OK
    second = host.run(text, clock=Clock(EVENING + timedelta(days=2), timedelta(seconds=1)))
    assert [disk.disk for disk in second.disks] == [left.disk, done.disk]
    assert second.outcome is Outcome.OK


def test_budgets_end_a_kind_of_work_and_the_next_run_goes_on(host: Host) -> None:
    for number in range(4):
        host.disk(f"d{number}")
    text = '[budget]\nship = "600K"\n'
    first = host.run(text)
    assert [disk.outcome for disk in first.disks] == [Outcome.OK, Outcome.OK, Outcome.LEFT, Outcome.LEFT]
    assert "budget" in row(first, "d2").left[0]
    second = host.run(text, clock=Clock(EVENING + timedelta(days=1)))
    assert [disk.disk for disk in second.disks] == ["d2", "d3", "d0", "d1"]
    assert second.outcome is Outcome.OK
    greedy = host.disk("huge")
    write(greedy, "write -P 9 1M 2M")
    third = host.run(text, clock=Clock(EVENING + timedelta(days=2)))
    assert third.disks[0].disk == "huge"
    assert third.outcome is Outcome.OK, "what is larger than the whole budget is done when its turn comes"


def test_several_disks_at_once_give_the_same_result(host: Host) -> None:
    for number in range(6):
        host.disk(f"d{number}")
    report = host.run("concurrency = 3\n[[destinations]]\nname = 'vault'\nurl = 'repo'\nconcurrency = 2\n")
    assert report.counts[Outcome.OK] == sum(report.counts.values()) == 6
    assert [disk.disk for disk in report.disks] == [f"d{number}" for number in range(6)]
    assert len(host.repository().catalogues()) == 6


def test_the_sample_turns(host: Host) -> None:
    for number in range(3):
        host.disk(f"d{number}")
    seen = []
    for night in range(4):
        report = host.run(
            "[[destinations]]\nname='vault'\nurl='repo'\nverify = {disks = 1, share = '100%'}\n",
            clock=Clock(EVENING + timedelta(days=night), timedelta(seconds=1)),
        )
        (verified,) = report.destinations[0].verified
        assert verified.checked_bytes == 256 << 10
        seen.append(verified.disk)
    assert seen == ["d0", "d1", "d2", "d0"]


IN_PLACE = "[[disks]]\nglob = 'images/*.qcow2'\nsnapshot = false\n"
VAULT = "[[destinations]]\nname = 'vault'\nurl = 'repo'\nverify = {disks = 2, share = '100%'}\n"


def lose_packs(host: Host) -> None:
    for pack in (host.directory / "repo" / "packs").rglob("*"):
        if pack.is_file():
            pack.unlink()


def test_a_night_mends_what_its_destination_has_lost(host: Host) -> None:
    """Of sealed layers that need not be shipped, too."""
    host.disk("web1")
    first = host.run("")
    lose_packs(host)
    report = host.run("")
    assert report.outcome is Outcome.OK
    assert report.disks[0].destinations[0].layers_sent > 0
    assert report.disks[0].destinations[0].content_id == first.disks[0].destinations[0].content_id
    assert verify(host.repository(), share=1.0).ok


def test_a_disk_of_which_bytes_are_lost_is_not_ok(host: Host) -> None:
    path = host.disk("web1")
    host.disk("web2")
    text = f"{IN_PLACE}{VAULT}"
    host.run(text)
    write(path, "write -P 200 0 256k")
    lose_packs(host)
    report = host.run(text)
    web1, web2 = report.disks
    assert (web1.outcome, web2.outcome) == (Outcome.DAMAGED, Outcome.OK)
    assert [(each.outcome, each.damaged) for each in web1.destinations] == [(Outcome.DAMAGED, (1,))]
    assert report.counts[Outcome.DAMAGED] == 1
    assert not report.complete
    assert report.destinations[0].outcome is Outcome.FAILED
    assert {each.disk for each in report.destinations[0].verified if each.findings} == {"web1"}
    assert host.metric("disks", outcome="damaged") == 1
    assert host.metric("disk_success", disk="web1") == 0
    assert host.metric("disk_success", disk="web2") == 1
    assert host.metric("verify_findings", destination="vault") >= 1
    assert host.metric("destination_success", destination="vault") == 0
    assert host.run(text).disks[0].outcome is Outcome.DAMAGED
    # By a clock for which no point, dated by its file, is of the future.
    later = Clock(datetime.fromtimestamp(path.stat().st_mtime + 60, EVENING.tzinfo))
    dropped = host.run(f"[keep]\nlast = 1\n{text}", clock=later, any_time=True)
    assert [each.points for each in dropped.disks[0].destinations] == [1]
    assert host.run(text).outcome is Outcome.OK


def test_what_only_the_sample_finds_marks_the_disk(host: Host) -> None:
    path = host.disk("web1")
    text = f"{IN_PLACE}{VAULT}"
    host.run(text)
    write(path, "write -P 200 0 256k")
    for pack in (host.directory / "repo" / "packs").rglob("*"):
        if pack.is_file():
            pack.write_bytes(bytes(pack.stat().st_size))
    report = host.run(f"{text}gc = false\n")
    assert report.disks[0].outcome is Outcome.DAMAGED
    assert report.disks[0].destinations[0].outcome is Outcome.DAMAGED
    assert report.outcome is Outcome.FAILED


def test_one_run_at_a_time(host: Host) -> None:
    host.disk("web1")
    host.run("")
    with only_run(host.directory / "state" / "lock", wait=0, on_wait=print), pytest.raises(Busy, match="another run"):
        host.run("")


def test_an_interrupt_leaves_a_report_and_the_next_run_begins_with_the_rest(host: Host) -> None:
    for number in range(4):
        host.disk(f"d{number}")
    host.run("")
    for number in range(4):
        write(host.images / f"d{number}.qcow2", "write -P 7 1M 1M")

    def interrupting(event: Event) -> None:
        if getattr(event, "phase", "") == "ship d2":
            raise KeyboardInterrupt

    day = Clock(EVENING + timedelta(days=1), timedelta(seconds=1))
    cut = host.run("", clock=day, on_event=interrupting)
    assert cut.interrupted
    assert not cut.complete
    assert row(cut, "d0").outcome is Outcome.OK
    assert row(cut, "d2").left == ("ship to vault: the run was interrupted in the middle of it",)
    assert row(cut, "d2").snapshot == "made"
    assert row(cut, "d3").left == ("all of it: the run ended before its turn",)
    assert cut.destinations[0].outcome is Outcome.LEFT
    assert host.metric("disk_success", disk="d0") == 1
    assert host.metric("disk_success", disk="d3") == 0
    assert host.metric("last_run_success") == 0
    again = host.run("", clock=Clock(EVENING + timedelta(days=2), timedelta(seconds=1)))
    assert [disk.disk for disk in again.disks] == ["d2", "d3", "d0", "d1"]
    assert again.outcome is Outcome.OK
    assert row(again, "d2").destinations[0].bytes_read == MiB


def test_an_interrupt_ends_all_workers(host: Host) -> None:
    for number in range(4):
        host.disk(f"d{number}")

    def interrupting(event: Event) -> None:
        if getattr(event, "phase", "").startswith("ship"):
            raise Interrupted("SIGTERM")

    assert host.run("concurrency = 2\n", on_event=interrupting).interrupted
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("disk")]


def test_two_images_of_one_name_hurt_nobody_else(host: Host) -> None:
    host.disk("web1")
    other = host.images / "other"
    other.mkdir()
    (other / "web2.qcow2").write_bytes(host.disk("web2").read_bytes())
    report = host.run("[[disks]]\nglob = 'images/**/*.qcow2'\n")
    assert row(report, "web1").outcome is Outcome.OK
    assert {disk.disk for disk in report.disks if disk.outcome is Outcome.FAILED} == {
        str(host.images / "web2.qcow2"),
        str(other / "web2.qcow2"),
    }
    assert "web2" not in {each.disk for each in host.repository().catalogues()}


def test_a_pattern_that_finds_nothing_is_a_failure(host: Host) -> None:
    host.disk("web1")
    report = host.run("[[disks]]\nglob = 'images/*.qcow2'\n[[disks]]\nglob = 'imagse/*.qcow2'\n")
    assert row(report, "web1").outcome is Outcome.OK
    assert report.outcome is Outcome.FAILED
    assert "finds no image" in report.faults[0].message


def test_a_shipped_disk_on_which_another_image_was_put_is_not_dropped_in_silence(host: Host) -> None:
    image = host.disk("web1")
    host.run("")
    clone = host.images / "clone.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", clone], check=True)
    report = host.run("")
    assert row(report, "web1").outcome is Outcome.FAILED
    assert "clone.qcow2 depends on it" in row(report, "web1").faults[0].message
    assert row(report, "clone").outcome is Outcome.OK


def test_a_disk_that_is_gone_is_told(host: Host) -> None:
    host.disk("web1")
    host.disk("web2")
    host.run("")
    for file in host.images.glob("web2*"):
        file.unlink()
    report = host.run("")
    assert report.no_longer_selected == ("web2",)
    assert report.outcome is Outcome.FAILED
    assert "no image is selected for it now" in report.faults[0].message
    assert host.metric("disks_gone") == 1
    assert host.metric("rpo_lag_seconds", disk="web2", destination="vault") >= 0
    retired = host.run("retired = ['web2']\n")
    assert retired.outcome is Outcome.OK
    assert retired.no_longer_selected == ()
    with pytest.raises(AssertionError, match="no series"):
        host.metric("rpo_lag_seconds", disk="web2")


def test_an_image_shipped_as_it_is(host: Host, tmp_path: Path) -> None:
    image = host.disk("web1")
    report = host.run("[[disks]]\npath = 'images/web1.qcow2'\nsnapshot = false\nlabels = ['cold']\n")
    assert row(report, "web1").snapshot == "off"
    assert names(host.images) == ["web1.qcow2"]
    Restoration(RepositoryDestination(host.repository()), "web1", tmp_path / "out.raw", point="cold").run()
    assert same(image, tmp_path / "out.raw")


def test_a_damaged_state_is_put_aside(host: Host) -> None:
    host.disk("web1")
    host.run("")
    (host.directory / "state" / "state.json").write_text("{")
    told: list[Event] = []
    report = host.run("", on_event=told.append)
    assert report.outcome is Outcome.OK
    assert any("damaged" in str(event) for event in told)
    assert (host.directory / "state" / "state.json.broken").exists()


def test_a_disk_with_a_new_name_is_not_missed_under_its_former_one(host: Host) -> None:
    host.disk("web1")
    host.run("")
    renamed = host.run("[[disks]]\nglob = 'images/*.qcow2'\nname = '{stem}/vda'\n")
    assert (renamed.outcome, renamed.no_longer_selected) == (Outcome.OK, ())
    with pytest.raises(AssertionError, match="no series"):
        host.metric("rpo_lag_seconds", disk="web1")
    assert host.metric("points", disk="web1/vda") == 1


def test_a_sealed_layer_is_no_disk_when_the_image_above_it_is_broken_or_gone(host: Host) -> None:
    for name in ("broken", "gone", "sound"):
        host.disk(name)
    host.run("")
    (host.images / "gone.qcow2").unlink()
    with (host.images / "broken.qcow2").open("r+b") as image:
        image.write(bytes(512))
    before = {each.name: each.read_bytes() for each in host.images.glob("*.1.qcow2")}
    report = host.run("")
    assert {disk.disk for disk in report.disks} == {"broken", "sound"}
    assert row(report, "broken").outcome is Outcome.FAILED
    assert report.no_longer_selected == ("gone",)
    assert {each.name: each.read_bytes() for each in host.images.glob("*.1.qcow2")} == before
    assert {each.disk for each in host.repository().catalogues()} == {"broken", "gone", "sound"}


def test_an_image_named_twice_is_worked_on_once(host: Host) -> None:
    host.disk("web1")
    (host.images / "alias.qcow2").symlink_to("web1.qcow2")
    both = "[[disks]]\nglob = 'images/*.qcow2'\n[[disks]]\npath = 'images/web1.qcow2'\nname = 'main'\n"
    report = host.run(both)
    assert [(disk.disk, disk.outcome) for disk in report.disks] == [("main", Outcome.OK)]
    twice = host.run(both + "[[disks]]\npath = 'images/../images/alias.qcow2'\nname = 'other'\n")
    assert row(twice, "main").outcome is Outcome.OK
    (other,) = (disk for disk in twice.disks if disk.disk != "main")
    assert (other.outcome, other.faults[0].message) == (Outcome.FAILED, "this image is disk main already")


def test_what_cannot_be_selected_hurts_nothing_else(host: Host) -> None:
    host.disk("web1")
    (host.images / "lost.qcow2").symlink_to("nowhere.qcow2")
    shutil.copy(host.images / "web1.qcow2", host.images / os.fsdecode(b"b\xffd.qcow2"))
    (host.images / "directory.qcow2").mkdir()
    report = host.run("")
    assert {disk.disk: disk.outcome for disk in report.disks} == {"web1": Outcome.OK, "lost": Outcome.FAILED}
    assert row(report, "lost").faults[0].kind == "not-found"
    (fault,) = report.faults
    assert (fault.kind, "b\\xffd.qcow2" in str(fault.subject)) == ("unsupported", True)


def test_a_disk_during_which_the_run_was_killed_does_not_keep_the_others_from_their_turn(host: Host) -> None:
    """Otherwise one image that always ends the process would be the first of every night, and the last."""
    for number in range(3):
        host.disk(f"d{number}")
    day = Clock(EVENING, timedelta(seconds=1))

    def killed(event: Event) -> None:
        if getattr(event, "phase", "") == "ship d0":
            os._exit(9)

    pid = os.fork()
    if pid == 0:
        host.run("", clock=day, on_event=killed)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    report = host.run("", clock=Clock(EVENING + timedelta(days=1), timedelta(seconds=1)))
    assert [disk.disk for disk in report.disks] == ["d1", "d2", "d0"]
    assert report.outcome is Outcome.OK


def test_damage_is_not_forgotten_because_the_next_sample_is_of_another_disk(host: Host) -> None:
    for name in ("d0", "d1", "d2"):
        host.disk(name)
    text = "[[destinations]]\nname='vault'\nurl='repo'\ngc = false\nverify = {disks = 1, share = '100%'}\n"
    clock = Clock(step=timedelta(seconds=1))
    assert host.run(text, clock=clock).outcome is Outcome.OK
    packs = [pack for pack in (host.directory / "repo" / "packs").rglob("*") if pack.is_file()]
    kept = {pack: pack.read_bytes() for pack in packs}
    for pack in packs:
        pack.write_bytes(bytes(len(kept[pack])))
    for _ in range(2):
        report = host.run(text, clock=clock)
        assert report.destinations[0].outcome is Outcome.FAILED
        assert host.metric("verify_findings", destination="vault") >= 1
    for pack, data in kept.items():
        pack.write_bytes(data)
    mended = host.run(text, clock=clock)
    assert {each.disk for each in mended.destinations[0].verified} >= {"d1", "d2"}
    assert mended.outcome is Outcome.OK
    assert host.metric("verify_findings", destination="vault") == 0


def test_a_night_that_did_nothing_leaves_the_metrics_of_the_last_one_true(host: Host) -> None:
    host.disk("web1")
    text = 'window = "22:00-06:00"\n'
    done = host.run(text, clock=Clock(step=timedelta(seconds=1)))
    (verified,) = done.destinations[0].verified
    before = host.metric("last_success_timestamp_seconds", disk="web1", destination="vault")
    noon = Clock(EVENING + timedelta(hours=14))
    report = host.run(text, clock=noon)
    assert report.destinations[0].outcome is Outcome.LEFT
    assert host.metric("last_success_timestamp_seconds", disk="web1", destination="vault") == before
    assert host.metric("rpo_lag_seconds", disk="web1", destination="vault") == noon.now.timestamp() - before
    assert host.metric("verified_bytes", destination="vault") == verified.checked_bytes
    assert host.metric("gc_timestamp_seconds", destination="vault") <= done.finished.timestamp()
    assert host.metric("destination_success", destination="vault") == 0


def test_a_window_that_closes_during_a_shipment_ends_it_and_the_next_night_goes_on(host: Host, tmp_path: Path) -> None:
    image = host.disk("web1")
    write(image, "write -P 3 0 4M")
    flat(image, tmp_path / "truth.raw")
    text = 'window = "22:00-06:00"\n'
    clock = Clock()

    def late(event: Event) -> None:
        if getattr(event, "phase", "") == "ship web1" and getattr(event, "done", 0) > 0:
            clock.now = EVENING + timedelta(hours=9)

    cut = row(host.run(text, clock=clock, on_event=late), "web1")
    assert (cut.outcome, cut.faults) == (Outcome.LEFT, ())
    assert cut.left == ("ship to vault: the window 22:00-06:00 is over",)
    assert cut.destinations[0].outcome is Outcome.LEFT
    assert host.repository().catalogues() == []
    again = row(host.run(text, clock=Clock(EVENING + timedelta(days=1))), "web1")
    assert (again.outcome, again.snapshot) == (Outcome.OK, "unchanged")
    Restoration(RepositoryDestination(host.repository()), "web1", tmp_path / "out.raw").run()
    assert (tmp_path / "out.raw").read_bytes() == (tmp_path / "truth.raw").read_bytes()


def test_images_that_cannot_be_read_are_not_held_against_the_destination(host: Host) -> None:
    for number in range(5):
        host.disk(f"d{number}")

    def ailing(event: Event) -> None:
        if getattr(event, "phase", "") in {"ship d0", "ship d1", "ship d2"}:
            raise Unavailable("input/output error", subject="an image")

    report = host.run("", on_event=ailing)
    assert [disk.outcome for disk in report.disks] == [Outcome.FAILED] * 3 + [Outcome.OK] * 2
