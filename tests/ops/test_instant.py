"""restore --instant: usable at once, never zeroes for data, continued after every death, at last plain and proven."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import snapchain
from snapchain.destination.protocol import Destination
from snapchain.errors import Busy, Conflict, Corrupt, InvalidInput, SnapchainError, Unavailable, Unsupported
from snapchain.guest.qmp import Monitor
from snapchain.guest.storage_daemon import StorageDaemon
from snapchain.host.openers import OpenFiles
from snapchain.image.qcow2.bitmap import read_bitmap
from snapchain.image.qcow2.header import read_header
from snapchain.model.events import Event, Notice, Progress
from snapchain.ops.guest_points_merge import guest_at
from snapchain.ops.instant import finish, hydrate, prepare, run as runs, server
from snapchain.ops.instant.guest_images import GuestInstantReport, GuestInstantRequest, GuestInstantRestoration
from snapchain.ops.instant.record import record_file, record_of
from snapchain.ops.instant.run import InstantReport, InstantRequest, InstantRestoration
from snapchain.ops.instant.status import instant_images, instant_status
from snapchain.ops.restore.guest import GuestRestoreRequest
from snapchain.testing.history import identical
from tests.cli.conftest import qemu_img
from tests.ops.guest_points import GUEST, Guest, instant as instant_of
from tests.ops.killing import killed_at_every_step
from tests.waiting import HANG, wait_until

MiB = 1 << 20
SIZE = 8 * MiB
DISK = "web1/vda"


@dataclass
class Site:
    """A repository with a point of a disk, and a place for an image of it. shown: bytes of the point"""

    folder: Path
    dest: str
    shown: bytes

    @property
    def image(self) -> Path:
        return self.folder / "images" / "web1.qcow2"

    def restoration(self, **more: Any) -> InstantRestoration:
        request = InstantRequest(
            located=self.dest,
            disk=DISK,
            point=more.pop("point", None),
            output=self.image,
            passphrase=lambda: None,
            **more,
        )
        return InstantRestoration(self.place(), request)

    def place(self) -> Destination:
        return snapchain.open_destination(self.dest, writing=True)

    def run(self, **more: Any) -> InstantReport:
        events: list[Event] = more.pop("events", [])
        under_guest = more.pop("under_guest", None)
        return self.restoration(**more).run(on_event=events.append, under_guest=under_guest)

    def check_done(self, shown: bytes | None = None) -> None:
        """It is a plain image with these bytes, and nothing else is left."""
        raw = self.folder / "wanted.raw"
        raw.write_bytes(self.shown if shown is None else shown)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", self.image, raw)
        qemu_img("check", "-q", self.image)
        header = self.header()
        assert (header.backing, header.bitmaps) == (None, ())
        assert [each.name for each in self.image.parent.iterdir()] == [self.image.name]
        assert not self.holds()
        assert [each for each in self.run_directory.iterdir() if each.name.startswith("instant-")] == []

    def header(self) -> Any:
        with self.image.open("rb") as file:
            return read_header(file.fileno(), subject=self.image)

    def holds(self) -> list[str]:
        (disk,) = self.place().disks(DISK)
        return [hold.tag for point in disk.points for hold in point.holds]

    @property
    def run_directory(self) -> Path:
        return Path(os.environ["XDG_RUNTIME_DIR"]) / "snapchain"

    def kill_server(self) -> None:
        record = record_of(self.image)
        pid = None if record is None else server.process_of(record)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            assert record is not None
            assert wait_until(lambda: not server.serves(record))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A repository with one point, and what it shows: data, and holes, each not aligned to clusters."""
    folder = tmp_path_factory.mktemp("instant")
    shown = bytearray(SIZE)
    source = random.Random(15)
    for start, length in ((0, MiB), (2 * MiB + 512, 3 * MiB), (7 * MiB + 4096, MiB - 4096)):
        shown[start : start + length] = source.randbytes(length)
    (folder / "raw").write_bytes(shown)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", folder / "raw", folder / "web1.qcow2")
    snapchain.create_repository(folder / "repo", encryption="none")
    snapchain.ship(folder / "web1.qcow2", snapchain.open_destination(folder / "repo", writing=True), DISK)
    return folder / "repo", bytes(shown)


