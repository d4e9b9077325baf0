"""The raw writer: sparse new files, and devices full of old bytes that must not shine through."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, Unavailable
from snapchain.image import block_device
from snapchain.image.block_device import claimed, first_data, open_device, zero_device
from snapchain.image.raw import RawWriter

SIZE = 8 << 20
OLD = bytes(range(1, 256)) * (SIZE // 255 + 1)
ROOM = SIZE + 4096


def run(*argv: object) -> str:
    return subprocess.run([str(word) for word in argv], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A loop device of ROOM bytes, dirty all over."""
    image = tmp_path / "device.img"
    image.write_bytes(OLD[:ROOM].ljust(ROOM, b"!"))
    attached = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=False)
    if attached.returncode:
        pytest.skip(f"no loop device: {attached.stderr.strip()}")
    name = attached.stdout.strip()
    yield Path(name)
    run("losetup", "-d", name)


def contents(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read()


def new_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)


def test_a_new_file_is_sparse(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    fd = new_file(path)
    with RawWriter(fd, (1 << 40) + 1000) as writer:
        writer.write(1 << 39, b"x" * 4096)
        writer.zero(0, 1 << 39)
        writer.write((1 << 40) + 999, b"y")
    status = os.fstat(fd)
    assert status.st_size == (1 << 40) + 1000
    assert status.st_blocks * 512 <= 64 << 10
    assert os.pread(fd, 4097, 1 << 39) == b"x" * 4096 + b"\0"
    assert os.pread(fd, 2, (1 << 40) + 999) == b"y"
    os.close(fd)


@pytest.mark.parametrize("size", [0, 1, 511, 513])
def test_any_size(tmp_path: Path, size: int) -> None:
    fd = new_file(tmp_path / "a.raw")
    with RawWriter(fd, size) as writer:
        writer.write(0, b"x" * size)
        writer.zero(size, 0)
    os.close(fd)
    assert (tmp_path / "a.raw").read_bytes() == b"x" * size


def test_bytes_outside_the_disk_are_refused(tmp_path: Path) -> None:
    fd = new_file(tmp_path / "a.raw")
    writer = RawWriter(fd, 1000)
    with pytest.raises(InvalidInput, match="0\\+1 lie outside"):
        writer.write(0, b"x")  # not begun
    writer.begin()
    for offset, length in [(-1, 1), (0, 1001), (1000, 1), (5000, 0)]:
        with pytest.raises(InvalidInput, match="lie outside the 1000"):
            writer.write(offset, bytes(length))
        with pytest.raises(InvalidInput, match="lie outside the 1000"):
            writer.zero(offset, length)
    writer.write(0, b"x")
    with pytest.raises(InvalidInput, match="a new empty file or a block device"):
        RawWriter(fd, 1000).begin()  # not empty any more
    os.close(fd)


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    fd = new_file(path)
    writer = RawWriter(fd, 10, subject=path)
    writer.begin()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, fd)
    with pytest.raises(Unavailable, match="no space left") as caught:
        writer.write(0, b"x")
    assert caught.value.subject == str(path)
    os.close(full)
    os.close(fd)


