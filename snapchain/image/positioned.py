"""Positioned writing that takes all bytes or raises; shared by the writers of qcow2 and raw files."""

from __future__ import annotations

import os

Buffer = bytes | bytearray | memoryview


def write_all(fd: int, data: Buffer, offset: int) -> None:
    """Write `data` at a file offset; thread-safe. Raises OSError."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written
