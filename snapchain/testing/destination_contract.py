"""What every destination must do, as a suite to subclass.

    class TestMine(DestinationContract):
        @pytest.fixture(scope="class")
        @classmethod
        def sites(cls) -> Callable[[], Site]:
            return lambda: MySite(...)      # a place of its own, empty, at each call

Where kinds rightly differ, `Site.traits` says so, and the other behaviour is demanded: nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from snapchain.destination.writing import Moment as GuestMoment
from snapchain.errors import Busy, Conflict, Diverged, InvalidInput, NotFound, Unsupported
from snapchain.host.locks import ImageLock, LockMode
from snapchain.model.consistency import Consistency
from snapchain.model.content import LEAF_BYTES
from snapchain.model.extents import DATA
from snapchain.model.freshness import newest_of
from snapchain.model.guest_checks import CheckKind, GuestCheck, GuestChecks
from snapchain.model.guest_state import GuestChange, GuestState, TakenDisk, Transition, Vouched
from snapchain.model.lease import Lease
from snapchain.model.retention import DropPoints, Policy
from snapchain.objects.memory import MemoryStore
from snapchain.ops.copy.request import CopyRequest
from snapchain.ops.copy.run import run as run_copy
from snapchain.ops.diff import diff, image_side
from snapchain.ops.inspect import inspect_point
from snapchain.ops.log import log
from snapchain.ops.restore.run import Restoration
from snapchain.ops.ship.run import ShipRequest, opened
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.repository import Repository
from snapchain.testing.destination_faults import DestinationFaults
from snapchain.testing.destination_site import DISK, Delivered, Site, Traits, deliver
from snapchain.testing.history import KiB, MiB, Moment, Step, flat, identical, overlay

BAD_DISKS = ("", "a:b", "a@b", "/a", "a/", "a//b", "a\n", " a", "x" * 201)
BAD_TAGS = ("", " a", "a\n", "x" * 101)
BAD_LABELS = ("", "7", "latest", "a@b", "a::b", "a\n", "x" * 101)


class DestinationContract(DestinationFaults):
    """Subclasses give a fixture `sites`, for the whole class: a function that makes an empty Site."""

    # ---- what goes in comes out

    @pytest.mark.parametrize("name", ["whole.raw", "whole.qcow2"])
    def test_every_point_comes_back(self, delivered: Delivered, out: Path, name: str) -> None:
        chosen = list(enumerate(delivered.history, 1))[:: -delivered.site.traits.every]
        for number, moment in chosen:
            path = out / f"{number}-{name}"
            report = Restoration(delivered.site.open(), DISK, path, point=str(number)).run()
            assert identical(path, moment.shown), moment.name
            assert (report.point, report.virtual_size, report.content_id) == (number, moment.size, moment.content_id)
        assert len(list(out.iterdir())) == len(chosen)

    def test_its_points_are_copied_into_a_repository(self, delivered: Delivered, out: Path) -> None:
        made = Repository.create(MemoryStore(), passphrase=lambda: None, encryption="none")
        report = run_copy(CopyRequest(), delivered.site.open(), RepositoryDestination(made))
        assert (report.ok, report.points) == (True, len(delivered.history))
        copied = RepositoryDestination(made).disks(DISK)[0].points
        assert [point.model_copy(update={"layers": 0}) for point in copied] == [
            point.model_copy(update={"layers": 0}) for point in delivered.points
        ]
        newest = delivered.history[-1]
        Restoration(RepositoryDestination(made), DISK, out / "copied.raw").run()
        assert identical(out / "copied.raw", newest.shown)
        assert run_copy(CopyRequest(), delivered.site.open(), RepositoryDestination(made)).points == 0

    @pytest.mark.parametrize("point", [4, 6])
    def test_a_point_comes_back_as_its_layers(self, delivered: Delivered, out: Path, point: int) -> None:
        moment = delivered.history[point - 1]
        path = out / "top.qcow2"
        work = Restoration(delivered.site.open(), DISK, path, point=str(point), whole_chain=True)
        plan = work.plan()
        assert list(out.iterdir()) == []
        report = work.run()
        assert report.files == tuple(file.path for file in plan.files)
        assert (report.bytes_written, report.content_id) == (plan.bytes_to_write, moment.content_id)
        assert 1 < len(report.files) == len(list(out.iterdir()))
        assert identical(path, moment.shown)

    def test_a_point_is_what_was_reported(self, delivered: Delivered) -> None:
        points = delivered.points
        known = [(moment.size, moment.content_id) for moment in delivered.history]
        assert [(point.virtual_size, point.content_id) for point in points] == known
        assert [(report.virtual_size, report.content_id) for report in delivered.reports] == known
        assert [point.point for point in points] == [report.point for report in delivered.reports]
        assert [point.point for point in points] == list(range(1, len(known) + 1))
        assert [point.labels[0] for point in points] == [moment.name for moment in delivered.history]
        times = [delivered.begun]
        for point, after in zip(points, delivered.after, strict=True):
            times += [point.time, after]
        assert times == sorted(times)
        assert all(point.layers >= 1 for point in points)
        assert points[-1].layers == points[-2].layers, "an overlay that says nothing is no layer"

    def test_points_by_name(self, delivered: Delivered, out: Path) -> None:
        count = len(delivered.history)
        wanted: dict[str | None, int] = {
            None: count,
            "latest": count,
            "3": 3,
            "003": 3,
            "hides": 2,
            "even": 7,
            "odd": 6,
        }
        wanted[delivered.after[3].isoformat()] = 4
        wanted["9999-12-31T23:59:59Z"] = count
        place, every = delivered.site.open(), delivered.site.traits.every
        for name, number in list(wanted.items())[::every]:
            plan = Restoration(place, DISK, out / "a.raw", point=name).plan()
            assert (plan.point, plan.content_id) == (number, delivered.history[number - 1].content_id), name
        before = delivered.begun.replace(microsecond=0).isoformat()
        for name in ("0", str(count + 1), "9" * 5000, "no such label", before, "x" * 5000)[::every]:
            with pytest.raises(NotFound):
                Restoration(place, DISK, out / "a.raw", point=name).plan()
        assert list(out.iterdir()) == []

    def test_points_are_read_at_any_offset(self, delivered: Delivered) -> None:
        place, traits = delivered.site.open(), delivered.site.traits
        if not traits.any_offset:
            with pytest.raises(Unsupported, match="at any offset"):
                place.whole(DISK, "1")
            return
        for number, moment in list(enumerate(delivered.history, 1))[:: traits.every]:
            content = moment.shown.read_bytes()
            with place.whole(DISK, str(number)) as disk:
                assert (disk.size, disk.content_id) == (moment.size, moment.content_id)
                for offset in range(disk.size - 7, 0, -(disk.size // 9)):
                    buffer = bytearray(min(100_000, disk.size - offset))
                    disk.read_into(offset, memoryview(buffer))
                    assert buffer == content[offset : offset + len(buffer)]
                for start, length, value in disk.extents.runs():
                    assert value >= DATA or not any(content[start : start + length])
        with pytest.raises(NotFound), place.whole(DISK, "no such label"):
            pass

    def test_its_layers_can_be_seen(self, delivered: Delivered) -> None:
        found = inspect_point(delivered.site.open(), DISK, point="packed")
        moment = delivered.history[3]
        assert (found.virtual_size, found.content_id) == (moment.size, moment.content_id)
        assert len(found.layers) == delivered.points[3].layers
        assert found.layers[-1].virtual_size == moment.size
        assert sum(layer.data_bytes for layer in found.layers) > 500 * KiB
        assert sum(layer.shadowed_bytes for layer in found.layers) > 100 * KiB

    def test_odd_disks(self, site: Site, tmp_path: Path, out: Path) -> None:
        """Nothing but zeroes; one sector; data in the last sector alone; names that need care."""
        disks = {
            "zeroes": Step("zeroes", 4 * MiB, ("write -z 0 1M",)),
            "ein Datenträger + 1%2F": Step("sector", 512, ("write -P 1 0 512",)),
            ".hidden/-dash": Step("last", 5 * MiB - 512, (f"write -P 2 {5 * MiB - 1024} 512",)),
        }
        chosen = list(disks.items())[:: site.traits.every]
        for number, (disk, step) in enumerate(chosen):
            image = overlay(tmp_path / f"{number}.qcow2", None, step)
            shown = flat(image, tmp_path / f"{number}.shown")
            assert deliver(site, image, disk=disk).point == 1
            for name in ("a.raw", "a.qcow2")[:: site.traits.every]:
                path = out / f"{number}{name}"
                Restoration(site.open(), disk, path).run()
                assert identical(path, shown)
        assert [disk.name for disk in log(site.open()).disks] == sorted(disk for disk, _ in chosen)

    # ---- again, and beside one another

    def test_nothing_new_is_not_sent_again(self, site: Site, history: Sequence[Moment], out: Path) -> None:
        first = deliver(site, history[3].image)
        assert (first.layers_sent > 0, first.bytes_read > 500 * KiB) == (True, True)
        with opened(ShipRequest(image=history[3].image, disk=DISK), site.open(writing=True)) as work:
            plan = work.plan()
            assert (plan.layers, plan.bytes_to_read, plan.layers_present) == ((), 0, 4)
            again = work.run()
        assert (again.layers_sent, again.bytes_read, again.bytes_stored) == (0, 0, 0)
        assert first.point is not None
        assert (again.point, again.content_id) == (first.point + 1, first.content_id)
        # Only what lies on top of it goes.
        last = deliver(site, history[4].image)
        assert (last.layers_sent, last.layers_present) == (1, 4)
        assert last.bytes_read < first.bytes_read
        path = out / "a.raw"
        Restoration(site.open(), DISK, path, point=str(again.point)).run()
        assert identical(path, history[3].shown)

    def test_an_output_is_replaced_only_by_force(self, delivered: Delivered, out: Path) -> None:
        path = out / "a.raw"
        path.write_bytes(b"mine")
        place = delivered.site.open()
        with pytest.raises(Conflict):
            Restoration(place, DISK, path).run()
        assert path.read_bytes() == b"mine"
        Restoration(place, DISK, path, force=True).run()
        assert identical(path, delivered.history[-1].shown)

    def test_an_image_that_does_not_lie_on_what_is_there(
        self, site: Site, history: Sequence[Moment], tmp_path: Path, out: Path
    ) -> None:
        deliver(site, history[0].image)
        image = overlay(tmp_path / "other.qcow2", None, Step("other", MiB, ("write -P 9 0 100k",)))
        if site.traits.one_chain:
            with pytest.raises(Diverged):
                deliver(site, image)
        else:
            assert deliver(site, image).point == 2
            Restoration(site.open(), DISK, out / "2.raw").run()
            assert identical(out / "2.raw", flat(image, tmp_path / "flat"))
        Restoration(site.open(), DISK, out / "1.raw", point="1").run()
        assert identical(out / "1.raw", history[0].shown)

    # ---- what cannot be

    def test_an_image_that_somebody_writes_to(self, site: Site, history: Sequence[Moment]) -> None:
        deliver(site, history[0].image)
        for held in (history[0].image, history[1].image):
            with ImageLock(held, LockMode.WRITE), pytest.raises(Busy):
                deliver(site, history[1].image)
        assert len(log(site.open(), DISK).disks[0].points) == 1

    def test_what_is_not_there(self, delivered: Delivered, out: Path) -> None:
        place = delivered.site.open()
        asked: list[Callable[[], object]] = [
            lambda: log(place, "gone"),
            lambda: Restoration(place, "gone", out / "a.raw").run(),
            lambda: inspect_point(place, "gone"),
            lambda: inspect_point(place, DISK, point="99"),
            lambda: place.verify("gone"),
            lambda: Restoration(place, DISK, out / "gone" / "a.raw").run(),
        ]
        for ask in asked:
            with pytest.raises(NotFound):
                ask()
        assert list(out.iterdir()) == []

    def test_names_that_cannot_be(self, site: Site, history: Sequence[Moment], out: Path) -> None:
        for disk in BAD_DISKS:
            with pytest.raises(InvalidInput):
                deliver(site, history[0].image, disk=disk)
            with pytest.raises(InvalidInput):
                Restoration(site.open(), disk, out / "a.raw").run()
        for label in BAD_LABELS:
            with pytest.raises(InvalidInput):
                deliver(site, history[0].image, labels=["good", label])
        deliver(site, history[0].image, disk="good")
        for name in ("a", "a.vmdk"):
            with pytest.raises(InvalidInput):
                Restoration(site.open(), "good", out / name).run()
        assert [(disk.name, len(disk.points)) for disk in log(site.open()).disks] == [("good", 1)]
        assert list(out.iterdir()) == []

    # ---- comparing

    def test_points_are_compared_by_their_leaves(self, site: Site, history: Sequence[Moment]) -> None:
        for moment in history[:2]:
            deliver(site, moment.image)
        place = site.open()
        shown = [moment.shown.read_bytes() for moment in history[:2]]
        wanted = {
            at // LEAF_BYTES
            for at in range(0, max(map(len, shown)), LEAF_BYTES)
            if len({each[at : at + LEAF_BYTES].ljust(LEAF_BYTES, b"\0") for each in shown}) > 1
        }
        with place.leaves(DISK, "1") as old, place.leaves(DISK, "2") as new:
            found = diff(old, new)
        ranges = [(each.offset // LEAF_BYTES, -(-(each.offset + each.length) // LEAF_BYTES)) for each in found.ranges]
        assert wanted <= {leaf for first, stop in ranges for leaf in range(first, stop)}
        assert (found.old_size, found.new_size) == (history[0].size, history[1].size)
        with place.leaves(DISK, "1") as old, image_side(history[0].image) as new:
            assert diff(old, new).identical
        with place.leaves(DISK, "2") as old, image_side(history[0].image) as new:
            assert {each.offset for each in diff(new, old).ranges} == {each.offset for each in found.ranges}

    # ---- at a glance

    def test_disks_at_a_glance(self, site: Site, history: Sequence[Moment]) -> None:
        deliver(site, history[0].image)
        deliver(site, history[1].image)
        deliver(site, history[0].image, disk="web2/vda")
        whole = site.open().disks()
        for found in (site.open().summaries(), site.open().summaries()):  # the second one may know them
            assert [(each.name, each.points, each.layers, each.guest, each.trouble) for each in found] == [
                (each.name, len(each.points), each.layers, None, None) for each in whole
            ]
            for short, disk in zip(found, whole, strict=True):
                newest, future = newest_of(short.newest, datetime.now(UTC))
                last = disk.points[-1]
                assert newest is not None
                assert (newest.point, newest.time, newest.virtual_size) == (last.point, last.time, last.virtual_size)
                assert future == ()
        yesterday = datetime.now(UTC) - timedelta(days=1)
        for short in site.open().summaries(now=yesterday):
            assert newest_of(short.newest, yesterday)[0] is None, "a point of the future is never the newest"
        (one,) = site.open().summaries(DISK)
        assert (one.name, one.points) == (DISK, 2)
        with pytest.raises(NotFound):
            site.open().summaries("gone")

    def test_a_disk_that_cannot_be_read_hides_no_other(self, site: Site, history: Sequence[Moment]) -> None:
        deliver(site, history[0].image)
        deliver(site, history[0].image, disk="web2/vda")
        before = {name: site.read(name) for name in site.stored()}
        site.open(writing=True).hold(DISK, "1", "audit")
        (catalogue,) = (name for name in site.stored() if before.get(name) != site.read(name))
        site.write(catalogue, site.read(catalogue)[:-20])
        broken, sound = site.open().summaries()
        assert (sound.name, sound.points, sound.trouble) == ("web2/vda", 1, None)
        assert (broken.name, broken.points, broken.newest) == (DISK, 0, ())
        assert broken.trouble is not None
        assert broken.trouble.kind == "corrupt"

    def test_what_is_stored(self, site: Site, history: Sequence[Moment]) -> None:
        for moment in history[:3]:
            deliver(site, moment.image)
        deliver(site, history[0].image, disk="web2/vda")
        place = site.open()
        found = place.usage(DISK)
        one, two = found.disks
        assert [(each.disk, each.point_count, each.trouble) for each in (one, two)] == [
            (DISK, 3, None),
            ("web2/vda", 1, None),
        ]
        assert [(each.point, each.time) for each in one.points] == [
            (each.point, each.time) for each in place.disks(DISK)[0].points
        ]
        assert sum(each.added_bytes for each in one.points) + one.other_bytes == one.stored_bytes > 0
        assert one.month_bytes == one.stored_bytes, "all points are of today"
        assert one.added_bytes == one.points[-1].added_bytes
        assert two.points == ()
        assert found.stored_bytes >= (
            one.stored_bytes if place.traits.deduplicates else one.stored_bytes + two.stored_bytes
        )
        shared = min(one.shared_bytes, two.shared_bytes)
        assert shared > 0 if place.traits.deduplicates else shared == 0
        assert found.findings == ()
        with pytest.raises(NotFound):
            place.usage("gone")

    # ---- holding

    def test_a_point_records_its_guest_point(self, site: Site, history: Sequence[Moment]) -> None:
        when, instant = datetime(2026, 11, 30, 1, tzinfo=UTC), "ab" * 16
        wanted = [(None, None), *((instant, each) for each in Consistency), (None, None)]
        for moment, (of, consistency) in zip(history, wanted, strict=False):
            belongs = None if consistency is None or of is None else GuestMoment(of, consistency)
            request = ShipRequest(image=moment.image, disk=DISK, time=when if of else None, moment=belongs)
            with opened(request, site.open(writing=True)) as work:
                work.run()
        shown = [(point.instant, point.consistency) for point in site.open().disks(DISK)[0].points]
        assert shown == wanted
        place = site.open(writing=True)
        place.hold(DISK, "2", "audit")
        with pytest.raises(InvalidInput, match="kept or dropped as a whole"):
            place.merging(DISK, Policy(last=1)).run()
        numbers = [point.point for point in place.disks(DISK)[0].points]
        place.merging(DISK, DropPoints(frozenset(numbers[:-1]) - {2})).run()
        assert [(each.instant, each.time) for each in site.open().disks(DISK)[0].points][:-1] == [(instant, when)]

    def test_a_guest_is_taken_over_by_one_host(self, site: Site, history: Sequence[Moment]) -> None:
        """The state of a guest changes by compare-and-swap, and with it who may write its disks."""
        deliver(site, history[0].image)
        place = site.open(writing=True)
        before = place.guest_state("web1")
        assert (before.state, before.epoch, before.number) == (GuestState.PROTECTED, 1, 0)

        def step(transition: Transition, token: str, host: str, *, seen: int) -> GuestChange:
            promotes = transition is Transition.PROMOTE
            return GuestChange(
                guest="web1",
                transition=transition,
                seen=seen,
                token=token,
                by=host,
                host=host,
                vouched=Vouched(how="person", who=f"root@{host}") if promotes else None,
                disks=(TakenDisk(disk=DISK, point=1),) if promotes else (),
            )

        first = step(Transition.PROMOTE, "1" * 32, "kvm2", seen=0)
        for _ in range(2):  # the answer may be lost, and the step taken again
            promoted, overlays = place.change_guest(first)
            assert (promoted.state, promoted.epoch, promoted.master) == (GuestState.PROMOTING, 2, "kvm2")
            assert set(overlays) == ({DISK} if place.traits.bootable_files else set())
        with pytest.raises(Conflict, match="changed meanwhile"):
            place.change_guest(step(Transition.PROMOTE, "2" * 32, "kvm3", seen=0))
        with pytest.raises(Conflict, match=r"the guest is promoting on kvm2 in epoch 2"):
            place.change_guest(step(Transition.START, "2" * 32, "kvm3", seen=1))
        started, _ = place.change_guest(step(Transition.START, "1" * 32, "kvm2", seen=1))
        assert started == place.guest_state("web1")
        assert (started.state, started.number) == (GuestState.ACTIVE, 2)
        with pytest.raises(Conflict, match=r"kvm2 has taken the guest web1 over by a failover"):
            deliver(site, history[1].image)
        with pytest.raises(NotFound, match="there is no guest"):
            place.guest_state("web2")

    def test_a_lease_is_granted_renewed_and_ended(self, site: Site, history: Sequence[Moment]) -> None:
        """The state stays as it is; a renewal changes no record, and succeeds only while the lease is there."""
        deliver(site, history[0].image)
        place = site.open(writing=True)

        def step(transition: Transition, token: str, *, seen: int, host: str = "kvm1") -> GuestChange:
            lease = Lease(token=token, seconds=30, host=host, epoch=1, witness="s3://bucket")
            return GuestChange(
                guest="web1",
                transition=transition,
                seen=seen,
                token=token,
                by=host,
                host=host,
                lease=lease if transition is Transition.LEASE else None,
            )

        token, other = "1" * 32, "2" * 32
        for _ in range(2):  # the answer may be lost, and the step taken again
            held, _ = place.change_guest(step(Transition.LEASE, token, seen=0))
            assert held.lease is not None
            assert (held.state, held.epoch, held.number) == (GuestState.PROTECTED, 1, 1)
            assert (held.lease.token, held.lease.count, held.lease.witness) == (token, 0, "s3://bucket")
        with pytest.raises(Conflict, match="the host kvm1 holds a lease"):
            place.change_guest(step(Transition.LEASE, other, seen=1, host="kvm3"))
        for count in (1, 2):
            renewed, _ = place.change_guest(step(Transition.RENEW, token, seen=0))
            assert renewed.lease is not None
            assert (renewed.number, renewed.lease.count) == (1, count)
            assert renewed == site.open().guest_state("web1")
        place.change_guest(step(Transition.RENEW, other, seen=0))
        assert site.open().guest_state("web1") == renewed, "another token renews nothing"
        for _ in range(2):
            ended, _ = place.change_guest(step(Transition.UNLEASE, token, seen=1))
            assert (ended.lease, ended.number, ended.state) == (None, 2, GuestState.PROTECTED)
        late, _ = place.change_guest(step(Transition.RENEW, token, seen=0))
        assert late.lease is None
        with pytest.raises(Conflict, match="changed meanwhile"):  # one that was sent long ago
            place.change_guest(step(Transition.LEASE, token, seen=0))

    def test_the_last_checks_of_a_guest_are_recorded(self, site: Site, history: Sequence[Moment]) -> None:
        deliver(site, history[0].image)
        place = site.open(writing=True)
        assert place.guest_checks("web1") == GuestChecks()

        def check(kind: CheckKind, *, ok: bool) -> GuestCheck:
            when = datetime(2026, 11, 30, 4, tzinfo=UTC)
            return GuestCheck(guest="web1", kind=kind, time=when, ok=ok, point=1, share=0.05, by="kvm2", words="why")

        failed, passed = check(CheckKind.VERIFIED, ok=False), check(CheckKind.VERIFIED, ok=True)
        booted = check(CheckKind.BOOTED, ok=False)
        for each in (failed, booted, passed):
            place.note_check(each)
        assert site.open().guest_checks("web1") == GuestChecks(verified=passed, booted=booted)
        assert place.guest_state("web1").number == 0, "it is no step"
        with pytest.raises(NotFound, match="there is no guest"):
            place.note_check(failed.model_copy(update={"guest": "web2"}))

    def test_a_held_point_stays_until_it_is_released(self, site: Site, history: Sequence[Moment]) -> None:
        for moment in history[:3]:
            deliver(site, moment.image, labels=[moment.name])
        place = site.open(writing=True)
        place.hold(DISK, "1", "audit", dry_run=True)
        assert place.disks(DISK)[0].points[0].holds == ()
        number, (hold,) = place.hold(DISK, "1", "audit", reason="case 7")
        assert (number, hold.tag, hold.reason) == (1, "audit", "case 7")
        again, holds = place.hold(DISK, history[0].name, "audit", reason="case 8")
        assert (again, [(each.tag, each.since, each.reason) for each in holds]) == (
            1,
            [("audit", hold.since, "case 8")],
        )
        place.hold(DISK, "1", "lab")
        assert [each.tag for each in site.open().disks(DISK)[0].points[0].holds] == ["audit", "lab"]
        (first, *_) = place.merging(DISK, Policy(last=1)).plan().points
        assert (first.kept, first.reasons[:2]) == (True, ("held: audit (case 8)", "held: lab"))
        assert site.open(writing=True).merging(DISK, Policy(last=1)).run().points_kept == (1, 3)
        place = site.open(writing=True)
        assert [each.tag for each in place.release(DISK, "1", "lab")[1]] == ["audit"]
        for tag in ("lab", "other"):
            with pytest.raises(NotFound, match="is not held under"):
                place.release(DISK, "1", tag)
        assert place.release(DISK, "1", "audit", dry_run=True) == (1, ())
        assert place.release(DISK, "1", "audit") == (1, ())
        assert site.open(writing=True).merging(DISK, Policy(last=1)).run().points_kept == (3,)
        assert site.open().verify(share=1.0).ok
        for tag in BAD_TAGS:
            with pytest.raises(InvalidInput):
                place.hold(DISK, "3", tag)
        for disk, point in (("gone", "1"), (DISK, "9")):
            with pytest.raises(NotFound):
                place.hold(disk, point, "audit")

    # ---- what kinds need

    def test_what_needs_no_collecting_says_so(self, site: Site, history: Sequence[Moment]) -> None:
        deliver(site, history[0].image)
        place = site.open(writing=True)
        if place.traits.needs_collecting:
            assert place.collecting().plan().findings == place.collecting().run().findings == ()
        else:
            with pytest.raises(InvalidInput, match="takes a repository"):
                place.collecting()

    # ---- letting go

    def test_points_are_let_go_by_rules(self, site: Site, history: Sequence[Moment], out: Path) -> None:
        moments = [history[number] for number in (0, 1, 3, 4, 5)]
        for moment in moments:
            deliver(site, moment.image, labels=[moment.name])
        policy = Policy(last=1, labels=frozenset({"hides"}))
        if not site.traits.merges:
            with pytest.raises(Unsupported):
                site.open(writing=True).merging(DISK, policy).run()
            return
        place = site.open(writing=True)
        place.merging(DISK, policy).plan()
        assert len(log(site.open(), DISK).disks[0].points) == 5
        report = place.merging(DISK, policy).run()
        assert (report.points_kept, report.points_dropped) == ((2, 5), (1, 3, 4))
        kept = log(site.open(), DISK).disks[0].points
        assert [(point.point, point.content_id) for point in kept] == [
            (number, moments[number - 1].content_id) for number in (2, 5)
        ]
        for number in (2, 5):
            Restoration(site.open(), DISK, out / f"{number}.raw", point=str(number)).run()
            assert identical(out / f"{number}.raw", moments[number - 1].shown)
        for number in (1, 3, 4)[:: site.traits.every]:
            with pytest.raises(NotFound):
                Restoration(site.open(), DISK, out / "gone.raw", point=str(number)).run()
        assert site.open().verify(share=1.0).ok
        # What was merged is known again: nothing of it is sent, and numbers are not given twice.
        again = deliver(site, moments[-1].image)
        assert (again.point, again.layers_sent, again.content_id) == (6, 0, moments[-1].content_id)
        assert site.open(writing=True).merging(DISK, Policy(last=1)).run().points_kept == (6,)
        with pytest.raises(NotFound):
            site.open(writing=True).merging("gone", policy).run()

    def test_points_are_let_go_by_number(self, site: Site, history: Sequence[Moment], out: Path) -> None:
        moments = [history[number] for number in (0, 1, 3, 4)]
        for moment in moments[:3]:
            deliver(site, moment.image)
        place = site.open(writing=True)
        place.hold(DISK, "2", "audit")
        rules = DropPoints(frozenset({1, 2, 3, 99}))
        assert [each.kept for each in place.merging(DISK, rules).plan().points] == [False, True, True]
        work = place.merging(DISK, DropPoints(frozenset({1, 3})))
        deliver(site, moments[3].image)  # what is published meanwhile stays
        report = work.run()
        kept = [point.point for point in site.open().disks(DISK)[0].points]
        assert kept == list(report.points_kept) in ([2, 4], [2, 3, 4])
        for number in kept:
            Restoration(site.open(), DISK, out / f"{number}.raw", point=str(number)).run()
            assert identical(out / f"{number}.raw", moments[number - 1].shown)
        assert site.open(writing=True).merging(DISK, DropPoints(frozenset())).run().points_dropped == ()
        assert site.open().verify(share=1.0).ok

    def test_the_newest_point_is_let_go_by_its_name(self, site: Site, history: Sequence[Moment], out: Path) -> None:
        moments = [history[number] for number in (0, 1, 3, 4)]
        for moment in moments[:3]:
            deliver(site, moment.image)
        place = site.open(writing=True)
        rules = DropPoints(frozenset({3}), newest=True)
        plan = place.merging(DISK, rules).plan()
        assert [each.kept for each in plan.points] == [True, True, False]
        assert [point.point for point in site.open().disks(DISK)[0].points] == [1, 2, 3], "a plan changes nothing"
        report = place.merging(DISK, rules).run()
        assert (report.points_kept, report.points_dropped) == ((1, 2), (3,))
        assert (report.layers_before, report.layers_after) == (plan.layers_before, plan.layers_after)
        assert site.open().disks(DISK)[0].layers == report.layers_after
        Restoration(site.open(), DISK, out / "2.raw").run()
        assert identical(out / "2.raw", moments[1].shown)
        with pytest.raises(NotFound):
            Restoration(site.open(), DISK, out / "gone.raw", point="3").run()
        assert site.open().verify(share=1.0).ok
        # Its number is not given twice, and its layer is sent again.
        again = deliver(site, moments[2].image)
        assert (again.point, again.content_id) == (4, moments[2].content_id)
        assert again.layers_sent >= 1
        work = site.open(writing=True).merging(DISK, DropPoints(frozenset({4}), newest=True))
        deliver(site, moments[3].image)  # what is published meanwhile stays
        assert work.run().points_kept[-1] == 5
        Restoration(site.open(), DISK, out / "5.raw", point="5").run()
        assert identical(out / "5.raw", moments[3].shown)

    def test_all_points_are_let_go(self, site: Site, history: Sequence[Moment], out: Path) -> None:
        for moment in history[:3]:
            deliver(site, moment.image)
        epoch = site.open().disks(DISK)[0].epoch
        place = site.open(writing=True)
        place.hold(DISK, "2", "audit")
        rules = DropPoints(frozenset({1, 2, 3}), newest=True)
        assert place.merging(DISK, rules).run().points_kept == (2,), "a held point stays"
        Restoration(site.open(), DISK, out / "2.raw").run()
        assert identical(out / "2.raw", history[1].shown)
        place.release(DISK, "2", "audit")
        report = place.merging(DISK, rules).run()
        assert (report.points_kept, report.points_dropped, report.layers_after) == ((), (2,), 0)
        (left,) = site.open().disks()
        assert (left.name, left.epoch, left.points, left.layers) == (DISK, epoch, (), 0)
        assert site.open().verify(share=1.0).ok
        for policy in (Policy(last=1), rules):
            assert site.open(writing=True).merging(DISK, policy).run().points_dropped == ()
        if site.open().traits.needs_collecting:
            site.open(writing=True).collecting().run()
        again = deliver(site, history[0].image)
        assert (again.point, again.content_id) == (4, history[0].content_id)
        Restoration(site.open(), DISK, out / "4.raw").run()
        assert identical(out / "4.raw", history[0].shown)

    # ---- another name

    def test_a_disk_gets_another_name(self, site: Site, history: Sequence[Moment], out: Path) -> None:
        for moment in history[:2]:
            deliver(site, moment.image)
        place = site.open(writing=True)
        place.hold(DISK, "1", "audit")
        if place.traits.bootable_files:
            with pytest.raises(Unsupported, match="cannot be renamed"):
                place.renaming(DISK, "www/vda")
            return
        (before,) = place.disks()
        work = place.renaming(DISK, "www/vda")
        assert (work.plan().points, work.plan().finishes) == (2, False)
        assert site.open().disks() == (before,), "a plan changes nothing"
        assert work.run().points == 2
        assert site.open().disks() == (before.model_copy(update={"name": "www/vda"}),)
        for number in (1, 2):
            Restoration(site.open(), "www/vda", out / f"{number}.raw", point=str(number)).run()
            assert identical(out / f"{number}.raw", history[number - 1].shown)
        with pytest.raises(NotFound, match="was renamed to 'www/vda'"):
            site.open().disks(DISK)
        with pytest.raises(Conflict, match="was renamed to www/vda"):
            deliver(site, history[1].image)
        assert deliver(site, history[1].image, disk="www/vda").point == 3
        assert site.open().verify(share=1.0).ok
        with pytest.raises(NotFound, match="there is no disk"):
            place.renaming("gone", "other").run()


__all__ = ["DISK", "DestinationContract", "Site", "Traits"]
