"""Carrying out an amendment, each step on the disk before the next relies on it.

1  data into new clusters (and, for commit, over what is hidden), new L2 tables, their reference counts
2  where the counts do not fit into the old blocks: the header points to new ones, by one write of one sector
3  entries in L2 tables that were there, then those of the L1 table
4  the backing link (`relink`)
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator

import numpy as np

from snapchain.errors import Corrupt
from snapchain.host.os_errors import os_errors
from snapchain.image.assemble.move import Moved, Mover, OnBytes
from snapchain.image.assemble.threads import spread
from snapchain.image.inplace.amendment import Amendment
from snapchain.image.inplace.counting import NewCounts, count_new
from snapchain.image.inplace.disk import Disk
from snapchain.image.inplace.link import relink as new_link
from snapchain.image.physical import Int64s
from snapchain.image.positioned import write_all
from snapchain.image.pread import pread
from snapchain.image.qcow2.format import COPIED, SECTOR
from snapchain.image.qcow2.references import host_offsets, whole_l1
from snapchain.image.qcow2.tables import ImageFd, UInt64s

_STEP = 1 << 20
_REFCOUNT_TABLE = struct.Struct(">QI")
_REFCOUNT_TABLE_AT = 48
_HEAD_AT_MOST = 64 << 10


def fill(amendment: Amendment, fd: int, *, subject: object = None, on_bytes: OnBytes = lambda _count: None) -> Moved:
    """Add what the file lacks; it is on the disk when this returns.

    fd: the target, open for reading and writing, locked against all others; it stays the caller's. on_bytes: told of
    bytes of `amendment.bytes_moved` as they are done, one call at a time.

    Raises Unavailable (disk full or failing), Corrupt (a source's data); the view is the same then.
    """
    disk = Disk(fd, subject=subject)
    image = disk.image()
    l1 = whole_l1(image)
    tables = _Tables(amendment, l1)
    new_end = amendment.end + amendment.new_clusters * amendment.cluster_size + tables.new_bytes
    counts = count_new(image, start=amendment.end, end=new_end)
    disk.truncate(max(counts.end, disk.size))
    mover = Mover(amendment.view.files, fd, subject=subject, on_bytes=on_bytes)
    mover.run(amendment.copies)
    _unpack(amendment, mover, fd)
    for at, length in zip(amendment.zero_target.tolist(), amendment.zero_length.tolist(), strict=True):
        for done in range(0, length, _STEP):
            disk.write(bytes(min(_STEP, length - done)), at + done)
    for offset, table in tables.fresh():
        disk.write(table, offset)
    for offset, block in counts.writes:
        disk.write(block, offset)
    disk.sync()
    _switch_counts(disk, counts)
    for offset, piece in tables.changed(image):
        disk.write(piece, offset)
    disk.sync()
    for offset, piece in tables.l1_entries(image):
        disk.write(piece, offset)
    disk.sync()
    return mover.moved


def relink(amendment: Amendment, fd: int, *, subject: object = None) -> None:
    """Let the file stand on its new backing file; on the disk when this returns. Raises Unsupported without room."""
    disk = Disk(fd, subject=subject)
    header = disk.image().header
    size = min(header.cluster_size, _HEAD_AT_MOST)
    link = new_link(pread(fd, size, offset=0, subject=subject), amendment.backing, subject=subject)
    if link.text:
        disk.write(link.text, link.text_offset)
        disk.sync()
    disk.write(link.sector, 0)
    disk.sync()


def _switch_counts(disk: Disk, counts: NewCounts) -> None:
    if counts.table_offset is not None:
        sector = disk.first_sector()
        _REFCOUNT_TABLE.pack_into(sector, _REFCOUNT_TABLE_AT, counts.table_offset, counts.table_clusters)
        disk.write(sector, 0)
        disk.sync()


def _unpack(amendment: Amendment, mover: Mover, fd: int) -> None:
    """Read parts of compressed clusters as a guest would, and store them plain."""
    local = threading.local()

    def unpack(job: tuple[int, int, int, int]) -> None:
        number, guest, target, length = job
        buffer = getattr(local, "buffer", None)
        if buffer is None:
            buffer = local.buffer = memoryview(bytearray(_STEP))
        part = buffer[:length]
        amendment.view.files[number].read_into(guest, part)
        with os_errors(amendment.file.path):
            write_all(fd, part, target)
        mover.count(copied=length)

    spread(_unpack_jobs(amendment), unpack)


def _unpack_jobs(amendment: Amendment) -> Iterator[tuple[int, int, int, int]]:
    columns = (
        amendment.unpack_file, amendment.unpack_guest, amendment.unpack_target, amendment.unpack_length,
    )  # fmt: skip
    for number, guest, target, length in zip(*(column.tolist() for column in columns), strict=True):
        for done in range(0, length, _STEP):
            yield number, guest + done, target + done, min(_STEP, length - done)


class _Tables:
    """The L2 tables that change, and those that come; each is a cluster of entries."""

    def __init__(self, amendment: Amendment, l1: UInt64s) -> None:
        self._size = amendment.cluster_size
        self._per_table = self._size // 8
        number = amendment.cluster // self._per_table
        self._cuts = [*np.flatnonzero(np.diff(number, prepend=-1)).tolist(), len(number)]
        self._number = number
        self._within = amendment.cluster % self._per_table
        self._entry = amendment.entry
        used = number[self._cuts[:-1]] if len(number) else number
        if len(used) and int(used[-1]) >= len(l1):
            raise Corrupt("the L1 table is shorter than the disk", subject=amendment.file.path)
        old = host_offsets(l1[used])
        # A table that would only say that nothing is here need not be made.
        needed = np.array([bool(self._rows(part)[1].any()) for part in range(len(used))], np.bool_)
        self._new = (old == 0) & needed
        begin = amendment.end + amendment.new_clusters * self._size
        self._offset: Int64s = np.where(self._new, begin + (np.cumsum(self._new) - 1) * self._size, old)
        self._used = used
        self.new_bytes = int(self._new.sum()) * self._size

    def _rows(self, part: int) -> tuple[Int64s, UInt64s]:
        rows = slice(self._cuts[part], self._cuts[part + 1])
        return self._within[rows], self._entry[rows]

    def fresh(self) -> Iterator[tuple[int, bytes]]:
        """(file offset, bytes) of new tables, which nothing points to yet."""
        for part in np.flatnonzero(self._new).tolist():
            table = np.zeros(self._per_table, ">u8")
            within, entry = self._rows(part)
            table[within] = entry
            yield int(self._offset[part]), table.tobytes()

    def changed(self, image: ImageFd) -> Iterator[tuple[int, bytes]]:
        """(file offset, bytes): the sectors of old tables in which entries change."""
        for part in np.flatnonzero(~self._new & (self._offset != 0)).tolist():
            within, entry = self._rows(part)
            first = int(within[0]) * 8 // SECTOR * SECTOR
            stop = -(-(int(within[-1]) + 1) * 8 // SECTOR) * SECTOR
            offset = int(self._offset[part])
            old = pread(image.fd, stop - first, offset=offset + first, subject=image.subject)
            table = np.frombuffer(old, ">u8").copy()
            table[within - first // 8] = entry
            yield offset + first, table.tobytes()

    def l1_entries(self, image: ImageFd) -> Iterator[tuple[int, bytes]]:
        """(file offset, bytes) of the entries that point to new tables."""
        base = image.header.fields.l1_table_offset
        for part in np.flatnonzero(self._new).tolist():
            entry = int(self._offset[part]) | COPIED
            yield base + int(self._used[part]) * 8, entry.to_bytes(8, "big")
