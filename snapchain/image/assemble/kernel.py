"""What the kernel does better than a loop of reads and writes: share extents, copy in place, write back early.

Each returns whether the kernel did it; what it cannot do here (another filesystem, a device, an odd range) is not an
error, since the caller has a slower way.  A full or failing disk is.  Source: Linux ioctl_ficlonerange(2),
copy_file_range(2), sync_file_range(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from enum import Enum
from functools import cache

FICLONERANGE = 0x4020940D
_CLONE = struct.Struct("=qQQQ")
_WRITE = 2
"""SYNC_FILE_RANGE_WRITE: begin to write dirty pages, wait for nothing."""


class Refusal(Enum):
    """Why a range was not shared."""

    NEVER = "this filesystem shares no extents"
    NOT_THIS_FILE = "the file lies elsewhere"
    NOT_THIS_RANGE = "the range does not fit"


_REFUSALS = {
    errno.EOPNOTSUPP: Refusal.NEVER,
    errno.ENOTTY: Refusal.NEVER,
    errno.ENOSYS: Refusal.NEVER,
    errno.EXDEV: Refusal.NOT_THIS_FILE,
    errno.EPERM: Refusal.NOT_THIS_FILE,
    errno.ETXTBSY: Refusal.NOT_THIS_FILE,
    errno.EISDIR: Refusal.NOT_THIS_FILE,
    errno.EBADF: Refusal.NOT_THIS_FILE,
    errno.EINVAL: Refusal.NOT_THIS_RANGE,
}
_COPY_ELSE = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EPERM, errno.ETXTBSY}


def share_range(source: int, source_offset: int, target: int, target_offset: int, length: int) -> Refusal | None:
    """Let `target` share extents of `source`; None when done. Raises OSError where the disk fails or is full."""
    try:
        fcntl.ioctl(target, FICLONERANGE, _CLONE.pack(source, source_offset, length, target_offset))
    except OSError as error:
        if error.errno in _REFUSALS:
            return _REFUSALS[error.errno]
        raise
    return None


def copy_range(source: int, source_offset: int, target: int, target_offset: int, length: int) -> int:
    """Copy inside the kernel; how many bytes were copied until it would not go on, be it at once."""
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(source, target, length - done, source_offset + done, target_offset + done)
        except OSError as error:
            if error.errno in _COPY_ELSE:
                break
            raise
        if not count:
            break
        done += count
    return done


def start_writing(fd: int, offset: int, length: int) -> None:
    """Begin to write a range back, so that the flush at the end finds little to do. Only a hint: errors come there."""
    call = _sync_file_range()
    if call is not None:
        call(fd, offset, length, _WRITE)


@cache
def _sync_file_range() -> ctypes._NamedFuncPointer | None:
    try:
        call = ctypes.CDLL(None).sync_file_range
    except AttributeError:
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call
