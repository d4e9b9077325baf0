"""Positioned writing that takes all bytes or raises; shared by the writers of qcow2 and raw files."""

from __future__ import annotations

import os
from collections.abc import Sequence

Buffer = bytes | bytearray | memoryview
_MOST_BUFFERS = 1024
"""IOV_MAX of Linux."""


def write_all(fd: int, data: Buffer, offset: int) -> None:
    """Write `data` at a file offset; thread-safe. Raises OSError."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def write_vector(fd: int, parts: Sequence[Buffer], offset: int) -> None:
    """Write buffers one behind the other from a file offset on, with few system calls; else as `write_all`."""
    for first in range(0, len(parts), _MOST_BUFFERS):
        batch = parts[first : first + _MOST_BUFFERS]
        written = os.pwritev(fd, batch, offset)
        for part in batch:
            length = memoryview(part).nbytes
            if written < length:
                write_all(fd, memoryview(part).cast("B")[written:], offset + written)
                written = length
            written -= length
            offset += length
