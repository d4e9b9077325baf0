"""A file as it will be when some pending writes are done: its tables are in memory, its data are read where they lie.

So a merge in place can be proven before anything points to what it has added.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from snapchain.host.os_errors import os_errors
from snapchain.image.backing import Place
from snapchain.image.chain import ImageChain
from snapchain.image.file import ImageFile
from snapchain.image.physical import RunBudget
from snapchain.image.pread import file_bytes, pread, write_all
from snapchain.image.qcow2.header import Qcow2Header, read_header
from snapchain.image.qcow2.refcounts import refcount_table
from snapchain.image.qcow2.references import host_offsets, whole_l1
from snapchain.image.qcow2.tables import ImageFd
from snapchain.merge.amendment.write import Disk, Pending
from snapchain.merge.prove import check_refcounts

_OLD = 1_000_000_000


class _Shadow(ImageFile):
    """Nobody else can write to it."""

    def changed(self) -> bool:
        return False


@contextmanager
def shadow(file: ImageFile, fd: int, pending: Pending, *, below: Sequence[ImageFile]) -> Iterator[ImageChain]:
    """The chain of the file behind `fd` as it will be, on open files `below`.

    file: as it was scanned; fd: open for reading; pending: (file offset, bytes), in this order. Its counts are judged.
    Errors as `scan`; Corrupt for reference counts that would be too low.
    """
    memory = os.memfd_create("snapchain-shadow")
    try:
        with os_errors(file.path):
            _copy_tables(fd, memory, pending, subject=file.path)
            long_ago = time.time_ns() - _OLD
            os.utime(memory, ns=(long_ago, long_ago))
    except BaseException:
        os.close(memory)
        raise
    with _Shadow(Place(file.path, file.real_path), memory, format="qcow2", budget=RunBudget()) as image:
        check_refcounts(image, leaks=True)
        # From here on its data are wanted, and they are in the file itself.
        os.dup2(fd, memory, inheritable=False)
        image.device = file.device
        yield ImageChain([*below, image], owned=False)


def same_map(one: ImageFile, other: ImageFile) -> bool:
    """Whether two files show the same in the same places."""
    mine, theirs = one.physical, other.physical
    return mine.size == theirs.size and all(
        np.array_equal(left, right)
        for left, right in (
            (mine.start, theirs.start),
            (mine.kind, theirs.kind),
            (mine.host, theirs.host),
            (mine.stored, theirs.stored),
        )
    )


def _copy_tables(fd: int, memory: int, pending: Pending, *, subject: object) -> None:
    size = file_bytes(fd)
    os.ftruncate(memory, size)

    def copy(offset: int, length: int) -> None:
        length = min(length, size - offset)
        if length > 0:
            write_all(memory, pread(fd, length, offset=offset, subject=subject), offset)

    def apply() -> None:
        for offset, piece in pending:
            write_all(memory, piece, offset)

    old = Disk(fd, subject=subject).image().header
    copy(0, old.cluster_size)
    copy(*old.bitmap_directory)
    apply()
    header = read_header(memory, subject=subject)
    image = ImageFd(memory, size, header, subject)
    for each in (old, header):
        _copy_roots(copy, each)
    apply()
    for block in refcount_table(ImageFd(fd, size, header, subject)).tolist():
        copy(block, header.cluster_size if block else 0)
    for table in host_offsets(whole_l1(image)).tolist():
        copy(table, header.cluster_size if table else 0)
    apply()


def _copy_roots(copy: Callable[[int, int], None], header: Qcow2Header) -> None:
    fields = header.fields
    copy(fields.refcount_table_offset, fields.refcount_table_clusters * header.cluster_size)
    copy(fields.l1_table_offset, fields.l1_size * 8)
