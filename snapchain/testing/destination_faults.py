"""What every destination must bear: damage, writers that die, writers at once. A part of the contract suite."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from snapchain.errors import Busy, Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.model.events import Event, Progress
from snapchain.ops.log import log
from snapchain.ops.restore.run import Restoration
from snapchain.ops.ship.request import ShipReport
from snapchain.testing.destination_site import DISK, Delivered, OnSites, Site, deliver
from snapchain.testing.faults import Crash
from snapchain.testing.history import KiB, MiB, Moment, Step, flat, identical, overlay


class DestinationFaults(OnSites):
    """See destination_contract."""

    def test_an_interrupted_restore_leaves_nothing(self, delivered: Delivered, out: Path) -> None:
        for name, whole_chain in (("a.raw", False), ("a.qcow2", True)):
            work = Restoration(delivered.site.open(), DISK, out / name, whole_chain=whole_chain)
            with pytest.raises(Crash):
                work.run(on_event=_crash_at(1))
            assert list(out.iterdir()) == []
        Restoration(delivered.site.open(), DISK, out / "a.raw").run()
        assert identical(out / "a.raw", delivered.history[-1].shown)

    def test_a_writer_that_dies_loses_nothing(
        self, site: Site, history: Sequence[Moment], tmp_path: Path, out: Path
    ) -> None:
        """In the middle of its data: what was there stays, and the next writer finishes."""
        deliver(site, history[1].image)
        noise = tmp_path / "noise"
        noise.write_bytes(random.Random(1).randbytes(9 * MiB))  # noqa: S311 -- the same each time
        step = Step("noise", 12 * MiB, (f"write -s {noise} 1M 9M",))
        image = overlay(history[1].image.with_name(f"{uuid4()}.qcow2"), history[1].image, step)
        # At least twice: when a pack has arrived, and when the layer is whole.
        for at in (2, 1)[:: site.traits.every]:
            with pytest.raises(Crash):
                deliver(site, image, on_event=_crash_at(at))
            assert [point.content_id for point in log(site.open(), DISK).disks[0].points] == [history[1].content_id]
            path = out / f"{at}.raw"
            Restoration(site.open(), DISK, path).run()
            assert identical(path, history[1].shown)
        assert deliver(site, image).point == 2
        Restoration(site.open(), DISK, out / "last.raw").run()
        assert identical(out / "last.raw", flat(image, tmp_path / "flat"))
        assert site.open().verify(share=1.0).ok

    def test_two_writers_at_once(self, site: Site, history: Sequence[Moment], tmp_path: Path, out: Path) -> None:
        """Of one disk: both end, or one is told that the other is faster. Of two disks: both end."""
        deliver(site, history[1].image)
        images = [
            overlay(history[1].image.with_name(f"{uuid4()}.qcow2"), history[1].image, Step("w", 2 * MiB, (write,)))
            for write in ("write -P 201 0 500k", "write -P 202 100k 500k", "write -P 203 1M 300k")
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
        shown: dict[tuple[str, int | None], Path] = {(DISK, 1): history[1].shown}
        for number, report in enumerate(reports):
            if report is not None:
                place = DISK if number < 2 else "other", report.point
                shown[place] = flat(images[number], tmp_path / f"{number}.shown")
        assert len(shown) == 1 + sum(report is not None for report in reports)
        points = {(disk.name, point.point) for disk in log(site.open()).disks for point in disk.points}
        assert points == set(shown)
        for number, ((disk, point), reference) in enumerate(shown.items()):
            Restoration(site.open(), disk, out / f"{number}.raw", point=str(point)).run()
            assert identical(out / f"{number}.raw", reference)
        assert site.open().verify(share=1.0).ok

    # ---- damage

    def test_what_is_whole_is_found_whole(self, delivered: Delivered) -> None:
        for share in (0.0, 1.0):
            said: list[Event] = []
            found = delivered.site.open().verify(DISK, share=share, on_event=said.append)
            assert (found.ok, found.findings, found.data_read) == (True, (), bool(share))
            assert (found.disks, found.points) == (1, len(delivered.history))
            assert (found.checked_bytes > 500 * KiB) is bool(share)
        part = delivered.site.open().verify(DISK, share=0.5)
        assert (part.ok, part.data_read, part.checked_bytes <= found.checked_bytes) == (True, True, True)
        assert all(not isinstance(event, Progress) or event.done <= (event.total or 0) for event in said)

    def test_a_flipped_byte_is_found_and_never_restored(self, site: Site, history: Sequence[Moment], out: Path) -> None:
        """In whatever is stored: `verify` tells, and a restore is refused or right."""
        moments = history[:4] if site.traits.every == 1 else history[3:4]
        for moment in moments:
            deliver(site, moment.image)
        draw = random.Random(len(site.stored()))  # noqa: S311 -- where to look, no secret
        names = sorted(name for name in site.stored() if site.vital(name, site.read(name)))
        for name in draw.sample(names, min(len(names), site.traits.damages)):
            whole = site.read(name)
            with _flipped(site, name, whole, draw.choice(site.vital(name, whole))):
                assert not _is_sound(site), name
                _restored_right_or_not(site, moments, len(moments), out)
            if site.traits.every == 1:
                with _flipped(site, name, whole, draw.randrange(len(whole))):
                    _restored_right_or_not(site, moments, draw.randrange(1, 5), out)
        assert _is_sound(site)
        _restored_right_or_not(site, moments, len(moments), out)
        assert list(out.iterdir()) == []

    def test_a_file_that_is_gone_is_found(self, site: Site, history: Sequence[Moment], out: Path) -> None:
        deliver(site, history[1].image)
        names = sorted(name for name in site.stored() if site.vital(name, site.read(name)))
        for name in names[-site.traits.damages :]:
            whole = site.read(name)
            site.write(name, b"")
            assert not _is_sound(site), name
            _restored_right_or_not(site, history[1:2], 1, out)
            site.write(name, whole)
        assert _is_sound(site)


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
        Restoration(site.open(), DISK, path, point=str(point)).run()
    except SnapchainError:
        assert not path.exists()
    else:
        assert identical(path, history[point - 1].shown)
        path.unlink()
