"""A frozen view of a running guest's disks: one instant for all, and a guest that is never harmed."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Busy, Unavailable, Unsupported
from snapchain.guest.capture import Capture, CaptureRequest, bitmap_name
from snapchain.guest.capture_filters import check_supported, remove_files, undo
from snapchain.guest.capture_qmp import captured
from snapchain.guest.protocol import GuestDisk, Layer
from snapchain.model.extents import DATA, Extents
from tests.exhaustive import EXHAUSTIVE, some
from tests.guest.captures import Journal, RawMonitor, bitmaps, disks_of, left_in, make
from tests.guest.machine import Machine

MiB = 1 << 20
PLACE, FIRST, SECOND = "01234567", "a" * 64, "b" * 64


@contextmanager
def guest(tmp_path: Path, *, size: str = "64M", **more: Any) -> Iterator[tuple[Machine, dict[str, Path]]]:
    """A machine with one disk by -blockdev and one by -drive."""
    paths = {name: make(tmp_path / f"{name}.qcow2", size) for name in ("vda", "vdb")}
    drive = f"if=none,id=drive-b,file={paths['vdb']},format=qcow2,discard=unmap"
    argv = ["-drive", drive, "-device", "virtio-blk-pci,drive=drive-b,id=vdb"]
    with Machine(tmp_path / "m", disks={"vda": paths["vda"]}, argv=argv, **more) as machine:
        yield machine, paths


@contextmanager
def capture(
    machine: Machine,
    paths: Mapping[str, Path],
    *,
    image_format: str = "qcow2",
    before: Callable[[str], None] = lambda _command: None,
    **request: Any,
) -> Iterator[Capture]:
    monitor = RawMonitor(machine, before)
    try:
        with captured(
            monitor,
            disks_of(machine, paths, image_format),
            CaptureRequest(**request),
            guest="web1",
            journal=Journal(),
        ) as found:
            yield found
    finally:
        monitor.close()


def shown(found: Capture, number: int = 0) -> bytes:
    view = found.disks[number].view
    buffer = bytearray(view.size)
    view.read_into(0, memoryview(buffer))
    return bytes(buffer)


def settled(machine: Machine, paths: Mapping[str, Path], *, at: int = 63 * MiB) -> None:
    """Nothing of ours is left in the guest or beside its images, and it reads and writes."""
    assert left_in(machine) == []
    assert not [name for path in paths.values() for name in path.parent.glob(".snapchain*")]
    assert machine.status() == "running"
    for disk in paths:
        machine.write(disk, at, 4096, 77)
        assert machine.reads(disk, at, 4096, 77)


def test_what_is_written_after_the_instant_does_not_appear(tmp_path: Path) -> None:
    with guest(tmp_path) as (machine, paths):
        for disk in paths:
            machine.write(disk, 0, MiB, 1)
        with capture(machine, paths) as found:
            assert [disk.name for disk in found.disks] == ["vda", "vdb"]
            for disk in paths:
                machine.write(disk, 65536, 8 * MiB, 2)
                machine.io(disk, "discard 0 64k")
            for number, disk in enumerate(paths):
                data = shown(found, number)
                assert data[:MiB] == bytes([1]) * MiB, disk
                assert not any(data[MiB:]), disk
                assert found.disks[number].view.resolve().data_bytes < 16 * MiB, "its map is of use"
        settled(machine, paths)
        for disk in paths:
            assert machine.reads(disk, 65536, 8 * MiB, 2)
            assert machine.reads(disk, 0, 65536, 0), "the discard arrived below the filters"
        machine.quit()
        for path in paths.values():
            subprocess.run(["qemu-img", "check", "-q", path], check=True)


def test_the_map_is_not_believed_where_the_guest_has_written_since(tmp_path: Path) -> None:
    """QEMU 7.2 shows what was discarded since the instant as zero."""
    with guest(tmp_path) as (machine, paths):
        machine.write("vda", 0, 4 * MiB, 1)
        with capture(machine, paths) as found:
            machine.io("vda", "discard 1M 1M")
            machine.io("vda", "write -z 2M 1M")
            shows = found.disks[0].view.resolve()
            assert [length for at, length, val in shows.runs() if val == DATA and not at] == [4 * MiB]


def test_the_disks_are_captured_at_one_instant(tmp_path: Path) -> None:
    """The guest counts on the first disk and then on the second, between any two commands of the capture."""
    with guest(tmp_path) as (machine, paths):
        count = 0

        def step(_command: str) -> None:
            nonlocal count
            count += 1
            machine.write("vda", 0, 512, count)
            machine.write("vdb", 0, 512, count)

        with capture(machine, paths, before=step) as found:
            counters = [shown(found, number)[0] for number in (0, 1)]
            assert counters[0] == counters[1], "the disks are of different instants"
            assert 1 < counters[0] < count


def test_a_guest_that_writes_meanwhile_is_not_torn(tmp_path: Path) -> None:
    with guest(tmp_path) as (machine, paths):
        stop = threading.Event()
        last = [0]

        def write() -> None:
            while not stop.is_set():
                last[0] += 1
                for disk in paths:
                    machine.write(disk, 0, 4096, last[0] % 256)

        machine.write("vda", 0, 4096, 0)
        disks = disks_of(machine, paths)
        monitor = RawMonitor(machine)
        thread = threading.Thread(target=write)
        thread.start()
        try:
            for _ in range(5):
                with captured(monitor, disks, CaptureRequest(), guest="web1", journal=Journal()) as found:
                    one, other = (shown(found, number)[:4096] for number in (0, 1))
                    assert len(set(one)) == len(set(other)) == 1
                    assert (one[0] - other[0]) % 256 in (0, 1)
                    assert shown(found)[:4096] == one, "the view moved"
        finally:
            stop.set()
            thread.join()
            monitor.close()
        settled(machine, paths)


def test_a_full_scratch_file_breaks_the_view_and_never_a_write(tmp_path: Path) -> None:
    with guest(tmp_path) as (machine, paths):
        for disk in paths:
            machine.write(disk, 0, 16 * MiB, 1)
        with capture(machine, paths, scratch_bytes=4 * MiB) as found:
            for disk in paths:
                machine.write(disk, 0, 16 * MiB, 2)
                assert machine.reads(disk, 0, 16 * MiB, 2)
            assert machine.status() == "running"
            for number, disk in enumerate(paths):
                with pytest.raises(Unavailable, match=f"the view of its disk {disk} broke"):
                    shown(found, number)
            scratch = [each.stat() for each in tmp_path.glob(".snapchain*/*.qcow2")]
            assert len(scratch) == 2
            assert all(each.st_blocks * 512 <= 4 * MiB for each in scratch), "it took more than its limit"
        settled(machine, paths)
        with capture(machine, paths) as found:
            assert shown(found)[: 16 * MiB] == bytes([2]) * 16 * MiB


def test_a_scratch_file_that_hangs_breaks_the_view_and_the_write_goes_on(tmp_path: Path) -> None:
    """Each write would wait for more than an hour."""
    with guest(tmp_path) as (machine, paths):
        machine.write("vda", 0, MiB, 1)
        monitor = _Slow(machine)
        disks = disks_of(machine, paths)
        with captured(monitor, disks, CaptureRequest(stall_seconds=1), guest="web1", journal=Journal()) as found:
            for number in range(8):
                machine.write("vda", number * 65536, 65536, 2)
            assert machine.reads("vda", 0, 8 * 65536, 2)
            assert machine.status() == "running"
            with pytest.raises(Unavailable, match="the view of its disk vda broke"):
                shown(found)
            shown(found, 1)
        monitor.close()
        machine.ask("object-del", id="slow")
        settled(machine, paths)


class _Slow(RawMonitor):
    """Puts scratch files where 16 bytes a second can be written."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.execute(
            "object-add", {"qom-type": "throttle-group", "id": "slow", "limits": {"bps-write": 16, "bps-write-max": 32}}
        )

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None, /) -> Any:
        if command == "blockdev-add" and arguments and arguments["driver"] == "qcow2":
            plain = {key: value for key, value in arguments.items() if key != "node-name"}
            arguments = {
                "driver": "throttle",
                "throttle-group": "slow",
                "node-name": arguments["node-name"],
                "file": plain,
            }
        return super().execute(command, arguments)


