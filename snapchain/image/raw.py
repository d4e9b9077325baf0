"""The map of a raw image: stored ranges are DATA, holes are ZERO.

Like QEMU, the size is rounded up to 512 bytes and the rest of the last sector reads as zeroes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from enum import Enum
from types import TracebackType
from typing import Self

import numpy as np

from snapchain.errors import InvalidInput, Unsupported
from snapchain.host.batches import Buffer
from snapchain.host.os_errors import os_errors
from snapchain.image.block_device import zero_device
from snapchain.image.holes import stored_range
from snapchain.image.physical import Int64s, Physical, PhysicalBuilder, RunBudget, Runs
from snapchain.image.pread import file_bytes, write_all
from snapchain.model.extents import DATA, ZERO

SECTOR = 512
MAX_BYTES = (1 << 63) - (1 << 30)
"""BDRV_MAX_LENGTH of QEMU."""
_BATCH = 65536


def map_raw(fd: int, *, budget: RunBudget, subject: object) -> Physical:
    """The map of a raw file or block device. Raises Unsupported for too many extents."""
    stored = file_bytes(fd)
    if stored > MAX_BYTES:
        raise Unsupported(f"a file of {stored} bytes is larger than QEMU's limit", subject=subject)
    size = -(-stored // SECTOR) * SECTOR
    builder = PhysicalBuilder(size, budget=budget, subject=subject)
    at = 0
    while at < stored:
        first: list[int] = []
        last: list[int] = []
        start = at
        while at < stored and len(first) < _BATCH:
            found = stored_range(fd, at, size=stored, subject=subject)
            if found is None:
                at = stored
                break
            first.append(found[0])
            last.append(found[1])
            at = found[1]
        builder.add(_with_holes(start, at, np.array(first, np.int64), np.array(last, np.int64)))
    if stored < size:
        builder.add(Runs.plain(np.array([stored]), np.array([size]), kind=ZERO, host=-1))
    return builder.finish()


def _with_holes(start: int, stop: int, first: Int64s, last: Int64s) -> Runs:
    """DATA on [first, last), ZERO between, over [start, stop)."""
    edges = np.empty(2 * len(first) + 2, np.int64)
    edges[0], edges[1:-1:2], edges[2:-1:2], edges[-1] = start, first, last, stop
    kind = np.full(len(edges) - 1, ZERO, np.int8)
    kind[1::2] = DATA
    held = edges[1:] > edges[:-1]
    begin = edges[:-1][held]
    host = np.where(kind[held] == DATA, begin, -1)
    return Runs(begin, edges[1:][held], kind[held], host, np.zeros(len(begin), np.int32))


# --- Writing a raw image: into a new sparse file, or onto a block device that holds old bytes.
#
# Every byte of [0, size) is written or zeroed once, in any order, by any thread.  DATA is written.  ZERO and ABSENT
# become a hole in a new file, and real zeroes on a device.  Bytes of a device beyond `size` stay as they are.


class _Target(Enum):
    FILE = "file"
    DEVICE = "device"


class RawWriter:
    """Fills a raw image. The caller closes the file descriptor.

    `fd` is a new empty file, or a device from `block_device.open_device`.  `subject` names it in errors.
    resumed: an earlier run began the file, and it has its size already
    """

    def __init__(self, fd: int, size: int, *, subject: object = None, resumed: bool = False) -> None:
        self.size = size
        self._resumed = resumed
        self._fd = fd
        self._subject = subject
        self._target: _Target | None = None

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.finish()

    def begin(self) -> None:
        """Give a file its size, or check that a device is large enough. Raises InvalidInput when it is not."""
        with os_errors(self._subject):
            status = os.fstat(self._fd)
            if stat.S_ISBLK(status.st_mode):
                room = os.lseek(self._fd, 0, os.SEEK_END)
                if room < self.size:
                    raise InvalidInput(
                        f"the device has {room} bytes, the disk {self.size}",
                        subject=self._subject,
                        hint="choose a larger device",
                    )
                self._target = _Target.DEVICE
            elif stat.S_ISREG(status.st_mode) and status.st_size == (self.size if self._resumed else 0):
                os.ftruncate(self._fd, self.size)
                self._target = _Target.FILE
            else:
                raise InvalidInput("a raw image goes to a new empty file or a block device", subject=self._subject)

    def write(self, offset: int, data: Buffer) -> None:
        """Store guest bytes. Raises InvalidInput outside [0, size), Unavailable when the disk fails."""
        self._check(offset, memoryview(data).nbytes)
        with os_errors(self._subject):
            write_all(self._fd, data, offset)

    def write_pieces(self, pieces: Sequence[tuple[int, Buffer]]) -> None:
        """As `write` for many (offset, bytes)."""
        for offset, data in pieces:
            self._check(offset, memoryview(data).nbytes)
        with os_errors(self._subject):
            for offset, data in pieces:
                write_all(self._fd, data, offset)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes; it must not have been written in this run. Raises as `write`."""
        self._check(offset, length)
        if self._target is _Target.DEVICE:
            with os_errors(self._subject):
                zero_device(self._fd, offset, length)

    def finish(self) -> None:
        """Flush everything to the disk. Raises Unavailable when that fails; then no written byte can be trusted."""
        with os_errors(self._subject):
            os.fsync(self._fd)

    def _check(self, offset: int, length: int) -> None:
        if self._target is None or not 0 <= offset <= offset + length <= self.size:
            raise InvalidInput(f"bytes {offset}+{length} lie outside the {self.size} of this image")
