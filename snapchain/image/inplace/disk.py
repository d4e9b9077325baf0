"""The file that is changed: every write of tables, every flush and every change of its length goes through here.

(Guest data is brought by assemble's Mover, by the same descriptor, and is flushed here.)
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from snapchain.errors import Unsupported
from snapchain.host.batches import Buffer
from snapchain.host.os_errors import os_errors
from snapchain.image.pread import file_bytes, pread, write_all
from snapchain.image.qcow2.format import SECTOR
from snapchain.image.qcow2.header import read_header
from snapchain.image.qcow2.tables import ImageFd


class Disk:
    """A qcow2 file, open for reading and writing; the descriptor stays the caller's. Errors: Unavailable."""

    def __init__(self, fd: int, *, subject: object) -> None:
        self.fd = fd
        self.subject = subject

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return file_bytes(self.fd)

    def write(self, data: Buffer, offset: int) -> None:
        """All of it."""
        with os_errors(self.subject):
            write_all(self.fd, data, offset)

    def sync(self) -> None:
        """What was written is on the disk when this returns."""
        with os_errors(self.subject):
            os.fsync(self.fd)

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """As `sync`, while the body reads; what was written is on the disk when this is left in peace.

        A failure of the flush is raised at the end, after the body, which must not write.
        """
        failures: list[BaseException] = []

        def flush() -> None:
            try:
                self.sync()
            except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that waits
                failures.append(error)

        worker = threading.Thread(target=flush, name="merge-flush", daemon=True)
        worker.start()
        try:
            yield
        finally:
            worker.join()
        if failures:
            raise failures[0]

    def truncate(self, size: int) -> None:
        """Cut off, or grow by a hole."""
        with os_errors(self.subject):
            os.ftruncate(self.fd, size)

    def first_sector(self) -> bytearray:
        """What one write changes as a whole or not at all."""
        return bytearray(pread(self.fd, SECTOR, offset=0, subject=self.subject))

    def image(self) -> ImageFd:
        """With its header as it is now. Raises Corrupt, Unsupported for one that may not be changed in place."""
        header = read_header(self.fd, subject=self.subject)
        with os_errors(self.subject):
            regular = stat.S_ISREG(os.fstat(self.fd).st_mode)
        if not regular:
            raise Unsupported("a block device is not changed in place", subject=self.subject)
        if header.snapshots:
            raise Unsupported("the image has internal snapshots, which share its clusters", subject=self.subject)
        return ImageFd(self.fd, self.size, header, self.subject)
