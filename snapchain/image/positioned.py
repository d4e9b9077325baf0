"""Positioned writing that takes all bytes or raises; shared by the writers of qcow2 and raw files."""

from __future__ import annotations

import os
from collections.abc import Sequence

from snapchain.host.batches import MOST_BYTES, Buffer, batches, rest

__all__ = ["Buffer", "write_all", "write_vector"]


def write_all(fd: int, data: Buffer, offset: int) -> None:
    """Write `data` at a file offset; thread-safe. Raises OSError."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view[:MOST_BYTES], offset)
        view = view[written:]
        offset += written


def write_vector(fd: int, parts: Sequence[Buffer], offset: int) -> None:
    """Write buffers one behind the other from a file offset on, with few system calls; else as `write_all`."""
    for batch in batches(parts):
        left = batch
        while left:
            done = os.pwritev(fd, left, offset)
            left = rest(left, done)
            offset += done
