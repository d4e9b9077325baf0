"""Carrying out an amendment, each step on the disk before the next relies on it.

1  data into new clusters (and, for commit, over what is hidden), new L2 tables, their reference counts
2  where the counts do not fit into the old blocks: the header points to new ones, by one write of one sector
3  entries in L2 tables that were there, then those of the L1 table
4  for a commit onto a disk of another size: size and L1 table, by one write of one sector
5  the backing link (`relink`)
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator

from snapchain.host.os_errors import os_errors
from snapchain.image.assemble.move import Moved, Mover, OnBytes
from snapchain.image.assemble.threads import spread
from snapchain.image.inplace.amendment import Amendment
from snapchain.image.inplace.counting import NewCounts, count_new
from snapchain.image.inplace.disk import Disk
from snapchain.image.inplace.link import header_head, relink as new_link
from snapchain.image.inplace.overwrite_check import check_harmless
from snapchain.image.inplace.shadow import Pending
from snapchain.image.inplace.tables import Tables
from snapchain.image.pread import write_all
from snapchain.image.qcow2.format import CryptMethod
from snapchain.image.qcow2.references import whole_l1

_STEP = 1 << 20
_REFCOUNT_TABLE = struct.Struct(">QI")
_REFCOUNT_TABLE_AT = 48
_SIZE_AND_L1 = struct.Struct(">QIIQ")
_SIZE_AT = 24
"""size, crypt_method, l1_size, l1_table_offset: all in the first sector."""

Prove = Callable[[Pending], None]


def fill(
    amendment: Amendment,
    fd: int,
    *,
    subject: object = None,
    on_bytes: OnBytes = lambda _count: None,
    prove: Prove = lambda _pending: None,
) -> Moved:
    """Add what the file lacks; it is on the disk when this returns.

    fd: the target, open for reading and writing, locked against all others; it stays the caller's. on_bytes: told of
    bytes of `amendment.bytes_moved` as they are done, one call at a time. prove: called when all data are there and
    nothing points to them, with what is still to be written; what it raises ends this, and only leaks are left.

    Raises Unavailable (disk full or failing), Corrupt (a source's data); the view is the same then.
    """
    check_harmless(amendment)
    disk = Disk(fd, subject=subject)
    image = disk.image()
    tables = Tables(amendment, image, whole_l1(image))
    counts = count_new(image, start=amendment.end, end=tables.end)
    disk.truncate(max(counts.end, disk.size))
    mover = Mover(amendment.view.files, fd, subject=subject, on_bytes=on_bytes)
    # Clusters that the file already has hold something: there a source's hole is zeroes to be written.
    new = amendment.copies.target >= amendment.end
    mover.run(amendment.copies[new])
    mover.run(amendment.copies[~new], onto_zeroes=False)
    _unpack(amendment, mover, fd)
    for at, length in zip(amendment.zero_target.tolist(), amendment.zero_length.tolist(), strict=True):
        for done in range(0, length, _STEP):
            disk.write(bytes(min(_STEP, length - done)), at + done)
    for offset, table in tables.fresh():
        disk.write(table, offset)
    for offset, block in counts.writes:
        disk.write(block, offset)
    with disk.syncing():  # the proof reads what is being flushed
        sector = bytes(disk.first_sector())
        with_counts = _with_counts(sector, counts)
        with_size = _with_size(with_counts, amendment, tables)
        steps = (
            [(0, with_counts)] if with_counts != sector else [],
            list(tables.changed()),
            list(tables.l1_entries()),
            [(0, with_size)] if with_size != with_counts else [],
        )
        prove([write for step in steps for write in step])
    for step in steps:
        for offset, piece in step:
            disk.write(piece, offset)
        if step:
            disk.sync()
    return mover.moved


def relink(amendment: Amendment, fd: int, *, subject: object = None) -> None:
    """Record the new backing file; on the disk when this returns. Raises Unsupported without room."""
    disk = Disk(fd, subject=subject)
    link = new_link(header_head(fd, subject=subject), amendment.backing, subject=subject)
    if link.text:
        disk.write(link.text, link.text_offset)
        disk.sync()
    disk.write(link.sector, 0)
    disk.sync()


def _with_counts(sector: bytes, counts: NewCounts) -> bytes:
    """The first sector, pointing to new reference counts where there are such."""
    if counts.table_offset is None:
        return sector
    changed = bytearray(sector)
    _REFCOUNT_TABLE.pack_into(changed, _REFCOUNT_TABLE_AT, counts.table_offset, counts.table_clusters)
    return bytes(changed)


def _with_size(sector: bytes, amendment: Amendment, tables: Tables) -> bytes:
    """Only a commit changes it. What is behind the old end, or the new one, is hidden by the files above."""
    assert amendment.file.header is not None
    if amendment.view.size == amendment.file.header.size:
        return sector
    changed = bytearray(sector)
    _SIZE_AND_L1.pack_into(changed, _SIZE_AT, amendment.view.size, CryptMethod.NONE, tables.l1_size, tables.l1_offset)
    return bytes(changed)


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
