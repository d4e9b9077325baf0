"""A snapshot of a running guest: all disks at one instant, and whatever dies, the guest goes on and nothing is left."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.guest import journal, snapshot as module
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.guest.protocol import NewOverlay
from snapchain.guest.qmp import Monitor
from snapchain.guest.qmp_guest import QmpGuest
from snapchain.guest.snapshot import GuestSnapshot, Quiesce, SnapshotRequest, plan, run
from snapchain.model.consistency import Consistency
from snapchain.model.events import Event, ignore
from snapchain.ops import doctor
from snapchain.source.at_rest import ImageAtRest
from snapchain.source.notes import Notes
from snapchain.source.protocol import Scope
from tests.exhaustive import EXHAUSTIVE, some
from tests.guest.machine import Machine
from tests.guest.spy import DROP, KILL, LOSE, Command, Fault, Place, Spy, changing, every
from tests.waiting import wait_until

NO = SnapshotRequest(quiesce=Quiesce.NO)
DISKS = ("vda", "vdb", "vdc")
MiB = 1 << 20


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """For sockets: their paths must be short."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


def create(path: Path, size: str = "8M", *options: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, size], check=True)
    return path


def images(folder: Path, names: Sequence[str] = DISKS) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    return {name: create(folder / f"{name}.qcow2") for name in names}


def snapshot(socket: Path, request: SnapshotRequest = NO, events: list[Event] | None = None) -> GuestSnapshot:
    on_event = ignore if events is None else events.append
    with open_guest(GuestAddress(qmp=socket), on_event=on_event) as guest:
        return run(guest, plan(guest, request), request, on_event=on_event)


def chains(socket: Path) -> dict[str, list[str]]:
    """The names of the files of each disk, as the guest has them."""
    with open_guest(GuestAddress(qmp=socket)) as guest:
        return {disk.name: [str(layer.path and layer.path.name) for layer in disk.chain] for disk in guest.disks()}


def info(path: Path) -> list[dict[str, Any]]:
    """qemu-img's word on a chain, top first."""
    argv = ["qemu-img", "info", "-U", "--backing-chain", "--output=json", str(path)]
    found: list[dict[str, Any]] = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    return found