# --- dirty bitmaps


def changes(found: Capture, content: str = FIRST, number: int = 0) -> tuple[Extents | None, str | None]:
    disk = found.disks[number]
    return disk.changed_since(content, disk.size)


def named(machine: Machine, paths: Mapping[str, Path], content: str, **how: Any) -> None:
    """A capture whose bitmaps get names."""
    with capture(machine, paths, **how) as found:
        names = {disk.name: (PLACE, content) for disk in found.disks}
        found.name_bitmaps(names)
        found.drop_bitmaps(names)


def test_a_bitmap_lists_what_was_written_since(tmp_path: Path) -> None:
    with guest(tmp_path) as (machine, paths):
        for disk in paths:
            machine.write(disk, 0, 4 * MiB, 1)
        with capture(machine, paths) as found:
            assert changes(found) == (None, "no dirty bitmap goes back to its newest point")
            found.name_bitmaps(dict.fromkeys(paths, (PLACE, FIRST)))
            for disk in paths:
                machine.write(disk, 2 * MiB, 65536, 2)  # after the instant, before the bitmap's name is used
        for disk in paths:
            machine.write(disk, 8 * MiB, 65536, 3)
        with capture(machine, paths) as found:
            for number in (0, 1):
                extents, why = changes(found, number=number)
                assert why is None
                assert extents is not None
                runs = [(at, length) for at, length, val in extents.runs() if val == DATA]
                assert runs == [(2 * MiB, 65536), (8 * MiB, 65536)]
            found.name_bitmaps(dict.fromkeys(paths, (PLACE, SECOND)))
            found.drop_bitmaps(dict.fromkeys(paths, (PLACE, SECOND)))
        for each in disks_of(machine, paths):
            assert bitmaps(machine, each.root) == [bitmap_name(PLACE, SECOND)]


