"""Positioned reads that return all bytes, or raise an error that names the file and the offset."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache

from snapchain.errors import Corrupt, Unavailable
from snapchain.host.batches import MOST_BYTES, Buffer, batches, rest

_SYNC_FILE_RANGE_WRITE = 2


def pread_into(fd: int, buffer: memoryview, *, offset: int, subject: object) -> None:
    """Fill `buffer` (bytes) from `offset` of the file.

    Raises Corrupt where the file ends first (it was truncated: every caller has checked the range against its size),
    Unavailable where the disk fails.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise Unavailable(
                f"cannot read at offset {offset + done} of the file: {error.strerror}", subject=subject
            ) from error
        if count == 0:
            raise Corrupt(
                f"the file ends at offset {offset + done}, in the middle of {len(buffer)} bytes from {offset}",
                subject=subject,
            )
        done += count


def pread(fd: int, length: int, *, offset: int, subject: object) -> bytes:
    """Exactly `length` bytes; errors as `pread_into`."""
    buffer = bytearray(length)
    pread_into(fd, memoryview(buffer), offset=offset, subject=subject)
    return bytes(buffer)


def file_bytes(fd: int) -> int:
    """Size of a regular file or block device; of a device by seeking to its end."""
    return os.lseek(fd, 0, os.SEEK_END)


# --- Positioned writing: all bytes are written, or an error is raised.


def write_all(fd: int, data: Buffer, offset: int) -> None:
    """Write `data` at a file offset; thread-safe. Raises OSError."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view[:MOST_BYTES], offset)
        view = view[written:]
        offset += written


def begin_writeback(fd: int) -> None:
    """Have the kernel begin to write what a file has in memory to the disk, so that a later flush finds little left.

    Where it cannot, that flush takes longer, and nothing else differs.
    """
    _libc().sync_file_range(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)


@cache
def _libc() -> ctypes.CDLL:
    """The C library: `os` has no sync_file_range."""
    libc = ctypes.CDLL(None)
    libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    libc.sync_file_range.restype = ctypes.c_int
    return libc


def write_vector(fd: int, parts: Sequence[Buffer], offset: int) -> None:
    """Write buffers one after another from a file offset on, with few system calls; otherwise as `write_all`."""
    for batch in batches(parts):
        left = batch
        while left:
            done = os.pwritev(fd, left, offset)
            left = rest(left, done)
            offset += done
