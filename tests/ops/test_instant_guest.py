"""restore --instant --start: a guest runs on served points, and reads what was shipped, whatever is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import snapchain
from snapchain.cli import main
from snapchain.errors import InvalidInput, Unavailable, Unsupported
from snapchain.guest.protocol import JobStatus
from snapchain.guest.qmp_hydration import Act, may_continue, next_act
from snapchain.host.qemu_processes import qemu_processes
from snapchain.model.events import Event, Notice
from snapchain.ops.guest_points_merge import guest_at
from snapchain.ops.instant import record as records, server
from snapchain.ops.instant.guest_images import GuestInstantReport, GuestInstantRequest, GuestInstantRestoration
from snapchain.ops.instant.overlay import backing_of
from snapchain.ops.instant.record import InstantRecord, record_of
from snapchain.ops.instant.under_guest import UnderQemu
from snapchain.ops.restore.guest import GuestRestoreRequest
from tests.guest.machine import Monitor
from tests.ops.guest_points import GUEST, Guest, instant
from tests.ops.stacks import qemu_img
from tests.ops.test_failover import argv
from tests.waiting import wait_until

SLOW = 1
"""Bytes a second: QEMU copies one piece of 512 KiB, and then nothing until a test changes the speed."""


@dataclass
class Site:
    """A repository with a point of a guest, and a directory for it."""

    folder: Path
    guest: Guest | None = None
    events: list[Event] = field(default_factory=list)
    monitors: list[Monitor] = field(default_factory=list)

    @property
    def dest(self) -> str:
        return str(self.folder / "repository")

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def image(self) -> Path:
        return self.out / "vda.qcow2"

    @property
    def record(self) -> InstantRecord:
        found = record_of(self.image)
        assert found is not None
        return found

    def run(self, **more: Any) -> GuestInstantReport:
        place = snapchain.open_destination(self.dest, writing=True)
        speed = more.pop("speed", 0)
        asked = GuestInstantRequest(
            restore=GuestRestoreRequest(directory=self.out),
            located=self.dest,
            passphrase=lambda: None,
            starts=True,
            **more,
        )
        work = GuestInstantRestoration(place, guest_at(place, GUEST), asked, on_event=self.events.append)
        return work.run(under_guest=UnderQemu(lambda: None, speed, self.events.append))

    def begun(self, speed: int = SLOW) -> Running:
        """In a thread, until a copying is under way."""
        running = Running(lambda: self.run(speed=speed))
        running.start()
        wait_until((self.out / "test.qmp").exists, alive=running.lives)
        self.monitors.append(Monitor(self.out / "test.qmp"))
        wait_until(lambda: self.job() == "running", alive=running.lives)
        return running

    def ask(self, command: str, **arguments: object) -> Any:
        return self.monitors[-1].ask(command, **arguments)

    def job(self) -> str | None:
        """State of the job on vda, or on vdb after that."""
        return next((each["status"] for each in self.ask("query-jobs")), None)

    def hurry(self) -> None:
        """Let a job go on."""
        for each in self.ask("query-block-jobs"):
            if each["speed"]:
                self.ask("block-job-set-speed", device=each["device"], speed=0)

    def io(self, command: str) -> str:
        """What the guest's device does; what `qemu-io` says of it."""
        log = self.out / "web1.log"
        before = log.stat().st_size
        device = "/machine/peripheral/vda/virtio-backend"
        self.ask("human-monitor-command", **{"command-line": f'qemu-io -d {device} "{command}"'})
        return log.read_text()[before:]

    def says(self, words: str) -> bool:
        return any(isinstance(each, Notice) and words in each.message for each in self.events)

    def check_done(self, *writes: str) -> None:
        """Plain images with the point, and on vda what the guest wrote; nothing else is left."""
        guest = self.guest
        assert guest is not None
        for name in guest.names:
            image, raw = self.out / f"{name}.qcow2", self.folder / f"{name}.wanted"
            shutil.copyfile(guest.shown[instant(1), name], raw)
            for each in writes if name == "vda" else ():
                subprocess.run(["qemu-io", "-f", "raw", "-c", each, raw], check=True, stdout=subprocess.DEVNULL)
            assert (record_of(image), backing_of(image)) == (None, None)
            qemu_img("compare", "-U", "-f", "qcow2", "-F", "raw", image, raw)
        place = snapchain.open_destination(self.dest)
        assert not [point.holds for disk in place.disks() for point in disk.points if point.holds]

    def end_guest(self) -> None:
        """As an operator: the images are closed."""
        self.monitors.pop().quit()
        for image in self.out.glob("*.qcow2"):
            qemu_img("check", "-q", image)