def test_a_capture_that_fails_keeps_the_older_bitmap_recording(tmp_path: Path) -> None:
    with guest(tmp_path) as (machine, paths):
        named(machine, paths, FIRST)
        with suppress(ZeroDivisionError), capture(machine, paths):
            machine.write("vda", 0, 65536, 5)
            raise ZeroDivisionError
        machine.write("vda", MiB, 65536, 6)
        with capture(machine, paths) as found:
            extents, _ = changes(found)
            assert extents is not None
            assert [at for at, _, val in extents.runs() if val == DATA] == [0, MiB]
        settled(machine, paths)


def test_the_bitmaps_of_two_destinations_stand_side_by_side(tmp_path: Path) -> None:
    with guest(tmp_path) as (machine, paths):
        named(machine, paths, FIRST)
        with capture(machine, paths) as found:
            other = dict.fromkeys(paths, ("89abcdef", FIRST))
            found.name_bitmaps(other)
            found.drop_bitmaps(other)
        assert bitmaps(machine, "vda-top") == [bitmap_name(PLACE, FIRST), bitmap_name("89abcdef", FIRST)]
        machine.write("vda", 0, 65536, 7)
        named(machine, paths, FIRST)  # the same content once more: one bitmap, and it begins anew
        assert bitmaps(machine, "vda-top") == [bitmap_name(PLACE, FIRST), bitmap_name("89abcdef", FIRST)]
        with capture(machine, paths) as found:
            extents, _ = changes(found)
            assert extents is not None
            assert not extents.data_bytes