def reads(path: Path, offset: int, length: int, pattern: int) -> bool:
    """Whether an image at rest has this pattern, by qemu-io."""
    command = f"read -P {pattern} {offset} {length}"
    argv = ["qemu-io", "-r", "-U", "-f", "qcow2", "-c", command, str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.returncode == 0 and "verification failed" not in done.stdout


def test_a_guest_that_was_started_by_its_old_path_is_told(tmp_path: Path, run_dir: Path) -> None:
    disks = images(tmp_path / "images", ("vda",))
    with Machine(run_dir / "first", disks=disks) as machine:
        sealed = snapshot(machine.qmp).disks[0]
        machine.quit()
    events: list[Event] = []
    with Machine(run_dir / "newest", disks={"vda": sealed.overlay}) as machine:
        snapshot(machine.qmp, events=events)
        machine.quit()
    assert not events
    with Machine(run_dir / "old", disks=disks) as machine:
        snapshot(machine.qmp, events=events)
        machine.quit()
    (notice,) = (str(getattr(each, "message", "")) for each in events)
    assert notice.startswith(f"{disks['vda']}: disk vda of guest web1 writes to a layer that was sealed at ")


def test_all_disks_are_sealed_under_their_paths(tmp_path: Path, run_dir: Path) -> None:
    disks = images(tmp_path / "images", ("vda", "vdb"))
    events: list[Event] = []
    with Machine(run_dir, disks=disks) as machine:
        machine.write("vda", 0, 65536, 1)
        report = snapshot(machine.qmp, SnapshotRequest(labels=("before",)), events)
        assert [(each.disk, each.sealed, each.overlay.name) for each in report.disks] == [
            ("vda", disks["vda"], "vda.1.qcow2"),
            ("vdb", disks["vdb"], "vdb.1.qcow2"),
        ]
        assert report.consistency is Consistency.CRASH
        assert report.why_not == "the guest has no channel for a guest agent"
        assert re.fullmatch("[0-9a-f]{32}", report.instant)
        assert report.starts_with == tuple(each.overlay for each in report.disks)
        machine.write("vda", 0, 65536, 2)
        assert reads(disks["vda"], 0, 65536, 1)
        again = snapshot(machine.qmp)
        assert [each.overlay.name for each in again.disks] == ["vda.2.qcow2", "vdb.2.qcow2"]
        assert again.instant != report.instant
        machine.write("vda", 0, 65536, 3)
        with ImageAtRest(again.disks[0].overlay).opened(Scope.SEALED) as chain:
            assert [file.path.name for file in chain.files] == ["vda.qcow2", "vda.1.qcow2"]
        machine.quit()
    assert not events
    assert journal.find() == ([], [])
    note = Notes().of(disks["vda"])
    assert note.sealed is not None
    assert note.sealed.labels == ("before",)
    for path, pattern in ((disks["vda"], 1), (report.disks[0].overlay, 2), (again.disks[0].overlay, 3)):
        assert reads(path, 0, 65536, pattern)
        subprocess.run(["qemu-img", "check", "-q", path], check=True)


def test_the_overlay_is_made_as_its_disk_is(tmp_path: Path, run_dir: Path) -> None:
    """Size, geometry, format, mode, and a backing name that holds when the directory is moved."""
    folder = tmp_path / "images"
    folder.mkdir()
    geometry = "cluster_size=128k,extended_l2=on"
    create(folder / "a:b.qcow2", str(8 * MiB + 512), "-o", geometry)
    (folder / "a:b.qcow2").chmod(0o640)
    (folder / "raw.img").write_bytes(bytes(MiB))
    blockdevs = {
        "vda": [f"driver=qcow2,node-name=q,file.driver=file,file.filename={folder}/a:b.qcow2"],
        "vdb": [f"driver=raw,node-name=r,file.driver=file,file.filename={folder}/raw.img"],
    }
    with Machine(run_dir, blockdevs=blockdevs) as machine:
        machine.write("vdb", 0, 512, 9)
        report = snapshot(machine.qmp)
        machine.write("vdb", 512, 512, 8)
        machine.quit()
    assert [each.overlay.name for each in report.disks] == ["a:b.1.qcow2", "raw.1.qcow2"]
    assert report.disks[0].overlay.stat().st_mode & 0o777 == 0o640
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    top, base = info(moved / "a:b.1.qcow2")
    assert top["virtual-size"] == base["virtual-size"] == 8 * MiB + 512
    assert top["cluster-size"] == 128 << 10
    assert top["format-specific"]["data"]["extended-l2"]
    assert top["backing-filename-format"] == "qcow2"
    assert base["filename"].endswith("elsewhere/./a:b.qcow2")
    assert info(moved / "raw.1.qcow2")[0]["backing-filename-format"] == "raw"
    assert reads(moved / "raw.1.qcow2", 0, 512, 9)
    assert reads(moved / "raw.1.qcow2", 512, 512, 8)


def test_everything_is_on_the_disk_before_the_guest_uses_it(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power loss the overlay must be there whole, and so must the record of what was begun."""
    folder = tmp_path / "images"
    disks = images(folder, ("vda",))
    flushed: list[tuple[int, int]] = []
    before: list[tuple[int, int]] = []
    fsync, prepared = os.fsync, QmpGuest.prepared

    def noted(fd: int) -> None:
        fsync(fd)
        status = os.fstat(fd)
        flushed.append((status.st_dev, status.st_ino))

    def opened(guest: QmpGuest, new: Sequence[NewOverlay]) -> Any:
        before.extend(flushed)
        return prepared(guest, new)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(QmpGuest, "prepared", opened)
    with Machine(run_dir, disks=disks) as machine:
        report = snapshot(machine.qmp)
    places = [report.disks[0].overlay, folder, journal.directory()]
    order = [before.index((status.st_dev, status.st_ino)) for status in (each.stat() for each in places)]
    assert order[0] < order[1]


def test_a_link_to_an_image_is_followed(tmp_path: Path, run_dir: Path) -> None:
    """The overlay lies beside the file, so its backing name is right; the link is never changed."""
    (tmp_path / "store").mkdir()
    (tmp_path / "images").mkdir()
    real = create(tmp_path / "store" / "disk.qcow2")
    link = tmp_path / "images" / "web1.qcow2"
    link.symlink_to(real)
    with Machine(run_dir, disks={"vda": link}) as machine:
        machine.write("vda", 0, 65536, 5)
        report = snapshot(machine.qmp)
        machine.quit()
    assert report.disks[0].overlay == real.with_name("disk.1.qcow2")
    assert link.readlink() == real
    assert [each["filename"] for each in info(report.disks[0].overlay)] == [
        str(real.with_name("disk.1.qcow2")),
        str(real),
    ]


def test_numbers_are_not_given_twice(tmp_path: Path, run_dir: Path) -> None:
    disks = images(tmp_path / "images", ("vda",))
    for name in ("vda.7.qcow2", "vda.9.raw", "vda.x.qcow2"):
        (tmp_path / "images" / name).touch()
    with Machine(run_dir, disks=disks) as machine:
        assert snapshot(machine.qmp).disks[0].overlay.name == "vda.10.qcow2"
        assert snapshot(machine.qmp).disks[0].overlay.name == "vda.11.qcow2"


def test_chosen_disks_and_what_is_left_out(tmp_path: Path, run_dir: Path) -> None:
    disks = images(tmp_path / "images", ("vda", "vdb"))
    iso = tmp_path / "images" / "cd.iso"
    iso.write_bytes(bytes(MiB))
    drive = ["-drive", f"if=none,id=cd,media=cdrom,readonly=on,format=raw,file={iso}", "-device", "ide-cd,drive=cd"]
    with Machine(run_dir, disks=disks, argv=drive) as machine:
        with open_guest(GuestAddress(qmp=machine.qmp)) as guest:
            everything = plan(guest, NO)
            assert [each.disk for each in everything.disks] == ["vda", "vdb"]
            assert [each.reason for each in everything.left_out] == ["CD-ROM"]
            with pytest.raises(Unsupported, match="no snapshot can be taken of this disk: CD-ROM"):
                plan(guest, SnapshotRequest(disks=[everything.left_out[0].disk]))
            with pytest.raises(NotFound, match="the guest has no disk"):
                plan(guest, SnapshotRequest(disks=["vdx"]))
        report = snapshot(machine.qmp, SnapshotRequest(disks=["vdb"], quiesce=Quiesce.NO))
        assert [each.disk for each in report.disks] == ["vdb"]
        assert ("vda", "not chosen") in [(each.disk, each.reason) for each in report.left_out]
        assert len(chains(machine.qmp)["vda"]) == 1


def test_a_disk_that_cannot_be_taken_is_no_half_snapshot(tmp_path: Path, run_dir: Path) -> None:
    """The others are named as the way out."""
    disks = images(tmp_path / "images", ("vda", "vdb"))
    with Machine(run_dir, disks=disks) as machine:
        folder = tmp_path / "images"
        disks["vda"].rename(folder / "other.qcow2")
        create(disks["vda"])
        with pytest.raises(Unsupported, match=r"web1/vda: .*another file has this path now") as refused:
            snapshot(machine.qmp)
        assert refused.value.hint == "to snapshot the other disks without it: --disk vdb"
        assert sorted(each.name for each in folder.iterdir()) == ["other.qcow2", "vda.qcow2", "vdb.qcow2"]
        assert len(chains(machine.qmp)["vdb"]) == 1


def test_what_others_do_in_a_guest_is_respected(tmp_path: Path, run_dir: Path) -> None:
    """A job of somebody on one disk, and nothing on the other."""
    disks = images(tmp_path / "images", ("vda", "vdb"))
    target = create(tmp_path / "target.qcow2")
    with Machine(run_dir, disks=disks) as machine:
        machine.write("vda", 0, MiB, 1)
        file = {"driver": "file", "filename": str(target)}
        machine.ask("blockdev-add", driver="qcow2", file=file, **{"node-name": "t"})
        machine.ask("blockdev-mirror", **{"job-id": "theirs", "device": "vda-top", "target": "t", "sync": "full"})
        with (
            open_guest(GuestAddress(qmp=machine.qmp)) as guest,
            pytest.raises(Busy, match=r"something is at work on the disk: .*theirs.*another program"),
        ):
            plan(guest, NO)
        assert snapshot(machine.qmp, SnapshotRequest(disks=["vdb"], quiesce=Quiesce.NO)).disks[0].disk == "vdb"
        assert [each["id"] for each in machine.ask("query-jobs")] == ["theirs"]


def test_a_paused_guest_stays_paused(tmp_path: Path, run_dir: Path) -> None:
    disks = images(tmp_path / "images", ("vda",))
    with Machine(run_dir, disks=disks) as machine:
        machine.ask("stop")
        snapshot(machine.qmp)
        assert machine.status() == "paused"
        assert len(chains(machine.qmp)["vda"]) == 2


def test_a_guest_that_waits_for_a_migration_is_refused(tmp_path: Path, run_dir: Path) -> None:
    disks = images(tmp_path / "images", ("vda",))
    with (
        Machine(run_dir, disks=disks, argv=["-incoming", "defer"]) as machine,
        pytest.raises(Busy, match="waits for a migration"),
    ):
        snapshot(machine.qmp)
    assert len(list((tmp_path / "images").iterdir())) == 1


def test_a_long_chain_is_told(tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONG_CHAIN", 3)
    disks = images(tmp_path / "images", ("vda",))
    events: list[Event] = []
    with Machine(run_dir, disks=disks) as machine:
        snapshot(machine.qmp, events=events)
        assert events == []
        snapshot(machine.qmp, events=events)
        told = "its chain has 3 layers now, and the guest waits for each look at it"
        assert [str(each.message) for each in events] == [  # type: ignore[union-attr]
            f"web1/vda: {told}; merge it: snapchain merge --qmp {machine.qmp}"
        ]


def test_persistent_bitmaps_stay_and_are_told(tmp_path: Path, run_dir: Path) -> None:
    disks = images(tmp_path / "images", ("vda",))
    events: list[Event] = []
    with Machine(run_dir, disks=disks) as machine:
        machine.ask("block-dirty-bitmap-add", node="vda-top", name="daily", persistent=True)
        snapshot(machine.qmp, events=events)
    assert [each.message for each in events] == [  # type: ignore[union-attr]
        "persistent bitmaps stay in the sealed file vda.qcow2: daily"
    ]


def test_a_full_filesystem_is_refused_beforehand(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks = images(tmp_path / "images", ("vda",))
    monkeypatch.setattr("snapchain.host.files.free_bytes", lambda _: 1000)
    with Machine(run_dir, disks=disks) as machine, pytest.raises(Unavailable, match="bytes left for the overlays"):
        snapshot(machine.qmp)
    assert len(list((tmp_path / "images").iterdir())) == 1


@pytest.mark.parametrize(
    "changes",
    [{"freeze_seconds": 30.0}, {"freeze_seconds": 0.0}, {"bound_seconds": float("nan")}, {"labels": ("",)}],
)
def test_requests_that_make_no_sense(tmp_path: Path, run_dir: Path, changes: dict[str, Any]) -> None:
    disks = images(tmp_path / "images", ("vda",))
    with (
        Machine(run_dir, disks=disks) as machine,
        open_guest(GuestAddress(qmp=machine.qmp)) as guest,
        pytest.raises(InvalidInput, match=r"time limit|cannot be a label"),
    ):
        plan(guest, SnapshotRequest(**changes))


def test_a_changed_guest_is_no_longer_as_planned(tmp_path: Path, run_dir: Path) -> None:
    disks = images(tmp_path / "images", ("vda",))
    with Machine(run_dir, disks=disks) as machine, open_guest(GuestAddress(qmp=machine.qmp)) as guest:
        planned = plan(guest, NO)
        run(guest, planned, NO)
        with pytest.raises(Conflict, match="changed after the snapshot was planned"):
            run(guest, planned, NO)


# --- One instant: a counter is written to three disks in their order, without a pause.


class Writer:
    """Writes a counter to all disks in order, over and over; a block of each disk holds the last one."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.error: BaseException | None = None
        self.count = 0

    def __enter__(self) -> Self:
        self._thread.start()
        wait_until(lambda: self.count > 3)
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        try:
            while not self._ends.is_set():
                self.count += 1
                for disk in DISKS:
                    # Two bytes of it, each as the pattern of a sector.
                    low, high = self.count & 0xFF, self.count >> 8
                    self._machine.io(disk, f"write -P {high} 0 512")
                    self._machine.io(disk, f"write -P {low} 512 512")
        except BaseException as error:  # noqa: BLE001 - raised again by __exit__
            self.error = error


def counter(path: Path) -> int:
    """What a snapshot of a disk holds; a carry that is in flight is the neighbour's."""
    raw = subprocess.run(
        ["qemu-img", "dd", "-U", "-f", "qcow2", "-O", "raw", "bs=512", "count=2", f"if={path}", f"of={path}.counter"],
        check=True,
        capture_output=True,
    )
    _ = raw
    taken = Path(f"{path}.counter")
    data = taken.read_bytes()
    taken.unlink()
    return (data[0] << 8) + data[512]


@pytest.mark.sampled
def test_the_disks_of_a_snapshot_are_of_one_instant(tmp_path: Path, run_dir: Path) -> None:
    disks = images(tmp_path / "images")
    with Machine(run_dir, disks=disks) as machine:
        with Writer(machine):
            reports = [snapshot(machine.qmp) for _ in range(100 if EXHAUSTIVE else 8)]
        assert machine.status() == "running"
        machine.quit()
    before = 0
    for report in reports:
        found = [counter(each.sealed) for each in report.disks]
        assert found == sorted(found, reverse=True), "a later disk is ahead of an earlier one"
        assert found[0] - found[-1] <= 1 or found[0] & 0xFF in (0, 0xFF), found
        assert found[-1] >= before - 256 if found[0] & 0xFF in (0, 0xFF) else found[-1] >= before
        before = found[-1]


# --- Deaths and lost answers, at each command.


def child_snapshot(socket: Path) -> subprocess.Popen[bytes]:
    """The command, as a process that can be killed."""
    options = ("--quiesce", "no", "--label", "x")
    argv = [sys.executable, "-m", "snapchain", "snapshot", "--qmp", str(socket), *options]
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> list[Command]:
    """Those of one snapshot of two disks."""
    disks = images(tmp_path_factory.mktemp("counted"), ("vda", "vdb"))
    run_dir = Path(tempfile.mkdtemp())
    with Machine(run_dir, disks=disks) as machine, Spy(run_dir / "spy", machine.qmp, counts=changing) as spy:
        snapshot(spy.path)
        assert {each.name for each in spy.commands if each.number is not None} == {"blockdev-add", "transaction"}
        assert "query-qmp-schema" not in spy.names(), "the guest would wait 20 ms for that answer alone"
    shutil.rmtree(run_dir)
    return spy.commands


def switch(commands: list[Command]) -> int:
    """The number of the command that switches the guest to the overlays."""
    return next(each.number for each in commands if each.name == "transaction" and each.number is not None)


@contextmanager
def killed_at(machine: Machine, path: Path, fault: Fault) -> Iterator[Spy]:
    """A snapshot that the fault ends; the block comes after its end."""
    with Spy(path, machine.qmp, fault, counts=changing) as spy:
        with child_snapshot(spy.path) as child:
            assert child.wait() == -signal.SIGKILL, fault
        assert spy.happened, fault
        yield spy


def check_end(machine: Machine, folder: Path) -> None:
    """After a failure and the next run or the doctor: the guest runs, its data are right, and nothing is left."""
    assert machine.status() == "running"
    assert machine.reads("vda", 0, 65536, 1)
    machine.write("vda", 65536, 65536, 2)
    assert journal.find() == ([], [])
    shown = chains(machine.qmp)
    in_use = {name for chain in shown.values() for name in chain}
    there = {each.name for each in folder.iterdir() if not each.name.startswith(".snapchain-layer-")}
    assert there == in_use
    assert len({len(chain) for chain in shown.values()}) == 1, "one disk has a point that the other lacks"
    nodes = [each["node-name"] for each in machine.ask("query-named-block-nodes") if each["drv"] == "qcow2"]
    assert len(nodes) == len(in_use)
    machine.quit()
    for chain in shown.values():
        subprocess.run(["qemu-img", "check", "-q", folder / chain[-1]], check=True)
    assert reads(folder / shown["vda"][-1], 0, 65536, 1)
    assert reads(folder / shown["vda"][-1], 65536, 65536, 2)


@pytest.mark.sampled
@pytest.mark.parametrize("ended_by", ["doctor", "next run"])
def test_sigkill_at_any_command(tmp_path: Path, run_dir: Path, commands: list[Command], ended_by: str) -> None:
    faults = list(every(commands, (KILL,)))
    for number, fault in enumerate(some(reversed(faults), each=3 if ended_by == "doctor" else 6)):
        folder = tmp_path / f"images-{number}"
        disks = images(folder, ("vda", "vdb"))
        with Machine(run_dir / str(number), disks=disks) as machine:
            machine.write("vda", 0, 65536, 1)
            with killed_at(machine, run_dir / "spy", fault) as spy:
                assert machine.status() == "running"
                assert machine.reads("vda", 0, 65536, 1)
                if ended_by == "doctor":
                    planned = doctor.plan([])
                    assert [each.kind for each in planned.findings] == [doctor.Kind.GUEST], fault
                    report = doctor.run(planned)
                    assert report.well, report
                else:
                    snapshot(spy.path)
                    assert not doctor.plan([]).findings
            done = fault.place is Place.SENT and "transaction" in fault.name
            length = 1 + done + (ended_by == "next run")
            assert [len(chain) for chain in chains(machine.qmp).values()] == [length, length], fault
            check_end(machine, folder)
            if done:
                note = Notes().of(disks["vda"])
                assert note.sealed is not None
                assert note.sealed.labels == ("x",)  # of the run that was killed


@pytest.mark.sampled
def test_lost_answers_and_connections(tmp_path: Path, run_dir: Path, commands: list[Command]) -> None:
    """The graph decides; either the snapshot is made, or nothing is changed, and the next one is."""
    faults = list(every(commands, (DROP,)))
    for number, fault in enumerate(some(faults, each=2)):
        folder = tmp_path / f"images-{number}"
        disks = images(folder, ("vda", "vdb"))
        with Machine(run_dir / str(number), disks=disks) as machine:
            machine.write("vda", 0, 65536, 1)
            with Spy(run_dir / "spy", machine.qmp, fault, counts=changing) as spy:
                failed = False
                try:
                    snapshot(spy.path)
                except SnapchainError:
                    failed = True
                assert spy.happened, fault
                lengths = {len(chain) for chain in chains(spy.path).values()}
                assert lengths == {1 if failed else 2}, fault
                snapshot(spy.path)
            check_end(machine, folder)


def test_an_answer_that_never_comes(tmp_path: Path, run_dir: Path, commands: list[Command]) -> None:
    """QEMU has switched, and snapchain learns that from the graph; the point is not called consistent."""
    number = switch(commands)
    disks = images(tmp_path / "images", ("vda", "vdb"))
    with Machine(run_dir / "m", disks=disks) as machine:
        fault = Fault(number, Place.SENT, LOSE)
        with Spy(run_dir / "spy", machine.qmp, fault, counts=changing) as spy:
            monitor = Monitor(spy.path, command_seconds=4)
            guest = QmpGuest(GuestAddress(qmp=spy.path), monitor=monitor)
            report = run(guest, plan(guest, NO), NO)
            guest.close()
            assert spy.happened
        assert [len(chain) for chain in chains(machine.qmp).values()] == [2, 2]
        assert report.consistency is Consistency.CRASH
    assert journal.find() == ([], [])


def test_qemu_is_killed_before_the_switch(tmp_path: Path, run_dir: Path, commands: list[Command]) -> None:
    """Nothing of the overlays is left: the images are as they were."""
    number = switch(commands)
    folder = tmp_path / "images"
    disks = images(folder, ("vda", "vdb"))
    fault = Fault(number, Place.BEFORE, KILL)
    with Machine(run_dir / "m", disks=disks) as machine, killed_at(machine, run_dir / "spy", fault):
        machine.kill()
    assert (folder / "vda.1.qcow2").exists()
    report = doctor.run(doctor.plan([]))
    assert report.well, report
    assert sorted(each.name for each in report.treated[0].removed) == ["vda.1.qcow2", "vdb.1.qcow2"]
    assert sorted(each.name for each in folder.iterdir()) == ["vda.qcow2", "vdb.qcow2"]
    assert journal.find() == ([], [])


def test_an_overlay_that_the_guest_wrote_to_stays(tmp_path: Path, run_dir: Path, commands: list[Command]) -> None:
    """QEMU was killed too, after the switch: the overlay holds the only copy of what was written since."""
    number = switch(commands)
    folder = tmp_path / "images"
    disks = images(folder, ("vda",))
    fault = Fault(number - 1, Place.SENT, KILL)  # with one disk there is one command less
    with Machine(run_dir / "m", disks=disks) as machine, killed_at(machine, run_dir / "spy", fault):
        machine.write("vda", 0, 65536, 4)
        machine.io("vda", "flush")
        machine.kill()
    report = doctor.run(doctor.plan([]))
    assert report.well, report
    assert reads(folder / "vda.1.qcow2", 0, 65536, 4)


def test_a_chain_that_cannot_be_read_is_not_judged(
    tmp_path: Path, run_dir: Path, commands: list[Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that is no known file may be the very overlay: then nothing is removed."""
    folder = tmp_path / "images"
    disks = images(folder, ("vda",))
    with Machine(run_dir / "m", disks=disks) as machine:
        number = switch(commands) - 1
        with killed_at(machine, run_dir / "spy", Fault(number, Place.SENT, KILL)) as spy:
            disks_of = QmpGuest.disks

            def blurred(guest: QmpGuest) -> Any:
                [disk] = disks_of(guest)
                return [replace(disk, chain=(*disk.chain[:-1], replace(disk.active, path=None, identity=None)))]

            monkeypatch.setattr(QmpGuest, "disks", blurred)
            report = doctor.run(doctor.plan([]))
            assert [each.done for each in report.treated] == [False]
            assert "cannot be told from the block graph" in str(report.treated[0].error)
            monkeypatch.undo()
            monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
            assert (folder / "vda.1.qcow2").exists()
            assert len(chains(spy.path)["vda"]) == 2


def test_work_of_a_run_that_is_alive_is_left_alone(tmp_path: Path, run_dir: Path) -> None:
    disks = images(tmp_path / "images", ("vda",))
    with Machine(run_dir / "m", disks=disks) as machine:
        fault = Fault(0, Place.BEFORE, LOSE)
        with Spy(run_dir / "spy", machine.qmp, fault, counts=changing) as spy, child_snapshot(spy.path) as child:
            wait_until(lambda: spy.happened)
            assert not doctor.plan([]).findings
            assert len(journal.find()[0]) == 1
            child.kill()
        wait_until(lambda: len(doctor.plan([]).findings) == 1)


def test_ctrl_c_leaves_nothing(tmp_path: Path, run_dir: Path) -> None:
    folder = tmp_path / "images"
    disks = images(folder, ("vda", "vdb"))
    with Machine(run_dir / "m", disks=disks) as machine:
        machine.write("vda", 0, 65536, 1)

        def interrupt(link: Any) -> bool:
            os.kill(link.client_pid, signal.SIGINT)
            return True

        fault = Fault(1, Place.BEFORE, interrupt)
        with Spy(run_dir / "spy", machine.qmp, fault, counts=changing) as spy, child_snapshot(spy.path) as child:
            assert child.wait() == 130
        check_end(machine, folder)
