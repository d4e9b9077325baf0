"""A block device as the target of a raw image: opened for us alone, measured, and really zeroed.

`O_EXCL` without `O_CREAT` claims the device in the kernel: one that is mounted, or part of a RAID or LVM, is refused.
Zeroing tries what is cheapest first: deallocate (the device promises zeroes afterwards), then let the device or the
kernel write zeroes, then write them ourselves.  Source: block/file-posix.c of QEMU, which does the same.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from functools import cache
from pathlib import Path

from snapchain.errors import Busy, InvalidInput
from snapchain.host.os_errors import os_errors
from snapchain.image.positioned import write_all

_BLKSSZGET = 0x1268
_BLKZEROOUT = 0x127F
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL}
_STEP = 256 * 1024 * 1024
_ZEROES = bytes(1024 * 1024)


def open_device(path: Path) -> int:
    """Open a block device for reading and writing, held by nobody else.

    A symbolic link (/dev/disk/by-id/...) is followed. Raises Busy when it is mounted or claimed, InvalidInput when it
    is no block device, NotFound when it is not there.
    """
    with os_errors(path):
        if not stat.S_ISBLK(path.stat().st_mode):
            raise InvalidInput("not a block device", subject=path)
        try:
            fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise Busy("the device is mounted or in use", subject=path, hint="unmount it, or stop its user") from error
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            os.close(fd)
            raise InvalidInput("not a block device", subject=path)
        return fd


def zero_device(fd: int, offset: int, length: int) -> None:
    """Make a range of an open device read as zeroes, whatever was there. Raises OSError."""
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
    """The C library; `os` has posix_fallocate only, which allocates where this must free."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    libc.fallocate.restype = ctypes.c_int
    return libc