def test_a_persistent_bitmap_outlives_a_restart_and_a_kill_loses_it(tmp_path: Path) -> None:
    with guest(tmp_path) as (machine, paths):
        named(machine, paths, FIRST)
        machine.write("vda", MiB, 65536, 6)
        machine.quit()
    with Machine(tmp_path / "m", disks=paths) as machine:
        with capture(machine, paths) as found:
            extents, _ = changes(found)
            assert extents is not None
            assert [at for at, _, val in extents.runs() if val == DATA] == [MiB]
        machine.kill()
    with Machine(tmp_path / "m", disks=paths) as machine, capture(machine, paths) as found:
        extents, why = changes(found)
        assert extents is None
        assert why is not None


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: m.ask("block-dirty-bitmap-disable", node="vda-top", name=bitmap_name(PLACE, FIRST)), "disabled"),
        (lambda m: m.ask("block-dirty-bitmap-remove", node="vda-top", name=bitmap_name(PLACE, FIRST)), "no dirty"),
        (lambda m: m.ask("block_resize", **{"node-name": "vda-top", "size": 65 * MiB}), "resized"),
    ],
)
def test_a_bitmap_that_cannot_be_used_is_told(tmp_path: Path, spoil: Callable[[Machine], Any], words: str) -> None:
    with guest(tmp_path) as (machine, paths):
        named(machine, paths, FIRST)
        spoil(machine)
        with capture(machine, {"vda": paths["vda"]}) as found:
            extents, why = found.disks[0].changed_since(FIRST, 64 * MiB)
            assert extents is None
            assert why is not None
            assert words in why


def test_foreign_bitmaps_are_left_alone(tmp_path: Path) -> None:
    with guest(tmp_path) as (machine, paths):
        machine.ask("block-dirty-bitmap-add", node="vda-top", name="backup-of-another", persistent=True)
        machine.write("vda", 0, 65536, 1)
        named(machine, paths, FIRST)
        named(machine, paths, SECOND)
        assert bitmaps(machine, "vda-top") == ["backup-of-another", bitmap_name(PLACE, SECOND)]


# --- other disks, and others at work


def test_a_raw_disk_and_one_behind_a_throttle(tmp_path: Path) -> None:
    raw, slow = make(tmp_path / "raw.img", image_format="raw"), make(tmp_path / "slow.qcow2")
    blockdevs = {
        "vda": [f"driver=raw,node-name=raw,file.driver=file,file.filename={raw}"],
        "vdb": [
            f"driver=qcow2,node-name=fmt,file.driver=file,file.filename={slow}",
            "driver=throttle,node-name=thr,throttle-group=tg,file=fmt",
        ],
    }
    argv = ["-object", "throttle-group,id=tg"]
    with Machine(tmp_path / "m", blockdevs=blockdevs, argv=argv) as machine:
        paths = {"vda": raw, "vdb": slow}
        disks = disks_of(machine, paths, "raw")
        throttled = disks[1]
        chain = (_replaced(throttled.chain[0], node="fmt", image_format="qcow2"),)
        disks[1] = _replaced(throttled, filters=("thr",), chain=chain)
        monitor = RawMonitor(machine)
        for number in range(2):
            for disk in paths:
                machine.write(disk, number * MiB, 65536, number + 1)
            with captured(monitor, disks, CaptureRequest(), guest="web1", journal=Journal()) as found:
                for disk in paths:
                    machine.write(disk, number * MiB, 65536, 9)
                for each in found.disks:
                    part = memoryview(bytearray(65536))
                    each.view.read_into(number * MiB, part)
                    assert bytes(part) == bytes([number + 1]) * 65536
                    if number:
                        extents, why = each.changed_since(FIRST, each.size)
                        assert extents is not None, why
                        assert [at for at, _, val in extents.runs() if val == DATA] == [0, MiB]
                found.name_bitmaps(dict.fromkeys(paths, (PLACE, FIRST)))
        monitor.close()
        roots = [each["inserted"]["node-name"] for each in machine.ask("query-block") if "inserted" in each]
        assert sorted(roots) == ["raw", "thr"]
        settled(machine, paths)