@pytest.mark.root
@pytest.mark.serial
@pytest.mark.parametrize("way", ["deallocate", "kernel", "writing"])
def test_a_used_device_reads_as_the_disk(device: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way of zeroing the device knows, nothing old shines through, and its tail is left alone."""
    size = SIZE - 300  # no whole sector at the end
    pieces = [(0, 5000), (1 << 20, 70_000), ((3 << 20) + 17, 1), (size - 100, 100)]
    if way != "deallocate":
        monkeypatch.setattr(block_device, "_punched", lambda *_: False)
    if way == "writing":
        monkeypatch.setattr(block_device, "_zeroed_out", lambda *_: False)
    want = bytearray(size)
    fd = open_device(device)
    with RawWriter(fd, size, subject=device) as writer:
        end = 0
        for at, length in [*pieces, (size, 0)]:
            writer.zero(end, at - end)
            writer.write(at, b"n" * length)
            want[at : at + length] = b"n" * length
            end = at + length
    os.close(fd)
    got = contents(device)
    assert got[:size] == want
    assert got[size:] == OLD[size:ROOM].ljust(ROOM - size, b"!")


@pytest.mark.root
@pytest.mark.serial
def test_any_range_of_a_device_is_zeroed_exactly(device: Path) -> None:
    fd = open_device(device)

    @settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        start=st.integers(0, 20_000),
        length=st.one_of(st.integers(0, 3000), st.integers(0, 100_000)),
        way=st.sampled_from([(True, True), (False, True), (False, False)]),
    )
    def law(start: int, length: int, way: tuple[bool, bool]) -> None:
        os.pwrite(fd, OLD[:200_000], 0)
        with pytest.MonkeyPatch.context() as patch:
            if not way[0]:
                patch.setattr(block_device, "_punched", lambda *_: False)
            if not way[1]:
                patch.setattr(block_device, "_zeroed_out", lambda *_: False)
            block_device.zero_device(fd, start, length)
        assert os.pread(fd, 200_000, 0) == OLD[:start] + bytes(length) + OLD[start + length : 200_000]

    law()
    os.close(fd)


@pytest.mark.root
@pytest.mark.serial
def test_the_kernel_knows_both_ways_here(device: Path) -> None:
    """So that the tests above have really gone the three ways that they name."""
    fd = open_device(device)
    assert block_device._punched(fd, 0, 4096)
    assert block_device._zeroed_out(fd, 8192, 4096)
    assert os.pread(fd, 4096, 0) == os.pread(fd, 4096, 8192) == bytes(4096)
    assert os.pread(fd, 4096, 4096) == OLD[4096:8192]
    os.close(fd)


@pytest.mark.root
@pytest.mark.serial
def test_a_device_that_is_too_small_is_refused_untouched(device: Path) -> None:
    before = contents(device)
    fd = open_device(device)
    with pytest.raises(InvalidInput, match=f"has {ROOM} bytes"):
        RawWriter(fd, ROOM + 1, subject=device).begin()
    os.close(fd)
    assert contents(device) == before


@pytest.mark.root
@pytest.mark.serial
def test_a_mounted_device_is_refused(device: Path, tmp_path: Path) -> None:
    run("mkfs.ext4", "-q", device)
    mount = tmp_path / "mnt"
    mount.mkdir()
    run("mount", device, mount)
    try:
        with pytest.raises(Busy, match="mounted at") as caught:
            open_device(device)
        assert caught.value.subject == str(device)
    finally:
        run("umount", mount)
    os.close(open_device(device))


@pytest.mark.root
@pytest.mark.serial
def test_a_device_that_we_hold_is_refused_to_others(device: Path, tmp_path: Path) -> None:
    link = tmp_path / "by-id"
    link.symlink_to(device)
    fd = open_device(link)
    with pytest.raises(Busy, match="mounted or in use"):
        open_device(device)
    os.close(fd)


def test_what_is_no_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="not a block device"):
        open_device(tmp_path)
    with pytest.raises(InvalidInput, match="not a block device"):
        open_device(Path("/dev/null"))
    with pytest.raises(NotFound, match="nothing: no such file"):
        open_device(tmp_path / "nothing")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidInput, match="not a block device"):
        open_device(tmp_path / "fifo")


# ---- whose device it is


def test_an_empty_device_is_claimed_and_one_with_data_is_not(device: Path) -> None:
    with (
        pytest.raises(Conflict, match="the device is not empty: there is data at byte 0") as raised,
        claimed(device, overwrite=False),
    ):
        raise AssertionError("it was claimed")
    assert raised.value.subject == str(device)
    with claimed(device, overwrite=True) as fd:
        zero_device(fd, 0, ROOM)
        with pytest.raises(Busy, match="mounted or in use"):
            open_device(device)
    with claimed(device, overwrite=False):
        pass


@pytest.mark.parametrize("size", [512, 4096, 1 << 20, (1 << 20) + 512, 3 << 20, 64 << 20])
def test_whatever_is_at_the_ends_is_found(tmp_path: Path, size: int) -> None:
    """Tables, their copies and superblocks lie within a MiB of one end."""
    path = tmp_path / "disk"
    for at in {0, 511, 512, 1024, 4096, 65536, (1 << 20) - 1, size - (1 << 20), size - 17 * 1024, size - 1}:
        if 0 <= at < size:
            with path.open("wb") as file:
                file.truncate(size)
                file.seek(at)
                file.write(b"x")
            with path.open("rb") as file:
                assert first_data(file.fileno()) == at
    with path.open("wb") as file:
        file.truncate(size)
    with path.open("rb") as file:
        assert first_data(file.fileno()) is None


def test_data_between_is_found_where_there_is_much(tmp_path: Path) -> None:
    """A run of 1/256 of the device and 64 KiB cannot be missed, wherever it lies."""
    size, run_length = 64 << 20, (64 << 20) // 256
    path = tmp_path / "disk"
    for start in range(1 << 20, size - run_length - (1 << 20), 7_654_321):
        with path.open("wb") as file:
            file.truncate(size)
            file.seek(start)
            file.write(b"x" * run_length)
        with path.open("rb") as file:
            assert first_data(file.fileno()) is not None


def test_a_disk_with_a_partition_in_use_is_in_use(device: Path) -> None:
    table = bytearray(512)
    table[446:462] = struct.pack("<B3sB3sII", 0, b"", 0x83, b"", 2048, 4096)
    table[510:] = b"\x55\xaa"
    with device.open("r+b") as disk:
        disk.write(table)
    part = device.with_name(f"{device.name}p1")
    if subprocess.run(["partx", "-a", device], check=False, capture_output=True).returncode or not part.exists():
        pytest.skip("no partitions on loop devices here")
    try:
        with part.open("r+b"), claimed(device, overwrite=True):
            pass  # this process's own
        with subprocess.Popen(["sh", "-c", f"exec 3<>{part}; echo; read x"], stdin=-1, stdout=-1) as user:
            assert user.stdout is not None
            user.stdout.readline()
            with (
                pytest.raises(Busy, match=r"sh \(pid \d+\) has this disk or a partition"),
                claimed(device, overwrite=True),
            ):
                pass
            user.kill()
    finally:
        run("partx", "-d", device)
