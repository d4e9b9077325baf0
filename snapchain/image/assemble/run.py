"""Making the file that `plan` has laid out: data first, then the tables, then the header that makes it an image.

Nothing is flushed between: until the whole file is, it has a temporary name that nobody takes for an image.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

from snapchain.errors import InvalidInput
from snapchain.host.os_errors import os_errors
from snapchain.image.assemble.move import JOB, Moved, Mover, OnBytes
from snapchain.image.assemble.plan import Assembly
from snapchain.image.assemble.threads import spread
from snapchain.image.pread import write_all
from snapchain.image.qcow2 import encode

_STEP = 1 << 20


def run(assembly: Assembly, fd: int, *, subject: object = None, on_bytes: OnBytes = lambda _count: None) -> Moved:
    """Write a new file; the caller flushes it before anybody relies on it.

    fd: a new empty file, open for reading and writing; it stays the caller's. on_bytes: told of bytes of
    `assembly.bytes_moved` as they are done, from several threads, one at a time.

    Raises Unavailable (disk full or failing), Corrupt (a source's data); then the file has no header yet.
    """
    header = encode.header(assembly.layout)
    if os.lseek(fd, 0, os.SEEK_END):
        raise InvalidInput("a new image is only written to an empty file", subject=subject)
    with os_errors(subject):
        os.ftruncate(fd, assembly.layout.file_bytes)
    mover = Mover(assembly.view.files, fd, subject=subject, on_bytes=on_bytes)
    mover.run(assembly.plain)
    mover.run(assembly.squeezed)
    _unpack(assembly, fd, mover, subject=subject)
    with os_errors(subject):
        for offset, table in encode.metadata(assembly.layout):
            write_all(fd, table, offset)
        write_all(fd, header, 0)
    return mover.moved


def _unpack(assembly: Assembly, fd: int, mover: Mover, *, subject: object) -> None:
    """Read parts of compressed clusters as a guest would, and store them plain."""
    local = threading.local()

    def unpack(job: tuple[int, int, int, int]) -> None:
        number, guest, host, length = job
        buffer = getattr(local, "buffer", None)
        if buffer is None:
            buffer = local.buffer = memoryview(bytearray(_STEP))
        for done in range(0, length, _STEP):
            part = buffer[: min(_STEP, length - done)]
            assembly.view.files[number].read_into(guest + done, part)
            with os_errors(subject):
                write_all(fd, part, host + done)
            mover.count(copied=len(part))

    spread(_unpack_jobs(assembly), unpack)


def _unpack_jobs(assembly: Assembly) -> Iterator[tuple[int, int, int, int]]:
    """(file, guest, where in the new file, bytes). A range lies within one DATA run of the result."""
    host = assembly.layout.host_of(assembly.unpack_guest)
    columns = (assembly.unpack_file, assembly.unpack_guest, host, assembly.unpack_length)
    for number, guest, target, length in zip(*(column.tolist() for column in columns), strict=True):
        for done in range(0, length, JOB):
            yield number, guest + done, target + done, min(JOB, length - done)
