"""Writing a raw image: into a new sparse file, or onto a block device that may be full of old bytes.

    with RawWriter(fd, size) as writer:
        writer.write(offset, data)      # DATA
        writer.zero(offset, length)     # ZERO and ABSENT: a hole in a new file, really zeroed on a device

Every byte of [0, size) is written or zeroed once, in any order, by any thread.  What a device holds beyond `size` is
left alone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from enum import Enum
from types import TracebackType
from typing import Self

from snapchain.errors import InvalidInput
from snapchain.host.os_errors import os_errors
from snapchain.image.block_device import zero_device
from snapchain.image.positioned import Buffer, write_all


class _Target(Enum):
    FILE = "file"
    DEVICE = "device"


class RawWriter:
    """Fills a raw image. The file descriptor stays the caller's: it is not closed here.

    `fd` is a new empty file, or a device from `block_device.open_device`.  `subject` names it in errors.
    resumed: an earlier run has begun the file, which has its size already
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
        """Give a file its size, or see that a device is large enough. Raises InvalidInput when it is not."""
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
            self.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes; it must not have been written in this run. Raises as `write`."""
        self._check(offset, length)
        if self._target is _Target.DEVICE:
            with os_errors(self._subject):
                zero_device(self._fd, offset, length)

    def finish(self) -> None:
        """Force everything to the disk. Raises Unavailable when that fails; then nothing written is to be trusted."""
        with os_errors(self._subject):
            os.fsync(self._fd)

    def _check(self, offset: int, length: int) -> None:
        if self._target is None or not 0 <= offset <= offset + length <= self.size:
            raise InvalidInput(f"bytes {offset}+{length} lie outside the {self.size} of this image")