@pytest.fixture(autouse=True)
def run_directory(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A short one, for sockets; no server is left when a test has failed."""
    folder = tmp_path_factory.mktemp("r")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setattr(hydrate, "_PAUSE", 0.05)
    monkeypatch.setattr(hydrate, "_STALLED_LOOKS", 1)
    yield
    for path in folder.glob("snapchain/instant-*.sock"):
        with socket.socket(socket.AF_UNIX) as visitor:
            try:
                visitor.connect(str(path))
            except OSError:
                continue
            pid, _, _ = server._UCRED.unpack(
                visitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, server._UCRED.size)
            )
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def site(repository: tuple[Path, bytes], tmp_path: Path) -> Site:
    (tmp_path / "images").mkdir()
    subprocess.run(["cp", "-r", repository[0], tmp_path / "repo"], check=True)
    return Site(tmp_path, str(tmp_path / "repo"), repository[1])


def as_a_guest(image: Path, *commands: str) -> None:
    """What a guest does, with the result that its reads are right, or the error of QEMU."""
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-d", "unmap", "-f", "qcow2", *words, image], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "verification failed" not in done.stdout, done.stdout


def test_usable_at_once_then_copied_with_what_a_guest_wrote(site: Site) -> None:
    report = site.run(later=True)
    assert (report.state, report.point, report.backing) == ("served", 1, record_of(site.image).backing_name)  # type: ignore[union-attr]
    assert site.holds() == [record_of(site.image).hold]  # type: ignore[union-attr]
    (status,) = instant_status(instant_images(site.image)).instant
    assert (status.state, status.percent, status.depends_on) == ("served", 0.0, f"{site.dest}::{DISK}@1")
    as_a_guest(site.image, "write -P 7 2M 128k", "write -P 8 6M 64k", "discard 3M 64k", "write -z 0 64k")
    written = bytearray(site.shown)
    for start, length, value in (
        (2 * MiB, 128 << 10, 7),
        (6 * MiB, 64 << 10, 8),
        (3 * MiB, 64 << 10, 0),
        (0, 65536, 0),
    ):
        written[start : start + length] = bytes([value]) * length
    report = site.run()
    assert (report.state, report.guest_bytes, report.unproven_bytes) == ("done", (128 + 64 + 64 + 64) << 10, 0)
    site.check_done(bytes(written))


def test_without_its_server_it_does_not_open(site: Site) -> None:
    """Nobody reads zeroes; the next run serves it again, at the same place, and by the same point."""
    site.run(later=True)
    before = record_of(site.image)
    assert before is not None
    site.kill_server()
    done = subprocess.run(
        ["qemu-io", "-r", "-c", "read 0 64k", site.image], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "backing file" in done.stderr) == (1, True)
    (status,) = instant_status((site.image,)).instant
    assert status.state == "not served"
    qemu_img("create", "-q", "-f", "qcow2", site.folder / "other.qcow2", str(SIZE))
    snapchain.ship(site.folder / "other.qcow2", site.place(), DISK)
    site.run(later=True)
    assert record_of(site.image) == before
    as_a_guest(site.image, "read 0 64k")
    assert site.run().content_id == before.content_id
    site.check_done()


@pytest.mark.sampled
def test_killed_at_every_step(site: Site) -> None:
    """With or without its server too. The image that is there never reads as zeroes."""
    for number, _ in enumerate(killed_at_every_step(site.run, each=19)):
        if number % 2:
            site.kill_server()
        if site.image.exists():
            raw = site.folder / "read.raw"
            done = subprocess.run(
                ["qemu-img", "convert", "-O", "raw", site.image, raw], capture_output=True, text=True, check=False
            )
            assert done.returncode or raw.read_bytes() == site.shown
        if not (site.image.exists() and record_of(site.image) is None):
            site.run()
        site.check_done()
        site.image.unlink()
    site.check_done()


def test_the_server_is_killed_while_it_copies(site: Site) -> None:
    """It is started again, and the job is resumed until it ends."""
    killed = threading.Event()

    def kill() -> None:
        assert wait_until(lambda: site.image.exists() and _copies(site.image))
        site.kill_server()
        killed.set()

    thread = threading.Thread(target=kill)
    thread.start()
    site.run(speed=4 * MiB)
    thread.join(HANG)
    assert killed.is_set()
    site.check_done()


def _copies(image: Path) -> bool:
    return any(each.command.startswith("qemu-storage-d") for each in OpenFiles().openers(image.stat()))


def test_a_second_run_beside_it_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    real, said = hydrate.hydrate, list[str]()

    def twice(*args: Any, **more: Any) -> None:
        monkeypatch.setattr(runs, "hydrate", real)
        with StorageDaemon("x", "0123", [{"driver": "qcow2", "node-name": "x", "backing": None, "file": {
            "driver": "file", "filename": str(site.image)}}]):  # fmt: skip
            with pytest.raises(Busy) as caught:
                site.run()
            said.append(str(caught.value))
        real(*args, **more)

    monkeypatch.setattr(runs, "hydrate", twice)
    site.run()
    assert "qemu-storage-d" in said[0]
    site.check_done()


def test_lost_data_end_the_copying_and_are_no_zeroes(site: Site) -> None:
    packs = sorted(
        (Path(site.dest) / "packs").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    pack = packs[-1]
    whole = pack.read_bytes()
    pack.chmod(0o600)
    pack.write_bytes(whole[: len(whole) // 2] + bytes(MiB) + whole[len(whole) // 2 + MiB :])
    with pytest.raises(Corrupt, match="a part of the point cannot be read: web1/vda@1: bytes") as caught:
        site.run()
    assert "run the command again" in (caught.value.hint or "")
    assert site.header().backing is not None
    done = subprocess.run(["qemu-io", "-r", "-c", "read 0 8M", site.image], capture_output=True, text=True, check=False)
    assert "Input/output error" in done.stdout + done.stderr
    site.kill_server()  # which knows that it is lost
    pack.write_bytes(whole)
    site.run()
    site.check_done()


def test_what_a_killed_guest_wrote_is_kept_and_not_called_proven(site: Site) -> None:
    """QEMU saves its bitmap when it closes the image. What is known from before stays known."""
    site.run(later=True)
    as_a_guest(site.image, "write -P 9 0 64k")
    record_file(site.image).write(finish.note_begin(site.image, record_of(site.image)))  # type: ignore[arg-type]
    with subprocess.Popen(["qemu-io", "-f", "qcow2", site.image], stdin=-1, stdout=-1, text=True) as guest:
        assert guest.stdin is not None
        assert guest.stdout is not None
        guest.stdin.write("write -P 5 1M 64k\nflush\n")
        guest.stdin.flush()
        while "wrote" not in guest.stdout.readline():
            pass
        assert wait_until(lambda: b"\5" * 4096 in site.image.read_bytes())
        guest.kill()
    report = site.run()
    written = bytearray(site.shown)
    written[:65536], written[MiB : MiB + 65536] = b"\x09" * 65536, b"\x05" * 65536
    assert (report.guest_bytes, report.unproven_bytes) == (65536, 65536)
    site.check_done(bytes(written))


def test_bytes_that_nobody_wrote_are_found_before_it_is_plain(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    real = hydrate.hydrate

    def then_rots(image: Path, *args: Any, **more: Any) -> None:
        real(image, *args, **more)
        data = bytearray(image.read_bytes())
        at = data.index(site.shown[3 * MiB : 3 * MiB + 512])
        data[at : at + 8] = b"damaged!"
        image.write_bytes(data)

    monkeypatch.setattr(runs, "hydrate", then_rots)
    with pytest.raises(Corrupt, match=f"in 65536 bytes that no guest wrote, the first at {3 * MiB}"):
        site.run()
    assert site.header().backing is not None
    assert record_of(site.image) is not None


def test_an_image_that_lacks_something_stays_as_it_is(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where zeroes are missing alone, which read the same."""
    monkeypatch.setattr(runs, "hydrate", lambda *_args, **_more: as_a_guest(site.image, f"write -z 64k {SIZE - 65536}"))
    with pytest.raises(Unavailable, match="65536 bytes of its point were not copied yet"):
        site.run()
    assert site.header().backing is not None


def test_internal_snapshots_keep_what_they_show_of_the_point(site: Site) -> None:
    """Without the backing file they would read zeroes."""
    site.run(later=True)
    qemu_img("snapshot", "-c", "before", site.image)
    as_a_guest(site.image, "write -P 7 0 64k")
    with pytest.raises(Unsupported, match="1 internal snapshots"):
        site.run()
    with pytest.raises(Unsupported, match="1 internal snapshots"):
        finish.finish(site.place(), site.image, record_of(site.image), on_event=lambda _event: None)  # type: ignore[arg-type]
    assert site.header().backing is not None
    raw = site.folder / "before.raw"
    qemu_img("convert", "-l", "before", "-O", "raw", site.image, raw)
    assert raw.read_bytes() == site.shown
    qemu_img("snapshot", "-d", "before", site.image)
    site.run()
    site.check_done(b"\7" * 65536 + site.shown[65536:])


def test_an_image_of_another_record_is_not_done_while_a_guest_has_it_open(site: Site) -> None:
    """Its point would be let go, and its server ended."""
    site.run(later=True)
    record = record_of(site.image)
    assert record is not None
    record_file(site.image).write(record.model_copy(update={"socket": f"{record.socket}.2"}))
    with subprocess.Popen(["qemu-io", "-f", "qcow2", site.image], stdin=-1, stdout=-1, text=True) as guest:
        assert wait_until(lambda: any(each.writing for each in OpenFiles().openers(site.image.stat())))
        with pytest.raises(Conflict, match="depends on something else than its record says"):
            site.run(under_guest=lambda *_: True)
        guest.communicate("q\n")
    assert site.holds() == [record.hold]


def test_two_runs_begin_one_image_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails would undo what the other has made."""
    real, both = server.ensure, list[InstantReport]()
    second = threading.Thread(target=lambda: both.append(site.run(later=True)))

    def meanwhile(image: Path, passphrase: Any) -> bool:
        if not second.ident:
            second.start()
            second.join(0.2)  # it waits, or begins
        return real(image, passphrase)

    monkeypatch.setattr(server, "ensure", meanwhile)
    both.append(site.run(later=True))
    second.join(HANG)
    assert len({each.backing for each in both}) == 1
    assert len(both) == 2
    assert site.holds() == [record_of(site.image).hold]  # type: ignore[union-attr]
    site.run()
    site.check_done()


@pytest.mark.root
def test_a_full_file_system_is_no_lost_point(site: Site) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "none", site.image.parent], check=True)
    try:
        site.run(later=True)
        with pytest.raises(Unavailable, match="the image cannot be written"):
            site.run()
        subprocess.run(["mount", "-o", "remount,size=20m", site.image.parent], check=True)
        site.run()
        site.check_done()
    finally:
        subprocess.run(["umount", site.image.parent], check=True)


def test_a_run_directory_with_a_comma(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path(os.environ["XDG_RUNTIME_DIR"]) / ","
    place.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    site.run()
    site.check_done()


def test_another_content_under_the_same_number_is_not_served(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the image would be of the one, half of the other."""
    monkeypatch.setattr(site, "dest", f"dir:{site.folder}/replica")
    for name, fill in (("a", "1"), ("b", "2")):
        qemu_img("create", "-q", "-f", "qcow2", site.folder / f"{name}.qcow2", str(SIZE))
        as_a_guest(site.folder / f"{name}.qcow2", f"write -P {fill} 0 4M")
    snapchain.ship(site.folder / "a.qcow2", site.place(), DISK)
    site.run(later=True)
    as_a_guest(site.image, "write -P 3 0 64k")
    site.kill_server()
    subprocess.run(["mv", site.folder / "replica", site.folder / "former"], check=True)
    snapchain.ship(site.folder / "b.qcow2", site.place(), DISK)
    with pytest.raises(Conflict, match="is not the point that it was begun with"):
        site.run()
    subprocess.run(["rm", "-r", site.folder / "replica"], check=True)
    subprocess.run(["mv", site.folder / "former", site.folder / "replica"], check=True)
    assert site.run().guest_bytes == 65536
    site.check_done(b"\3" * 65536 + b"\1" * (4 * MiB - 65536) + bytes(SIZE - 4 * MiB))


def test_a_guest_has_it_open(site: Site) -> None:
    """The one that is given copies under it, else it is waited for."""
    site.run(later=True)
    asked = list[Path]()
    events = list[Event]()
    with subprocess.Popen(["qemu-io", "-f", "qcow2", site.image], stdin=-1, stdout=-1, text=True) as guest:
        assert wait_until(lambda: any(each.writing for each in OpenFiles().openers(site.image.stat())))

        def under_guest(image: Path, _record: object) -> bool:
            asked.append(image)
            guest.communicate("q\n")
            return False

        site.run(under_guest=under_guest, events=events)
    assert asked == [site.image]
    assert any("is open in qemu-io" in each.message for each in events if isinstance(each, Notice))
    site.check_done()


def test_what_is_in_the_way(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu_img("create", "-q", "-f", "qcow2", site.image, "1M")
    with pytest.raises(Conflict, match="it exists already"):
        site.restoration()
    site.image.unlink()
    monkeypatch.setattr(server, "start_module", lambda *_args, **_more: os.getpid())
    with pytest.raises(Unavailable, match="the point cannot be served"):
        site.run()
    assert list(site.image.parent.iterdir()) == []
    assert not site.holds()
    monkeypatch.undo()


def test_another_point_or_format_is_refused(site: Site) -> None:
    site.run(later=True)
    with pytest.raises(Conflict, match="@1, which is not finished"):
        site.restoration(point="2")
    record_file(site.image).remove()
    with pytest.raises(Conflict, match="an instant restore whose record is gone"):
        site.restoration()
    request = InstantRequest(
        located=site.dest, disk=DISK, point=None, output=site.folder / "x.raw", passphrase=lambda: None
    )
    with pytest.raises(InvalidInput, match="an instant restore makes a qcow2 file"):
        InstantRestoration(site.place(), request)


def test_a_destination_that_takes_no_hold(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_args: object, **_more: object) -> None:
        raise Unsupported("it is read-only")

    place, events = site.place(), list[Event]()
    monkeypatch.setattr(place, "hold", refused)
    monkeypatch.setattr(Site, "place", lambda _self: place)
    site.run(events=events, later=True)
    assert any("the point could not be held" in each.message for each in events if isinstance(each, Notice))
    assert record_of(site.image).hold is None  # type: ignore[union-attr]
    monkeypatch.undo()


def test_the_server_ends_when_its_image_is_removed(site: Site) -> None:
    site.run(later=True)
    record = record_of(site.image)
    assert record is not None
    site.image.unlink()
    assert wait_until(lambda: not server.serves(record))
    assert [each.state for each in instant_status(instant_images(site.image.parent)).instant] == ["missing"]
    site.run()
    site.check_done()


def test_a_guest_with_its_definition(tmp_path: Path) -> None:
    """All images by one server; run again it continues, also with the first disk done; then it is in the way."""
    dest = f"dir:{tmp_path}/replica"
    place = snapchain.open_destination(dest, writing=True)
    guest, out = Guest(tmp_path / "g"), tmp_path / "out"
    guest.point(place, 1)

    def run(*, later: bool = False) -> GuestInstantReport:
        request = GuestInstantRequest(
            restore=GuestRestoreRequest(directory=out), located=dest, passphrase=lambda: None, later=later
        )
        return GuestInstantRestoration(place, guest_at(place, GUEST), request).run()

    report = run(later=True)
    guest.point(place, 2)
    assert [each.state for each in report.disks] == ["served", "served"]
    assert (report.definition, "/vda.qcow2" in (out / "web1.xml").read_text()) == (str(out / "web1.xml"), True)
    records = [record_of(out / f"{name}.qcow2") for name in guest.names]
    assert len({each.socket for each in records if each is not None}) == 1
    as_a_guest(out / "vda.qcow2", "read 0 1M")
    report = run()
    assert (report.guest_point, [each.state for each in report.disks]) == (1, ["done", "done"])
    for name in guest.names:
        assert identical(out / f"{name}.qcow2", guest.shown[instant_of(1), name])
    assert sorted(each.name for each in out.iterdir()) == [
        "vda.qcow2", "vdb.qcow2", "web1.live.xml", "web1.recorded.xml", "web1.xml",
    ]  # fmt: skip
    with pytest.raises(Conflict, match="a restore of a guest replaces no file"):
        run()


def test_the_bitmap_is_read_as_qemu_writes_it(tmp_path: Path) -> None:
    image = tmp_path / "b.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "70000M")  # two clusters of the bitmap
    qemu_img("bitmap", "--add", image, "b")
    source = random.Random(1)
    pieces = {0, 524287, 524288, 70000 * 16 - 1, *(source.randrange(70000 * 16) for _ in range(40))}
    as_a_guest(image, *(f"write -z {number << 16} 64k" for number in pieces))
    with image.open("rb") as file:
        found = read_bitmap(file.fileno(), read_header(file.fileno(), subject=image), "b", subject=image)
        assert read_bitmap(file.fileno(), read_header(file.fileno(), subject=image), "c", subject=image) is None
    assert found is not None
    assert (found[0], set(found[1].nonzero()[0].tolist())) == (65536, pieces)


class _Looks:
    """A monitor that shows so many bytes of a job, look by look. flushes: how many it showed at each flush"""

    def __init__(self, *done: int) -> None:
        self.left = list(done)
        self.flushes: list[int] = []
        self._done = 0

    def rows(self, command: str) -> list[dict[str, object]]:
        assert command == "query-jobs"
        self._done = self.left.pop(0)
        status = "running" if self.left else "pending"
        return [{"id": "hydrate", "status": status, "current-progress": self._done, "total-progress": 9}]

    def execute(self, command: str, _arguments: object = None, **_more: object) -> None:
        if command == "blockdev-reopen":
            self.flushes.append(self._done)

    def mark(self) -> int:
        return 0

    def wait(self, *_: object, **_more: object) -> None:
        pass


def test_nothing_is_flushed_while_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for a read that may take minutes, and so would every other command."""
    monkeypatch.setattr(hydrate, "_FLUSH_SECONDS", -1.0)
    monkeypatch.setattr(hydrate, "_STALLED_LOOKS", 20)
    looks = _Looks(1, 1, 1, 5, 9)
    hydrate._Copying(looks, Path("x"), None, lambda: None, lambda _event: None).run(0)  # type: ignore[arg-type]
    assert looks.flushes == [1, 5]


def test_a_point_with_other_bytes_is_not_the_point(site: Site) -> None:
    """A repository that was made anew has the same number for it: the image would show parts of both."""
    site.run(later=True)
    record = record_of(site.image)
    assert record is not None
    site.kill_server()
    record_file(site.image).write(record.model_copy(update={"content_id": "00" * 32}))
    with pytest.raises(Conflict, match="is not the point that it was begun with"):
        site.run()
    with pytest.raises(Unavailable, match="is not the point that it was begun with"):  # started again for a guest
        server.ensure(site.image, lambda: None)
    record_file(site.image).write(record)
    site.run()
    site.check_done()


def test_a_flush_waits_as_long_as_a_read_may(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU drains its reads first, and those wait for a store that is away: 60 s would end the copying."""
    waits, real = list[float | None](), Monitor.execute

    def execute(self: Monitor, command: str, *args: Any, **more: Any) -> Any:
        if command == "blockdev-reopen":
            waits.append(more.get("seconds"))
        return real(self, command, *args, **more)

    monkeypatch.setattr(Monitor, "execute", execute)
    monkeypatch.setattr(hydrate, "_FLUSH_SECONDS", 0.0)
    site.run(speed=4 * MiB)
    assert waits
    assert all(each is not None and each > server.PATIENCE for each in waits)
    site.check_done()


def test_two_runs_that_begin_at_once_have_one_record(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the image may name the socket of the one, and the record that of the other."""
    real, second, seen = prepare.check_new, threading.Event(), list[Path]()

    def slow(image: Path) -> None:
        seen.append(image)
        if len(seen) == 1:
            second.wait(0.5)  # the other run comes here too, unless it is kept out
        else:
            second.set()
        real(image)

    runs_of_both = [site.restoration(later=True) for _ in range(2)]
    monkeypatch.setattr(prepare, "check_new", slow)
    destination = site.place()

    def begin(each: InstantRestoration) -> None:
        with suppress(SnapchainError):  # the slower one may find the image made meanwhile
            prepare.prepare(destination, site.dest, [each._wanted], passphrase=lambda: None)

    threads = [threading.Thread(target=begin, args=(each,)) for each in runs_of_both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert len(seen) == 1
    site.run()
    site.check_done()


def test_a_lost_record_does_not_end_the_server_under_an_image(site: Site) -> None:
    """A guest may run on it; the server ends when the image is gone, or depends on nothing."""
    site.run(later=True)
    record = record_of(site.image)
    assert record is not None
    record_file(site.image).remove()
    assert server._depends(site.image, record, is_early=False)
    record_file(site.image).write(record)
    site.run()
    assert not server._depends(site.image, record, is_early=False)
    site.check_done()


def test_an_image_that_was_removed_is_made_anew_and_knows_nothing_of_the_former_one(site: Site) -> None:
    """What a guest wrote there would excuse damage here."""
    site.run(later=True)
    record = record_of(site.image)
    assert record is not None
    as_a_guest(site.image, "write -P 9 0 64k")
    record_file(site.image).write(finish.note_begin(site.image, record))
    site.image.unlink()
    site.run(later=True)
    made = record_of(site.image)
    assert made is not None
    assert (made.made, made.written) == (True, None)
    assert site.run().guest_bytes == 0
    site.check_done()


def test_an_image_is_removed_while_it_is_copied(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydrate, "_LOOK_SECONDS", 0.0)

    def heard(event: Event) -> None:
        if isinstance(event, Progress) and event.phase == hydrate.PHASE:
            site.image.unlink(missing_ok=True)
            site.kill_server()

    with pytest.raises(Conflict, match="was removed while it was copied"):
        site.restoration(speed=MiB).run(on_event=heard)
    site.run()
    site.check_done()
