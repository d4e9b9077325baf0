"""Making the file that `plan` has laid out: data first, then the tables, then the header that makes it an image."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

from snapchain.errors import InvalidInput
from snapchain.image.assemble.move import JOB, Moved, Mover, OnBytes
from snapchain.image.assemble.plan import Assembly
from snapchain.image.assemble.threads import spread
from snapchain.image.qcow2.write import Qcow2Writer

_STEP = 1 << 20


def run(assembly: Assembly, fd: int, *, subject: object = None, on_bytes: OnBytes = lambda _count: None) -> Moved:
    """Write a new file; it is on the disk when this returns.

    fd: a new empty file, open for reading and writing; it stays the caller's. on_bytes: told of bytes of
    `assembly.bytes_moved` as they are done, from several threads, one at a time.

    Raises Unavailable (disk full or failing), Corrupt (a source's data); then the file has no header yet.
    """
    if os.lseek(fd, 0, os.SEEK_END):
        raise InvalidInput("a new image is only written to an empty file", subject=subject)
    with Qcow2Writer(fd, assembly.layout, subject=subject) as writer:
        mover = Mover(assembly.view.files, fd, subject=subject, on_bytes=on_bytes)
        mover.run(assembly.plain)
        mover.run(assembly.squeezed)
        _unpack(assembly, writer, mover)
    return mover.moved


def _unpack(assembly: Assembly, writer: Qcow2Writer, mover: Mover) -> None:
    """Read parts of compressed clusters as a guest would, and store them plain."""
    local = threading.local()

    def unpack(job: tuple[int, int, int]) -> None:
        number, guest, length = job
        buffer = getattr(local, "buffer", None)
        if buffer is None:
            buffer = local.buffer = memoryview(bytearray(_STEP))
        for at in range(guest, guest + length, _STEP):
            part = buffer[: min(_STEP, guest + length - at)]
            assembly.view.files[number].read_into(at, part)
            writer.write(at, part)
            mover.count(copied=len(part))

    spread(_unpack_jobs(assembly), unpack)


def _unpack_jobs(assembly: Assembly) -> Iterator[tuple[int, int, int]]:
    for number, guest, length in zip(
        assembly.unpack_file.tolist(), assembly.unpack_guest.tolist(), assembly.unpack_length.tolist(), strict=True
    ):
        for at in range(guest, guest + length, JOB):
            yield number, at, min(JOB, guest + length - at)
