"""What lies under a name, pinned while it is looked at: no link is followed, nothing is opened for reading.

The number of an inode is used again soon.  Together with the time at which the file was made, which nobody can set, it
names one file for ever.
"""

from __future__ import annotations

import functools
import os
import struct
from dataclasses import dataclass
from typing import Any

from snapchain.host.directory import Directory

_AT_EMPTY_PATH, _STATX_BTIME = 0x1000, 0x800
_STATX_BYTES, _MASK_AT, _BORN_AT = 256, 0, 80
_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a file. born_ns: when it was made, None where its filesystem does not know."""

    status: os.stat_result
    born_ns: int | None


def look(directory: Directory, name: str) -> Look:
    """At what has a name in a directory, be it a link. Raises OSError."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.fd)
    try:
        return look_at(fd)
    finally:
        os.close(fd)


def look_at(fd: int) -> Look:
    """At what is open."""
    return Look(os.fstat(fd), _born(fd))


def _born(fd: int) -> int | None:
    from ctypes import create_string_buffer  # not at the start of every command

    statx = _statx()
    buffer = create_string_buffer(_STATX_BYTES)
    if statx is None or statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer) != 0:
        return None
    if not struct.unpack_from("=I", buffer, _MASK_AT)[0] & _STATX_BTIME:
        return None
    seconds, nanoseconds = struct.unpack_from("=qI", buffer, _BORN_AT)
    return int(seconds * _NS + nanoseconds)


@functools.cache
def _statx() -> Any | None:
    """statx(2) of the C library, which glibc and musl have since 2018."""
    from ctypes import CDLL

    return getattr(CDLL(None), "statx", None)
