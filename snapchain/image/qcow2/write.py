"""Writing a planned qcow2 file.

    with Qcow2Writer(fd, plan(extents, backing=...)) as writer:
        for offset, data in ...:            # any order, any threads
            writer.write(offset, data)

Data first, then the tables, a flush, and the header cluster last. Until then the file does not begin with the magic
of qcow2, so a torn file is never taken for an image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import Enum
from itertools import pairwise
from types import TracebackType
from typing import Self

import numpy as np

from snapchain.errors import InvalidInput
from snapchain.host.batches import Buffer
from snapchain.host.os_errors import os_errors
from snapchain.image.pread import write_all, write_vector
from snapchain.image.qcow2 import encode
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.layout import DEFAULT_CLUSTER_SIZE, Layout, plan
from snapchain.model.extents import Extents, Int64s

_FEW = 4
"""Up to so many pieces, one call for each costs less than grouping adjacent ones."""


class _State(Enum):
    NEW = "new"
    OPEN = "open"
    FINISHED = "finished"


class Qcow2Writer:
    """Fills a new empty file by a layout. The caller closes the file descriptor.

    As a context manager it begins on entry and finishes on a clean exit; after an exception the file has no header.
    Bytes of DATA runs that are never written read as zeroes (the file is sparse there).
    `subject` names the file in errors.
    """

    def __init__(self, fd: int, layout: Layout, *, subject: object = None, resumed: bool = False) -> None:
        """resumed: an earlier run began the file."""
        self.layout = layout
        self._resumed = resumed
        self._fd = fd
        self._subject = subject
        self._header = encode.header(layout)
        self._state = _State.NEW

    def __enter__(self) -> Self:
        if self._resumed:
            self.resume()
        else:
            self.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None and self._state is _State.OPEN:
            self.finish()

    def begin(self) -> None:
        """Give the file its size. Raises InvalidInput when it is not empty, Unavailable when that fails."""
        with os_errors(self._subject):
            if os.fstat(self._fd).st_size:
                raise InvalidInput("a new image is only written to an empty file")
            os.ftruncate(self._fd, self.layout.file_bytes)
        self._state = _State.OPEN

    def resume(self) -> None:
        """Continue a file that an earlier run began by the same layout and did not finish.

        Raises InvalidInput for a file of another size, or one that already has its header.
        """
        with os_errors(self._subject):
            if os.fstat(self._fd).st_size != self.layout.file_bytes or any(os.pread(self._fd, 4, 0)):
                raise InvalidInput("this is no unfinished file of this layout", subject=self._subject)
        self._state = _State.OPEN

    def write(self, offset: int, data: Buffer) -> None:
        """Store guest bytes, which must lie within one or more adjacent DATA runs.

        Thread-safe, in any order. Raises InvalidInput outside DATA, Unavailable when the disk fails.
        """
        length = memoryview(data).nbytes
        if length:
            with os_errors(self._subject):
                write_all(self._fd, data, self.host_of(offset, length))

    def write_pieces(self, pieces: Sequence[tuple[int, Buffer]]) -> None:
        """As `write` for many (guest offset, bytes): pieces adjacent in the file are written together.

        The file holds data in guest order without gaps, so a fragmented disk costs few system calls.
        """
        if len(pieces) < _FEW:
            for offset, data in pieces:
                self.write(offset, data)
            return
        start = np.array([offset for offset, _ in pieces], np.int64)
        length = np.array([memoryview(data).nbytes for _, data in pieces], np.int64)
        host = self._hosts_of(start, length)
        cuts = [0, *(np.flatnonzero(host[1:] != host[:-1] + length[:-1]) + 1).tolist(), len(pieces)]
        with os_errors(self._subject):
            for first, stop in pairwise(cuts):
                write_vector(self._fd, [data for _, data in pieces[first:stop]], int(host[first]))

    def host_of(self, offset: int, length: int) -> int:
        """File offset of a range of DATA, which is contiguous there: for copy_file_range and FICLONERANGE too."""
        layout = self.layout
        run = int(np.searchsorted(layout.guest, offset, side="right")) - 1
        within = offset - int(layout.guest[run]) if run >= 0 else 0
        if self._state is not _State.OPEN or run < 0 or within + length > int(layout.length[run]):
            raise InvalidInput(f"guest bytes {offset}+{length} are not all data of this image")
        return int(layout.host[run]) + within

    def _hosts_of(self, offset: Int64s, length: Int64s) -> Int64s:
        """`host_of` many stretches."""
        layout = self.layout
        run = np.searchsorted(layout.guest, offset, side="right") - 1
        if self._state is _State.OPEN and bool((run >= 0).all()):
            within = offset - layout.guest[run]
            if bool((within + length <= layout.length[run]).all()):
                return layout.host[run] + within
        raise InvalidInput("some of these guest bytes are not data of this image")

    def finish(self, *, flush: bool = True) -> None:
        """Write the tables, flush, write the header, flush. Afterwards the file is an image.

        flush: False where the caller flushes the file before it gets its final name.
        """
        if self._state is not _State.OPEN:
            raise InvalidInput(f"the writer of this image is {self._state.value}")
        with os_errors(self._subject):
            for offset, table in encode.metadata(self.layout):
                write_all(self._fd, table, offset)
            if flush:
                os.fsync(self._fd)
            write_all(self._fd, self._header, 0)
            if flush:
                os.fsync(self._fd)
        self._state = _State.FINISHED


# --- An empty qcow2 overlay: it reads as its backing file until the first write.
#
# Guests see the same as in a file made by `qemu-img create -u -b NAME -F FORMAT -o compat=1.1`.  It is written by
# descriptor, so no name that another user swapped is followed, and the backing file is never opened.


def write_overlay(
    fd: int, size: int, backing: Backing, *, cluster_size: int | None, extended_l2: bool, subject: object
) -> None:
    """Fill a new, empty file. It is not flushed: flush it before it gets its final name.

    size: guest bytes, a multiple of 512; cluster_size: None for QEMU's own choice; subject: the file that errors name
    Raises InvalidInput for a geometry or a backing name that qcow2 cannot have, Unavailable for a full or failing disk.
    """
    chosen = DEFAULT_CLUSTER_SIZE if cluster_size is None else cluster_size
    name = backing.name
    if not backing.is_uri and "/" not in name and ":" in name:  # QEMU would parse it as a protocol
        backing = Backing(f"./{name}", backing.format)
    layout = plan(Extents.absent(size), cluster_size=chosen, backing=backing, extended_l2=extended_l2)
    writer = Qcow2Writer(fd, layout, subject=subject)
    writer.begin()
    writer.finish(flush=False)
