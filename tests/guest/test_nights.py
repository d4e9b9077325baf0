"""nightly with guests that run: points, chains, metrics, budgets; guests that come, go, stop and move."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapchain.destinations import open_destination
from snapchain.errors import NotFound
from snapchain.model.consistency import Consistency
from snapchain.ops.guest_points import guest_named
from snapchain.ops.nightly.report import GuestReport, Outcome
from tests.exhaustive import EXHAUSTIVE
from tests.guest.nights import DISKS, PIECE, Host, KiB, row
from tests.ops.stacks import qemu_img
from tests.repository.second_reader import content_id
from tests.waiting import wait_until

NIGHTS = 50 if EXHAUSTIVE else 6
MOST = 5
"""Files of a chain: 4 as configured, and one that a replica, which has merged otherwise, keeps from being merged."""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def _why(found: GuestReport) -> str:
    return "; ".join(f"{each.disk}: {each.chain_length} files, {each.why_not_merged}" for each in found.disks)


@pytest.mark.sampled
def test_many_nights_of_a_writing_guest(host: Host) -> None:
    """Chain, local space, points and metrics stay as configured, and each kept point shows its own night."""
    host.configure('[keep]\nlast = 3\nweekly = 2\n[[guests]]\nqmp = "run/qmp"\nmerge_above = 4\n', standby=True)
    with host.machine() as machine:
        for night in range(NIGHTS):
            for disk in DISKS:
                host.write(machine, disk, night % 7, night % 250 + 1)
                host.write(machine, disk, 20 + night % 11, 250 - night % 200)
            host.remember(night + 1)
            report = host.night(night)
            assert report.outcome is Outcome.OK, report.model_dump_json(indent=1)
            found = row(report)
            assert [each.point for each in found.destinations] == [night + 1, night + 1]
            assert found.consistency is Consistency.CRASH
            assert machine.status() == "running"
            for disk in DISKS:
                assert host.files(disk) <= MOST, _why(found)
                assert host.metric("guest_chain_length", guest="web1", disk=disk) == host.files(disk)
            for place in ("vault", "standby"):
                there = host.metric("guest_points", guest="web1", destination=place)
                assert there == next(each.points for each in found.destinations if each.destination == place)
                assert there <= 5
                assert host.metric("guest_rpo_lag_seconds", guest="web1", destination=place) < 3600
        local = sum(path.stat().st_blocks * 512 for path in host.images.glob("*.qcow2"))
        # Two disks of 18 pieces that the guest overwrites again and again, in at most five files with their tables.
        assert local < 2 * 5 * (18 * PIECE + 512 * KiB)
        assert all(machine.reads(disk, 0, PIECE, host.now[disk][0]) for disk in DISKS)
    for url in (str(host.folder / "repo"), host.replica):
        view = guest_named(open_destination(url, passphrase=lambda: None).disks(), "web1")
        assert view is not None
        assert [each.point for each in view.points][-3:] == [NIGHTS - 2, NIGHTS - 1, NIGHTS]
        for each in view.points:
            for disk in DISKS:
                truth = host.truths[each.point][disk]
                assert each.disks[f"web1/{disk}"].content_id == content_id(bytes(truth)), (url, each.point, disk)
        for each in (view.points[0], view.points[-1]):
            host.restores(url, each.point, each.point)
    for disk in DISKS:
        qemu_img("check", "-q", "-f", "qcow2", host.top(disk))


def test_a_guest_that_is_off_is_taken_at_rest_and_goes_on_from_there(host: Host) -> None:
    """A socket without a QEMU is a fault of that guest: only libvirt knows the disks of a guest that is off."""
    host.configure("")
    with host.machine() as machine:
        host.write(machine, "vda", 1, 7)
        assert host.night(0).outcome is Outcome.OK
    report = host.night(1)
    assert row(report).outcome is Outcome.FAILED
    assert row(report).guest == "web1"
    assert {fault.step for fault in row(report).faults} == {"selection"}
    with host.machine() as machine:
        host.write(machine, "vda", 2, 8)
        host.remember(2)
        assert host.night(2).outcome is Outcome.OK
    host.restores(str(host.folder / "repo"), 2, 2)


def test_a_guest_that_is_gone_is_a_failure_unless_it_is_retired(host: Host) -> None:
    host.configure('\n[[guests]]\nqmp = "run/q*"\nexclude = ["run/qemu.log"]\n')
    with host.machine():
        assert row(host.night(0)).is_new
        assert not row(host.night(1)).is_new
    (host.folder / "run" / "qmp").unlink()
    report = host.night(2)
    assert report.outcome is Outcome.FAILED
    assert report.guests_gone == ("web1",)
    assert host.metric("guests_gone") == 1.0
    host.path.write_text('retired = ["web*"]\n' + host.path.read_text())
    report = host.night(3)
    assert report.guests_gone == ()
    assert [fault.kind for fault in report.faults] == [NotFound.kind]  # the pattern finds none at all
    with pytest.raises(AssertionError, match="no series"):
        host.metric("guest_points", guest="web1")


def test_a_guest_that_came_by_migration_or_left_by_one_is_left(host: Host) -> None:
    host.configure("")
    with host.machine() as machine:
        machine.ask("stop")
        machine.ask("migrate", uri=f"exec:cat > {host.folder}/state.bin")
        while machine.ask("query-migrate")["status"] not in {"completed", "failed"}:
            pass
        wait_until(lambda: machine.status() == "postmigrate")
        found = row(host.night(0))
        assert (found.outcome, found.moved_to) == (Outcome.MOVED, "another host")
        assert [each.outcome for each in found.destinations] == [Outcome.MOVED]
        assert host.files("vda") == 1


def test_a_foreign_job_is_respected(host: Host) -> None:
    host.configure('\n[[guests]]\nqmp = "run/qmp"\nwhen_busy = "skip"\n')
    with host.machine() as machine:
        host.write(machine, "vda", 0, 1)
        machine.ask(
            "drive-mirror",
            **{"job-id": "theirs"},
            device="vda-top",
            target=str(host.folder / "mirror.raw"),
            sync="full",
            format="raw",
        )
        found = row(host.night(0))
        assert found.outcome is Outcome.BUSY, found
        assert host.files("vdb") == 1
        assert [each["type"] for each in machine.ask("query-block-jobs")] == ["mirror"]


def test_hooks_limits_and_the_preview(host: Host) -> None:
    log = host.folder / "hooks.log"
    hook = f'["sh", "-c", "echo $SNAPCHAIN_HOOK $SNAPCHAIN_GUEST $SNAPCHAIN_OUTCOME $SNAPCHAIN_CONSISTENCY >> {log}"]'
    host.configure(
        f"""
        [[guests]]
        qmp = "run/qmp"
        exclude_disks = ["vdb"]
        labels = ["night"]
        [guests.hooks]
        before = {hook}
        after = {hook}
        """
    )
    with host.machine() as machine:
        from snapchain.ops.nightly.document import parse
        from snapchain.ops.nightly.preview import preview

        plan = preview(parse(host.path.read_text(), path=host.path), host.path)
        assert plan.sound
        (guest,) = plan.guests
        assert [each.disk for each in guest.disks] == ["vda"]
        assert host.files("vda") == 1
        host.write(machine, "vda", 0, 1)
        found = row(host.night(0))
        assert [each.disk for each in found.disks] == ["vda"]
        assert log.read_text().splitlines() == ["before web1", "after web1 ok crash"]


def test_without_any_destination_nothing_is_done_to_the_guest(host: Host) -> None:
    host.configure('\n[[destinations]]\nname = "vault"\nurl = "nothing-here"\n')
    with host.machine():
        found = row(host.night(0))
        assert found.outcome is Outcome.FAILED
        assert host.files("vda") == host.files("vdb") == 1
