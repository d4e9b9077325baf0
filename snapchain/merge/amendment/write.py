"""Carrying out an amendment, each step on the disk before the next relies on it.

1  data into new clusters (and, for commit, over what is hidden), new L2 tables, their reference counts
2  where the counts do not fit into the old blocks: the header points to new ones, by one write of one sector
3  entries in L2 tables that were there, then those of the L1 table
4  for a commit onto a disk of another size: size and L1 table, by one write of one sector
5  the backing link (`relink`)
"""

from __future__ import annotations

import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from snapchain.errors import Corrupt, Unsupported
from snapchain.host.batches import Buffer
from snapchain.host.os_errors import os_errors
from snapchain.image.pread import file_bytes, pread, write_all
from snapchain.image.qcow2.format import SECTOR, CryptMethod
from snapchain.image.qcow2.header import read_header
from snapchain.image.qcow2.refcounts import counts_per_block, pack_counts, stored_blocks
from snapchain.image.qcow2.references import references, whole_l1
from snapchain.image.qcow2.tables import ImageFd
from snapchain.image.threads import spread
from snapchain.merge.amendment.link import header_head, relink as new_link
from snapchain.merge.amendment.plan import Amendment, check_overwrites
from snapchain.merge.amendment.tables import NewCounts, Tables, count_new
from snapchain.merge.copying import Moved, Mover, OnBytes

_STEP = 1 << 20
_REFCOUNT_TABLE = struct.Struct(">QI")
_REFCOUNT_TABLE_AT = 48
_SIZE_AND_L1 = struct.Struct(">QIIQ")
_SIZE_AT = 24
"""size, crypt_method, l1_size, l1_table_offset: all in the first sector."""

Pending = Sequence[tuple[int, bytes]]
"""(file offset, bytes), to be written in this order."""
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

    fd: the target, open for reading and writing, locked against all others; it stays the caller's
    on_bytes: called with the bytes of `amendment.bytes_moved` that were just done, one call at a time
    prove: called when all data are there and nothing points to them, with what is still to be written; what it raises
        ends this, and only leaks are left

    Raises Unavailable (disk full or failing), Corrupt (a source's data); the view is the same then.
    """
    check_overwrites(amendment)
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


def detach(fd: int, *, subject: object = None) -> None:
    """Make an image that shows nothing of its backing file a plain one, without bitmaps, by one write of one sector.

    fd: open for reading and writing; the image is open nowhere else. On the disk when this returns
    """
    disk = Disk(fd, subject=subject)
    disk.sync()
    link = new_link(header_head(fd, subject=subject), None, subject=subject, keeps_bitmaps=False)
    disk.write(link.sector, 0)
    disk.sync()
    settle(fd, subject=subject)


def _with_counts(sector: bytes, counts: NewCounts) -> bytes:
    """The first sector, pointing to new reference counts where there are any."""
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


# --- The file that is changed: every write of tables, every flush and every change of its length goes through here.
#
# (Guest data is brought by a Mover, through the same descriptor, and is flushed here.)


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


# --- Reference counts made exact, and the file cut behind its last used cluster.
#
# Needs nothing but the file, so it is what is left to do after a crash, too.  Counts that are too low are raised first.


def settle(fd: int, *, subject: object = None) -> int:
    """Make the counts of an open image exact, and cut it off; the bytes that were cut off.

    fd: open for reading and writing; the image is open nowhere else


    Raises Corrupt for tables that lie outside the file, or clusters without a place for their count.
    """
    disk = Disk(fd, subject=subject)
    image = disk.image()
    exact = references(image)
    _write_counts(disk, image, exact.astype(np.uint64))
    size = image.header.cluster_size
    used = np.flatnonzero(exact)
    end = (int(used[-1]) + 1) * size
    before = disk.size
    if end < before:
        disk.truncate(end)
        disk.sync()
    return max(before - end, 0)


def _write_counts(disk: Disk, image: ImageFd, exact: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
    bits = 1 << image.header.fields.refcount_order
    per_block = counts_per_block(image)
    counted = 0
    writes: list[tuple[int, bytes, bool]] = []
    for first, offset, stored in stored_blocks(image):
        wanted = np.zeros(per_block, np.uint64)
        piece = exact[first : first + per_block]
        wanted[: len(piece)] = piece
        counted += int((piece != 0).sum())
        if (wanted > stored).any():
            writes.append((offset, pack_counts(np.maximum(wanted, stored), bits), True))
        if (wanted != stored).any():
            writes.append((offset, pack_counts(wanted, bits), False))
    if counted != int((exact != 0).sum()):
        raise Corrupt(
            "some of its clusters have no reference count",
            subject=disk.subject,
            hint="`qemu-img check -r all` makes the counts anew",
        )
    for raising in (True, False):
        chosen = [(offset, block) for offset, block, raises in writes if raises is raising]
        for offset, block in chosen:
            disk.write(block, offset)
        if chosen:
            disk.sync()
