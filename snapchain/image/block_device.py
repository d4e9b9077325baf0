"""A block device as the target of a raw image: opened exclusively, measured, and really zeroed.

`O_EXCL` without `O_CREAT` claims the device in the kernel: one that is mounted, or part of a RAID or LVM, is refused.
Programs that merely open it are found by their locks and in /proc, as with files.
Zeroing tries the cheapest method first: deallocate (the device promises zeroes afterwards), then let the device or the
kernel write zeroes, then write them ourselves.  Source: block/file-posix.c of QEMU, which does the same.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from snapchain.errors import Busy, Conflict, InvalidInput
from snapchain.host.directory import open_behind
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.openers import OpenFiles
from snapchain.host.os_errors import os_errors
from snapchain.image.pread import write_all

_BLKSSZGET = 0x1268
_BLKZEROOUT = 0x127F
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL}
_STEP = 256 * 1024 * 1024
_ZEROES = bytes(1024 * 1024)
_EDGE = 1024 * 1024
"""Bytes at both ends: partition tables, their copies, and the superblocks of filesystems, RAID, LVM and LUKS."""
_SAMPLES, _SAMPLE = 256, 64 * 1024
_SYSFS = Path("/sys/dev/block")


@contextmanager
def claimed(path: Path, *, overwrite: bool) -> Iterator[int]:
    """A descriptor of a block device for reading and writing, without other users during the block.

    overwrite: accept a device that is not empty by `first_data`
    Raises Busy when it is mounted, claimed or open elsewhere, Conflict when it is not empty, InvalidInput when it is no
    block device, NotFound when it does not exist.
    """
    fd = open_device(path)
    try:
        with ImageLock(path, LockMode.WRITE):
            _check_parts(path, os.fstat(fd).st_rdev)
            found = None if overwrite else first_data(fd, subject=path)
            if found is not None:
                raise Conflict(
                    f"the device is not empty: there is data at byte {found}",
                    subject=path,
                    hint="choose another device, or say --force to overwrite it",
                )
            yield fd
    finally:
        os.close(fd)


def open_device(path: Path) -> int:
    """Open a block device for reading and writing, exclusively.

    A symbolic link (/dev/disk/by-id/...) is followed. Raises Busy when it is mounted or claimed, InvalidInput when it
    is no block device, NotFound when it does not exist.
    """
    with os_errors(path):
        status = path.stat()
        if not stat.S_ISBLK(status.st_mode):
            raise InvalidInput("not a block device", subject=path)
        try:
            fd = open_behind(path, writing=True, exclusive=True)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise Busy(_use_of(status.st_rdev), subject=path, hint="unmount it, or stop its user") from error
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            os.close(fd)
            raise InvalidInput("not a block device", subject=path)
        return fd


def first_data(fd: int, *, subject: object = None) -> int | None:
    """The first byte found that is not zero; None for a device that looks empty.

    Reads the first and last MiB, where tables and superblocks are, and 256 pieces of 64 KiB spread evenly between.
    A device that was used for an hour has data there, and 20 TB are checked within seconds.
    """
    with os_errors(subject):
        size = os.lseek(fd, 0, os.SEEK_END)
        edges = [(0, _EDGE), (max(size - _EDGE, 0), _EDGE)]
        spread = [(size * number // _SAMPLES, _SAMPLE) for number in range(1, _SAMPLES)]
        for offset, length in (*edges, *spread):
            data = os.pread(fd, length, offset)
            if data.count(0) != len(data):
                return offset + len(data) - len(data.lstrip(b"\0"))
    return None


def _use_of(number: int) -> str:
    """How the kernel describes the user of a device."""
    names = f"{os.major(number)}:{os.minor(number)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[2] == names:
                return f"the device is mounted at {fields[4]}"
    with suppress(OSError):
        holders = ", ".join(sorted(entry.name for entry in (_SYSFS / names / "holders").iterdir()))
        if holders:
            return f"the device is part of {holders}"
    return "the device is mounted or in use"


def _check_parts(path: Path, number: int) -> None:
    """Raises Busy for a disk with a partition that is open for writing, or a partition whose disk is."""
    place = _SYSFS / f"{os.major(number)}:{os.minor(number)}"
    related = [*place.glob("*/partition"), *([place / ".." / "dev"] if (place / "partition").exists() else [])]
    open_files = OpenFiles() if related else None
    for entry in related:
        major, minor = (entry.parent / "dev").read_text().split(":")
        for opener in open_files.device_openers(os.makedev(int(major), int(minor))) if open_files else ():
            if opener.writing:
                raise Busy(f"{opener} has this disk or a partition of it open", subject=path, hint="stop it")


def zero_device(fd: int, offset: int, length: int) -> None:
    """Make a range of an open device read as zeroes, whatever its content. Raises OSError."""
    grain = struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0]
    stop = offset + length
    first, last = min(-(-offset // grain) * grain, stop), max(stop // grain * grain, offset)
    if first >= last:
        _write_zeroes(fd, offset, length)
        return
    _write_zeroes(fd, offset, first - offset)
    for at in range(first, last, _STEP):
        _zero_sectors(fd, at, min(_STEP, last - at))
    _write_zeroes(fd, last, stop - last)


def _zero_sectors(fd: int, offset: int, length: int) -> None:
    """Whole sectors; in steps, because one call cannot be interrupted."""
    if not (_punched(fd, offset, length) or _zeroed_out(fd, offset, length)):
        _write_zeroes(fd, offset, length)


def _punched(fd: int, offset: int, length: int) -> bool:
    libc = _libc()
    while libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
        number = ctypes.get_errno()
        if number in _NOT_SUPPORTED:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True


def _zeroed_out(fd: int, offset: int, length: int) -> bool:
    try:
        fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", offset, length))
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return False
        raise
    return True


def _write_zeroes(fd: int, offset: int, length: int) -> None:
    view = memoryview(_ZEROES)
    for at in range(offset, offset + length, len(_ZEROES)):
        write_all(fd, view[: offset + length - at], at)


@cache
def _libc() -> ctypes.CDLL:
    """The C library; `os` has only posix_fallocate, which allocates and cannot free."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    libc.fallocate.restype = ctypes.c_int
    return libc
