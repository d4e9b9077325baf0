"""What every destination must do, as a suite to subclass.

    class TestMine(DestinationContract):
        @pytest.fixture(scope="class")
        @classmethod
        def sites(cls) -> Callable[[], Site]:
            return lambda: MySite(...)      # a place of its own, empty, at each call

Where kinds rightly differ, `Site.traits` says so, and the other behaviour is demanded: nothing is skipped.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import pytest

from snapchain.errors import Busy, Conflict, Corrupt, Diverged, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.host.locks import ImageLock, LockMode
from snapchain.model.retention import Policy
from snapchain.ops.destination import Destination
from snapchain.ops.events import Event, Progress
from snapchain.ops.log import PointReport
from snapchain.ops.ship import ShipReport
from snapchain.testing.faults import Crash
from snapchain.testing.history import KiB, MiB, Moment, Step, build_history, flat, guest, identical, overlay

DISK = "web1/vda"
BAD_DISKS = ("", "a:b", "a@b", "/a", "a/", "a//b", "a\n", " a", "x" * 201)
BAD_LABELS = ("", "7", "latest", "a@b", "a::b", "a\n", "x" * 101)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """In what kinds differ.

    one_chain: a disk is one chain of files, so an image that does not lie on it is Diverged
    merges: points can be let go by a policy
    damages: how many of the stored files are tried with a flipped byte; all where that is cheap
    """

    one_chain: bool
    merges: bool
    damages: int = 1000


class Site(Protocol):
    """A place for one destination."""

    @property
    def traits(self) -> Traits: ...

    def open(self, *, writing: bool = False) -> Destination:
        """The destination, as a process that was just started opens it."""
        ...

    def stored(self) -> Sequence[str]:
        """Names of all files or objects there that hold anything."""
        ...

    def read(self, name: str) -> bytes:
        """What one holds."""
        ...

    def write(self, name: str, whole: bytes) -> None:
        """Put other bytes in its place, behind everybody's back."""
        ...

    def vital(self, name: str, whole: bytes) -> Sequence[int]:
        """Places of bytes in it that count: a flip there must be found. Others are padding, or written anew by need."""
        ...


@dataclass(frozen=True, slots=True)
class Delivered:
    """A history at a site. reports, and the moment right after each: one a moment of the history."""

    site: Site
    history: Sequence[Moment]
    reports: Sequence[ShipReport]
    after: Sequence[datetime]
    begun: datetime

    @property
    def points(self) -> Sequence[PointReport]:
        return self.site.open().log(DISK).disks[0].points


