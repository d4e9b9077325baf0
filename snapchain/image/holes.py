"""Where a file stores anything: its holes read as zeroes, and need not be read."""

from __future__ import annotations

import errno
import os

from snapchain.errors import Unavailable


def stored_range(fd: int, offset: int, *, size: int, subject: object) -> tuple[int, int] | None:
    """The first stored range [start, stop) that ends behind `offset`, within `size`; None when only a hole follows.

    A file that cannot tell (block devices) stores everything. Raises Unavailable where the disk fails.
    """
    try:
        start = os.lseek(fd, offset, os.SEEK_DATA)
        stop = os.lseek(fd, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno == errno.EINVAL:
            return (offset, size) if offset < size else None
        raise Unavailable(f"cannot look for holes at offset {offset}: {error.strerror}", subject=subject) from error
    return (start, min(stop, size)) if start < size else None