class Running(threading.Thread):
    """A restore in a thread."""

    def __init__(self, work: Callable[[], GuestInstantReport]) -> None:
        super().__init__(daemon=True)
        self._work, self._error = work, None
        self.report: GuestInstantReport | None = None

    _error: BaseException | None

    def run(self) -> None:
        try:
            self.report = self._work()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._error = error

    def lives(self) -> bool:
        """Raises what ended it."""
        if self._error is not None:
            raise self._error
        return self.is_alive()

    def ended(self, meanwhile: Callable[[], object]) -> GuestInstantReport:
        """What it reports. meanwhile: is done again and again until then"""
        while self.is_alive():
            meanwhile()
            self.join(0.05)
        if self._error is not None:
            raise self._error
        assert self.report is not None
        return self.report


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    guest = Guest(tmp_path / "kvm1")
    found = Site(tmp_path, guest)
    assert main(["init", found.dest, "--no-encryption"]) == 0
    words = (*argv(tmp_path), "-qmp", f"unix:{tmp_path}/test.qmp,server=on,wait=off")
    guest.point(
        snapchain.open_destination(found.dest, writing=True), 1, kind="qmp", inactive=None, live=None, argv=words
    )
    yield found
    for each in found.monitors:
        each.close()
    for process in qemu_processes():
        if any(f"{tmp_path}/" in word for word in process.argv):
            os.kill(process.pid, signal.SIGKILL)
    for image in found.out.glob("*.qcow2"):
        if (left := record_of(image)) is not None:
            server.end(left)


def test_the_guest_writes_while_its_server_is_killed(site: Site) -> None:
    running = site.begun()
    record = site.record
    site.io("write -P 200 1M 4k")
    pid = server.process_of(record)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: site.says("was started again"), alive=running.lives)
    assert "Pattern verification failed" not in site.io("read -P 3 1028k 60k"), "the guest waits for the new server"
    report = running.ended(site.hurry)
    assert (report.started, [each.state for each in report.disks]) == (True, ["done", "done"])
    assert all(not node.get("dirty-bitmaps") for node in site.ask("query-named-block-nodes"))
    site.check_done("write -P 200 1M 4k")
    wait_until(lambda: server.process_of(record) is None)
    site.end_guest()


def test_a_guest_with_an_internal_snapshot_keeps_the_backing_file(site: Site) -> None:
    """QEMU would remove its name, and the snapshot would read zeroes."""
    site.run(later=True)
    site.monitors.append(Monitor(site.out / "test.qmp"))
    site.ask("blockdev-snapshot-internal-sync", device="vda-top", name="before")
    with pytest.raises(Unsupported, match="internal snapshots"):
        site.run()
    assert backing_of(site.image) is not None
    site.ask("blockdev-snapshot-delete-internal-sync", device="vda-top", name="before")
    site.run()
    site.check_done()
    site.end_guest()


def test_without_its_server_the_guest_reads_nothing_at_all(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU's stream reads zeroes then, if the server has told it block states."""
    monkeypatch.setattr(records, "RECONNECT_SECONDS", 1)
    running = site.begun()
    ensure, is_away = server.ensure, threading.Event()

    def ensured(image: Path, passphrase: Any) -> bool:
        if is_away.is_set():
            raise Unavailable("the store is away", subject=image)
        return ensure(image, passphrase)

    monkeypatch.setattr(server, "ensure", ensured)
    is_away.set()
    pid = server.process_of(site.record)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)

    def is_refused() -> bool:
        said = site.io("read -P 3 1M 64k")
        assert "Pattern verification failed" not in said, "the guest reads zeroes"
        return "Input/output error" in said

    wait_until(is_refused, alive=running.lives)
    site.hurry()
    wait_until(lambda: site.job() == "paused", alive=running.lives)
    wait_until(lambda: site.says("could not be started again"), alive=running.lives)
    is_away.clear()
    running.ended(site.hurry)
    site.check_done()
    site.end_guest()