class DestinationContract:
    """Subclasses give a fixture `sites`, for the whole class: a function that makes an empty Site."""

    @pytest.fixture(scope="class")
    @classmethod
    def history(cls, tmp_path_factory: pytest.TempPathFactory) -> list[Moment]:
        return build_history(tmp_path_factory.mktemp("history"))

    @pytest.fixture(scope="class")
    @classmethod
    def delivered(cls, sites: Callable[[], Site], history: list[Moment]) -> Delivered:
        """Only looked at by tests: one that changes it has a site of its own."""
        site, begun = sites(), datetime.now(UTC)
        reports, after = [], []
        for number, moment in enumerate(history):
            reports.append(deliver(site, moment.image, labels=[moment.name, "even" if number % 2 == 0 else "odd"]))
            after.append(datetime.now(UTC))
        return Delivered(site, history, reports, after, begun)

    @pytest.fixture
    def site(self, sites: Callable[[], Site]) -> Site:
        return sites()

    @pytest.fixture
    def out(self, tmp_path: Path) -> Path:
        """A directory for outputs and nothing else."""
        (tmp_path / "out").mkdir()
        return tmp_path / "out"

    # ---- what goes in comes out

    @pytest.mark.parametrize("name", ["whole.raw", "whole.qcow2"])
    def test_every_point_comes_back(self, delivered: Delivered, out: Path, name: str) -> None:
        for number, moment in enumerate(delivered.history, 1):
            path = out / f"{number}-{name}"
            report = delivered.site.open().restoration(DISK, path, point=str(number)).run()
            assert identical(path, moment.shown), moment.name
            assert (report.point, report.virtual_size, report.content_id) == (number, moment.size, moment.content_id)
        assert len(list(out.iterdir())) == len(delivered.history)

    @pytest.mark.parametrize("point", [4, 6])
    def test_a_point_comes_back_as_its_layers(self, delivered: Delivered, out: Path, point: int) -> None:
        moment = delivered.history[point - 1]
        path = out / "top.qcow2"
        work = delivered.site.open().restoration(DISK, path, point=str(point), whole_chain=True)
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
        times = [
            delivered.begun,
            *(time for pair in zip(points, delivered.after, strict=True) for time in _times(pair)),
        ]
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
        place = delivered.site.open()
        for name, number in wanted.items():
            plan = place.restoration(DISK, out / "a.raw", point=name).plan()
            assert (plan.point, plan.content_id) == (number, delivered.history[number - 1].content_id), name
        before = delivered.begun.replace(microsecond=0).isoformat()
        for name in ("0", str(count + 1), "9" * 5000, "no such label", before, "x" * 5000):
            with pytest.raises(NotFound):
                place.restoration(DISK, out / "a.raw", point=name).plan()
        assert list(out.iterdir()) == []

    def test_its_layers_can_be_seen(self, delivered: Delivered) -> None:
        found = delivered.site.open().inspect(DISK, "packed")
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
        for number, (disk, step) in enumerate(disks.items()):
            image = overlay(tmp_path / f"{number}.qcow2", None, step)
            shown = flat(image, tmp_path / f"{number}.shown")
            assert deliver(site, image, disk=disk).point == 1
            for name in ("a.raw", "a.qcow2"):
                path = out / f"{number}{name}"
                site.open().restoration(disk, path).run()
                assert identical(path, shown)
        assert [disk.name for disk in site.open().log().disks] == sorted(disks)

    # ---- again, and beside one another

    def test_nothing_new_is_not_sent_again(self, site: Site, history: Sequence[Moment], out: Path) -> None:
        first = deliver(site, history[3].image)
        assert (first.layers_sent > 0, first.bytes_read > 500 * KiB) == (True, True)
        with site.open(writing=True).deliver(history[3].image, DISK) as work:
            plan = work.plan()
            assert (plan.layers, plan.bytes_to_read, plan.layers_present) == ((), 0, 4)
            again = work.run()
        assert (again.layers_sent, again.bytes_read, again.bytes_stored) == (0, 0, 0)
        assert (again.point, again.content_id) == (first.point + 1, first.content_id)
        # Only what lies on top of it goes.
        last = deliver(site, history[4].image)
        assert (last.layers_sent, last.layers_present) == (1, 4)
        assert last.bytes_read < first.bytes_read
        path = out / "a.raw"
        site.open().restoration(DISK, path, point=str(again.point)).run()
        assert identical(path, history[3].shown)

    def test_an_output_is_replaced_only_by_force(self, delivered: Delivered, out: Path) -> None:
        path = out / "a.raw"
        path.write_bytes(b"mine")
        place = delivered.site.open()
        with pytest.raises(Conflict):
            place.restoration(DISK, path).run()
        assert path.read_bytes() == b"mine"
        place.restoration(DISK, path, force=True).run()
        assert identical(path, delivered.history[-1].shown)

    def test_an_interrupted_restore_leaves_nothing(self, delivered: Delivered, out: Path) -> None:
        for name, whole_chain in (("a.raw", False), ("a.qcow2", True)):
            work = delivered.site.open().restoration(DISK, out / name, whole_chain=whole_chain)
            with pytest.raises(Crash):
                work.run(on_event=_crash_at(1))
            assert list(out.iterdir()) == []
        delivered.site.open().restoration(DISK, out / "a.raw").run()
        assert identical(out / "a.raw", delivered.history[-1].shown)

    def test_a_writer_that_dies_loses_nothing(
        self, site: Site, history: Sequence[Moment], tmp_path: Path, out: Path
    ) -> None:
        """In the middle of its data: what was there stays, and the next writer finishes."""
        deliver(site, history[1].image)
        noise = tmp_path / "noise"
        noise.write_bytes(random.Random(1).randbytes(9 * MiB))
        step = Step("noise", 12 * MiB, (f"write -s {noise} 1M 9M",))
        image = overlay(history[1].image.with_name("noise.qcow2"), history[1].image, step)
        for at in (1, 3):
            with pytest.raises(Crash):
                deliver(site, image, on_event=_crash_at(at))
            assert [point.content_id for point in site.open().log(DISK).disks[0].points] == [history[1].content_id]
            path = out / f"{at}.raw"
            site.open().restoration(DISK, path).run()
            assert identical(path, history[1].shown)
        assert deliver(site, image).point == 2
        site.open().restoration(DISK, out / "last.raw").run()
        assert identical(out / "last.raw", flat(image, tmp_path / "flat"))
        assert site.open().verify(share=1.0).ok

    def test_two_writers_at_once(self, site: Site, history: Sequence[Moment], tmp_path: Path, out: Path) -> None:
        """Of one disk: both end, or one is told that the other is faster. Of two disks: both end."""
        deliver(site, history[1].image)
        images = [
            overlay(history[1].image.with_name(f"w{number}.qcow2"), history[1].image, Step("w", 2 * MiB, (write,)))
            for number, write in enumerate(("write -P 201 0 500k", "write -P 202 100k 500k", "write -P 203 1M 300k"))
        ]
        start = threading.Barrier(3)

        def writer(number: int) -> ShipReport | None:
            start.wait()
            try:
                return deliver(site, images[number], disk=DISK if number < 2 else "other")
            except (Busy, Conflict):
                return None

        with ThreadPoolExecutor(3) as pool:
            reports = list(pool.map(writer, range(3)))
        assert reports[2] is not None
        assert any(reports[:2])
        shown = {(DISK, 1): history[1].shown}
        for number, report in enumerate(reports):
            if report is not None:
                place = DISK if number < 2 else "other", report.point
                shown[place] = flat(images[number], tmp_path / f"{number}.shown")
        assert len(shown) == 1 + sum(report is not None for report in reports)
        points = {(disk.name, point.point) for disk in site.open().log().disks for point in disk.points}
        assert points == set(shown)
        for number, ((disk, point), reference) in enumerate(shown.items()):
            site.open().restoration(disk, out / f"{number}.raw", point=str(point)).run()
            assert identical(out / f"{number}.raw", reference)
        assert site.open().verify(share=1.0).ok

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
            site.open().restoration(DISK, out / "2.raw").run()
            assert identical(out / "2.raw", flat(image, tmp_path / "flat"))
        site.open().restoration(DISK, out / "1.raw", point="1").run()
        assert identical(out / "1.raw", history[0].shown)

    # ---- what cannot be

    def test_an_image_that_somebody_writes_to(self, site: Site, history: Sequence[Moment]) -> None:
        deliver(site, history[0].image)
        for held in (history[0].image, history[1].image):
            with ImageLock(held, LockMode.WRITE), pytest.raises(Busy):
                deliver(site, history[1].image)
        assert len(site.open().log(DISK).disks[0].points) == 1

    def test_what_is_not_there(self, delivered: Delivered, out: Path) -> None:
        place = delivered.site.open()
        asked: list[Callable[[], object]] = [
            lambda: place.log("gone"),
            lambda: place.restoration("gone", out / "a.raw").run(),
            lambda: place.inspect("gone"),
            lambda: place.inspect(DISK, "99"),
            lambda: place.verify("gone"),
            lambda: place.restoration(DISK, out / "gone" / "a.raw").run(),
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
                site.open().restoration(disk, out / "a.raw").run()
        for label in BAD_LABELS:
            with pytest.raises(InvalidInput):
                deliver(site, history[0].image, labels=["good", label])
        for name in ("a", "a.vmdk"):
            with pytest.raises(InvalidInput):
                site.open().restoration(DISK, out / name).run()
        deliver(site, history[0].image, disk="good")
        assert [(disk.name, len(disk.points)) for disk in site.open().log().disks] == [("good", 1)]
        assert list(out.iterdir()) == []

    # ---- damage

    def test_what_is_whole_is_found_whole(self, delivered: Delivered) -> None:
        for share in (0.0, 1.0):
            said: list[Event] = []
            found = delivered.site.open().verify(DISK, share=share, on_event=said.append)
            assert (found.ok, found.findings, found.data_read) == (True, (), bool(share))
            assert (found.disks, found.points) == (1, len(delivered.history))
            assert (found.checked_bytes > 500 * KiB) is bool(share)
        assert all(not isinstance(event, Progress) or event.done <= (event.total or 0) for event in said)

    def test_a_flipped_byte_is_found_and_never_restored(
        self, sites: Callable[[], Site], history: Sequence[Moment], out: Path
    ) -> None:
        """In whatever is stored: `verify` tells, and a restore is refused or right."""
        site = sites()
        for moment in history[:4]:
            deliver(site, moment.image)
        draw = random.Random(len(site.stored()))
        names = sorted(site.stored())
        for name in draw.sample(names, min(len(names), site.traits.damages)):
            whole = site.read(name)
            places = site.vital(name, whole)
            if not places:
                continue
            with _flipped(site, name, whole, draw.choice(places)):
                assert not _is_sound(site), name
                _restored_right_or_not(site, history, 4, out)
            with _flipped(site, name, whole, draw.randrange(len(whole))):
                _restored_right_or_not(site, history, draw.randrange(1, 5), out)
        assert _is_sound(site)
        _restored_right_or_not(site, history, 4, out)
        assert [path.name for path in out.iterdir()] == []

    def test_a_file_that_is_gone_is_found(self, site: Site, history: Sequence[Moment], out: Path) -> None:
        for moment in history[:2]:
            deliver(site, moment.image)
        for name in (name for name in site.stored() if site.vital(name, site.read(name))):
            whole = site.read(name)
            site.write(name, b"")
            assert not _is_sound(site), name
            _restored_right_or_not(site, history, 2, out)
            site.write(name, whole)
        assert _is_sound(site)

    # ---- letting go

    def test_points_are_let_go_by_rules(self, site: Site, history: Sequence[Moment], out: Path) -> None:
        for moment in history:
            deliver(site, moment.image, labels=[moment.name])
        policy = Policy(last=2, labels=frozenset({"hides"}))
        if not site.traits.merges:
            with pytest.raises(Unsupported):
                site.open(writing=True).merging(DISK, policy).run()
            return
        place = site.open(writing=True)
        place.merging(DISK, policy).plan()
        assert len(site.open().log(DISK).disks[0].points) == len(history)
        report = place.merging(DISK, policy).run()
        assert (report.points_kept, report.points_dropped) == ((2, 6, 7), (1, 3, 4, 5))
        kept = site.open().log(DISK).disks[0].points
        assert [(point.point, point.content_id) for point in kept] == [
            (number, history[number - 1].content_id) for number in (2, 6, 7)
        ]
        for number in (2, 6, 7):
            site.open().restoration(DISK, out / f"{number}.raw", point=str(number)).run()
            assert identical(out / f"{number}.raw", history[number - 1].shown)
        for number in (1, 3, 4, 5):
            with pytest.raises(NotFound):
                site.open().restoration(DISK, out / "gone.raw", point=str(number)).run()
        assert site.open().verify(share=1.0).ok
        # What was merged is known again: nothing of it is sent, and numbers are not given twice.
        again = deliver(site, history[-1].image)
        assert (again.point, again.layers_sent, again.content_id) == (8, 0, history[-1].content_id)
        again_merged = site.open(writing=True).merging(DISK, Policy(last=1)).run()
        assert again_merged.points_kept == (8,)
        with pytest.raises((InvalidInput, NotFound)):
            site.open(writing=True).merging("gone", policy).run()


def deliver(
    site: Site,
    image: Path,
    *,
    disk: str = DISK,
    labels: Sequence[str] = (),
    on_event: Callable[[Event], None] | None = None,
) -> ShipReport:
    """By a destination opened afresh."""
    with site.open(writing=True).deliver(image, disk, labels=labels) as work:
        return work.run() if on_event is None else work.run(on_event=on_event)


def _times(pair: tuple[PointReport, datetime]) -> tuple[datetime, datetime]:
    return pair[0].time, pair[1]


def _crash_at(count: int) -> Callable[[Event], None]:
    """Dies when data were dealt with so many times."""
    seen = 0

    def listen(event: Event) -> None:
        nonlocal seen
        if isinstance(event, Progress) and event.done:
            seen += 1
            if seen == count:
                raise Crash

    return listen


@contextmanager
def _flipped(site: Site, name: str, whole: bytes, at: int) -> Iterator[None]:
    bent = bytearray(whole)
    bent[at] ^= 0x20
    site.write(name, bytes(bent))
    try:
        yield
    finally:
        site.write(name, whole)


def _is_sound(site: Site) -> bool:
    try:
        return site.open().verify(share=1.0).ok
    except (Corrupt, NotFound, InvalidInput, Unsupported):
        return False


def _restored_right_or_not(site: Site, history: Sequence[Moment], point: int, out: Path) -> None:
    path = out / "tried.raw"
    try:
        site.open().restoration(DISK, path, point=str(point)).run()
    except SnapchainError:
        assert not path.exists()
    else:
        assert identical(path, history[point - 1].shown)
        path.unlink()


__all__ = ["DISK", "DestinationContract", "Site", "Traits", "deliver", "guest"]