def _replaced(value: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(value, **changes)


@pytest.mark.parametrize("exports", [True, False])
def test_a_foreign_nbd_server_is_respected(tmp_path: Path, exports: bool) -> None:
    with guest(tmp_path) as (machine, paths):
        machine.ask("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "other")}})
        if exports:
            machine.ask("block-export-add", **{"type": "nbd", "id": "theirs", "node-name": "vda-top"})
        with (
            pytest.raises(Busy, match="theirs of node vda-top" if exports else "cannot be started"),
            capture(machine, paths),
        ):
            raise AssertionError("it was not respected")
        assert (tmp_path / "other").exists()
        if exports:
            assert [each["id"] for each in machine.ask("query-block-exports")] == ["theirs"]
            machine.ask("block-export-del", id="theirs")
        machine.ask("nbd-server-stop")
        settled(machine, paths)


def test_an_older_qemu_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    class Older(RawMonitor):
        def execute(self, command: str, arguments: Mapping[str, Any] | None = None, /) -> Any:
            answer = super().execute(command, arguments)
            if command == "query-qmp-schema":
                for each in answer:
                    each["members"] = [m for m in each.get("members", ()) if m.get("name") != "cbw-timeout"]
            return answer

    with guest(tmp_path) as (machine, _):
        with Older(machine) as older, pytest.raises(Unsupported, match="lacks the filter"):
            check_supported(older, guest="web1")
        assert left_in(machine) == []


def test_a_guest_with_io_threads_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    """QEMU 7.2 crashes when a filter is opened above a node that such a thread has."""
    path = make(tmp_path / "vda.qcow2")
    blockdev = f"driver=qcow2,node-name=a,file.driver=file,file.filename={path}"
    device = "virtio-blk-pci,drive=a,id=vda,iothread=io0"
    argv = ["-object", "iothread,id=io0", "-blockdev", blockdev, "-device", device]
    with Machine(tmp_path / "m", argv=argv) as machine:
        with pytest.raises(Unsupported, match="the guest has I/O threads"), capture(machine, {"vda": path}):
            raise AssertionError("it was not refused")
        settled(machine, {"vda": path})


@pytest.mark.parametrize("bus", ["virtio-scsi-pci", "shared"])
def test_a_scsi_disk_and_disks_that_share_a_base(tmp_path: Path, bus: str) -> None:
    base = make(tmp_path / "base.qcow2")
    paths = {name: tmp_path / f"{name}.qcow2" for name in ("vda", "vdb")}
    argv = ["-blockdev", f"driver=qcow2,node-name=base,read-only=on,file.driver=file,file.filename={base}"]
    if bus != "shared":
        argv += ["-device", f"{bus},id=bus"]
    for name, path in paths.items():
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path], check=True)
        node = f"driver=qcow2,node-name={name}-top,backing=base,file.driver=file,file.filename={path}"
        kind = "virtio-blk-pci" if bus == "shared" else "scsi-hd,bus=bus.0"
        argv += ["-blockdev", node, "-device", f"{kind},drive={name}-top,id={name}"]
    with Machine(tmp_path / "m", argv=argv) as machine:
        nodes = [
            GuestDisk(
                name, f"{name}-top", (), (Layer(f"{name}-top", path, (1, 1), "qcow2", 64 * MiB),), read_only=False
            )
            for name, path in paths.items()
        ]
        with RawMonitor(machine) as monitor:
            for _ in range(2):
                with captured(monitor, nodes, CaptureRequest(), guest="web1", journal=Journal()) as found:
                    assert not any(shown(found, 1))
        assert left_in(machine) == []
        assert machine.status() == "running"


# --- deaths


class Death(BaseException):
    """Stands for SIGKILL: nothing that snapchain does afterwards reaches the guest."""