@pytest.mark.soak
def test_a_killed_restore_leaves_a_guest_that_runs_and_the_next_one_finishes(site: Site) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.ops.test_instant_guest import SLOW, Site; "
        "Site(Path(sys.argv[1])).run(speed=SLOW)"
    )
    with subprocess.Popen([sys.executable, "-c", program, site.folder]) as first:
        wait_until((site.out / "test.qmp").exists, alive=lambda: first.poll() is None)
        site.monitors.append(Monitor(site.out / "test.qmp"))
        wait_until(lambda: site.job() == "running", alive=lambda: first.poll() is None)
        first.kill()
    assert site.job() == "running", "it is QEMU's, and goes on"
    site.io("write -P 201 256k 4k")
    site.hurry()
    wait_until(lambda: site.job() == "pending")
    report = site.run()
    assert (report.started, [each.state for each in report.disks]) == (False, ["done", "done"])
    site.check_done("write -P 201 256k 4k")
    site.end_guest()


def test_a_guest_that_is_killed_keeps_what_it_flushed(site: Site) -> None:
    running = site.begun()
    site.io("write -P 202 1M 4k")
    site.io("flush")
    site.monitors.pop().close()
    (pid,) = [each.pid for each in qemu_processes() if any(f"{site.out}/" in word for word in each.argv)]
    os.kill(pid, signal.SIGKILL)
    report = running.ended(lambda: None)
    assert [each.state for each in report.disks] == ["done", "done"]
    assert site.says("the guest ended")
    site.check_done("write -P 202 1M 4k")
    for image in site.out.glob("*.qcow2"):
        qemu_img("check", "-q", image)


def test_who_cannot_be_started(site: Site, tmp_path: Path) -> None:
    place = snapchain.open_destination(site.dest, writing=True)
    assert site.guest is not None
    site.guest.point(place, 2)
    with pytest.raises(Unsupported, match="a guest of libvirt while it runs"):
        site.run()
    words = tuple(word.replace("virtio-blk-pci", "nvme") for word in argv(tmp_path))
    site.guest.point(place, 3, kind="qmp", inactive=None, live=None, argv=words)
    with pytest.raises(Unsupported, match="at an I/O error of vda"):
        site.run()
    assert not site.out.exists()
    assert main(["restore", f"{site.dest}::{GUEST}", str(site.out), "--start"]) == InvalidInput.exit_code


@pytest.mark.parametrize(
    ("status", "depends", "paused", "act"),
    [
        (JobStatus.GONE, True, 0, Act.BEGIN),
        (JobStatus.GONE, False, 0, Act.DONE),
        (JobStatus.RUNNING, True, 0, Act.WAIT),
        (JobStatus.PAUSED, True, 0, Act.WAIT),
        (JobStatus.PAUSED, True, 1, Act.RESUME),
        (JobStatus.PAUSED, True, 9, Act.RESUME),
        (JobStatus.PENDING, True, 0, Act.FINALIZE),
        (JobStatus.CONCLUDED, True, 0, Act.DISMISS),
    ],
)
def test_what_a_disk_asks_for(status: JobStatus, depends: bool, paused: int, act: Act) -> None:
    assert next_act(status, depends=depends, paused=paused) is act


def test_only_a_guest_that_an_error_stopped_is_continued() -> None:
    assert may_continue("io-error", lacks_room=False)
    assert not may_continue("io-error", lacks_room=True)
    for state in ("paused", "running", "postmigrate", "inmigrate", "shutdown", "guest-panicked"):
        assert not may_continue(state, lacks_room=False)