class Dying(RawMonitor):
    """Dies at a command. after: when it was carried out, and the answer is on its way."""

    def __init__(self, machine: Machine, at: int, *, after: bool) -> None:
        super().__init__(machine)
        self._at, self._after = at, after

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None, /) -> Any:
        number = len(self.commands)
        if number > self._at or (number == self._at and not self._after):
            raise Death
        answer = super().execute(command, arguments)
        if number == self._at:
            raise Death
        return answer


@pytest.mark.sampled
@pytest.mark.parametrize("after", [False, True])
def test_a_death_at_any_command_leaves_a_guest_that_goes_on(tmp_path: Path, after: bool) -> None:
    with guest(tmp_path, size="4M") as (machine, paths):
        for disk in paths:
            machine.write(disk, 0, MiB, 1)
        named(machine, paths, FIRST)
        disks = disks_of(machine, paths)
        died: list[str] = []
        for at in some(range(1000), each=3):
            journal, dying = Journal(), Dying(machine, at, after=after)
            try:
                with captured(dying, disks, CaptureRequest(), guest="web1", journal=journal) as found:
                    shown(found)
                    found.name_bitmaps(dict.fromkeys(paths, (PLACE, SECOND)))
                    found.drop_bitmaps(dict.fromkeys(paths, (PLACE, SECOND)))
            except Death:
                died.append(dying.commands[-1][0] if dying.commands else "")
            else:
                break
            finally:
                dying.close()
            for disk in paths:
                machine.write(disk, at * 4096, 4096, 3)  # with whatever is there
            assert machine.status() == "running"
            again = RawMonitor(machine)
            for plan in list(journal.records):
                undo(again, plan)
                remove_files(plan)
                undo(again, plan)
                remove_files(plan)
            again.close()
            settled(machine, paths, at=3 * MiB)
            roots = {each["inserted"]["node-name"] for each in machine.ask("query-block") if "inserted" in each}
            assert {disk.root for disk in disks} <= roots
        if EXHAUSTIVE:
            assert {"blockdev-reopen", "qom-set", "transaction", "nbd-server-start", "block-export-add"} <= set(died)
        assert len(died) > 10
        machine.quit()
    for path in paths.values():
        subprocess.run(["qemu-img", "check", "-q", path], check=True)


def test_qemu_dies_meanwhile(tmp_path: Path) -> None:
    with guest(tmp_path) as (machine, paths):
        journal = Journal()
        with (
            RawMonitor(machine) as monitor,
            captured(monitor, disks_of(machine, paths), CaptureRequest(), guest="web1", journal=journal) as found,
        ):
            machine.process.kill()
            machine.process.wait()
            with pytest.raises(Unavailable, match=r"NBD|connection"):
                shown(found)
        (plan,) = journal.records
        remove_files(plan)
    assert not list(tmp_path.glob(".snapchain*"))
    for path in paths.values():
        subprocess.run(["qemu-img", "check", "-q", path], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_block_device(tmp_path: Path) -> None:
    if shutil.which("losetup") is None:
        pytest.fail("losetup is missing")
    file = make(tmp_path / "disk.img", image_format="raw")
    device = subprocess.run(["losetup", "--find", "--show", file], check=True, capture_output=True, text=True)
    loop = Path(device.stdout.strip())
    try:
        blockdevs = {"vda": [f"driver=raw,node-name=dev,file.driver=host_device,file.filename={loop}"]}
        with Machine(tmp_path / "m", blockdevs=blockdevs) as machine:
            machine.write("vda", 0, MiB, 1)
            with capture(machine, {"vda": loop}, image_format="raw", scratch_dir=tmp_path) as found:
                machine.write("vda", 0, MiB, 2)
                assert shown(found)[:MiB] == bytes([1]) * MiB
            settled(machine, {"vda": loop})
    finally:
        with suppress(subprocess.CalledProcessError):
            subprocess.run(["losetup", "--detach", loop], check=True)
