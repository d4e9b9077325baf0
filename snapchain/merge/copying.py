"""Copies from files of a chain into one file: the list, as numpy columns, and its execution."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache

import numpy as np

from snapchain.errors import Corrupt
from snapchain.host.directory import Directory
from snapchain.host.os_errors import os_errors
from snapchain.image.chain import ImageChain
from snapchain.image.file import ImageFile
from snapchain.image.holes import stored_range
from snapchain.image.physical import Int32s, Int64s, Mask
from snapchain.image.pieces import joined_runs
from snapchain.image.pread import file_bytes, pread_into, write_all
from snapchain.image.threads import spread
from snapchain.model.events import OnEvent, counting

SPARE = 1 << 20
"""Bytes of room for what the filesystem itself needs to record, beside what is copied."""


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Columns of equal length. file: number in the chain; source, target: file offsets; length: bytes."""

    file: Int32s
    source: Int64s
    target: Int64s
    length: Int64s

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, chosen: Mask | Int64s | slice) -> Copies:
        return Copies(self.file[chosen], self.source[chosen], self.target[chosen], self.length[chosen])

    @property
    def bytes(self) -> int:
        """Of all copies together."""
        return int(self.length.sum())

    def moved(self, offset: int) -> Copies:
        """With all targets moved up."""
        return replace(self, target=self.target + offset)

    def joined(self) -> Copies:
        """Neighbours that go on in the file and in the target, as one."""
        first, length = joined_runs([self.file, self.target - self.source], self.source, self.length)
        return Copies(self.file[first], self.source[first], self.target[first], length)

    @staticmethod
    def none() -> Copies:
        """Nothing to copy."""
        nothing = np.empty(0, np.int64)
        return Copies(nothing.astype(np.int32), nothing, nothing, nothing)

    @staticmethod
    def concatenated(*parts: Copies) -> Copies:
        """One list after another."""
        return Copies(
            np.concatenate([part.file for part in parts]),
            np.concatenate([part.source for part in parts]),
            np.concatenate([part.target for part in parts]),
            np.concatenate([part.length for part in parts]),
        )


# --- What the kernel does better than a loop of reads and writes: share extents, copy in place, write back early.
#
# Each returns whether the kernel did it; what it cannot do here (another filesystem, a device, an odd range) is not an
# error, since the caller has a slower way.  A full or failing disk is.  Source: Linux ioctl_ficlonerange(2),
# copy_file_range(2), sync_file_range(2).

FICLONERANGE = 0x4020940D
_CLONE = struct.Struct("=qQQQ")
_WRITE = 2
"""SYNC_FILE_RANGE_WRITE: begin to write dirty pages, wait for nothing."""


class Refusal(Enum):
    """Why a range was not shared."""

    NEVER = "this filesystem shares no extents"
    NOT_THIS_FILE = "the file lies elsewhere"
    NOT_THIS_RANGE = "the range does not fit"


_REFUSALS = {
    errno.EOPNOTSUPP: Refusal.NEVER,
    errno.ENOTTY: Refusal.NEVER,
    errno.ENOSYS: Refusal.NEVER,
    errno.EXDEV: Refusal.NOT_THIS_FILE,
    errno.EPERM: Refusal.NOT_THIS_FILE,
    errno.ETXTBSY: Refusal.NOT_THIS_FILE,
    errno.EISDIR: Refusal.NOT_THIS_FILE,
    errno.EBADF: Refusal.NOT_THIS_FILE,
    errno.EINVAL: Refusal.NOT_THIS_RANGE,
}
_COPY_ELSE = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EPERM, errno.ETXTBSY}


def share_range(source: int, source_offset: int, target: int, target_offset: int, length: int) -> Refusal | None:
    """Let `target` share extents of `source`; None when done. Raises OSError where the disk fails or is full."""
    try:
        fcntl.ioctl(target, FICLONERANGE, _CLONE.pack(source, source_offset, length, target_offset))
    except OSError as error:
        if error.errno in _REFUSALS:
            return _REFUSALS[error.errno]
        raise
    return None


def copy_range(source: int, source_offset: int, target: int, target_offset: int, length: int) -> int:
    """Copy inside the kernel; the number of bytes copied until it refused to go on, 0 where it refused at once."""
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(source, target, length - done, source_offset + done, target_offset + done)
        except OSError as error:
            if error.errno in _COPY_ELSE:
                break
            raise
        if not count:
            break
        done += count
    return done


def start_writing(fd: int, offset: int, length: int) -> None:
    """Begin to write a range back, so that the flush at the end finds little to do. Only a hint: errors come there."""
    call = _sync_file_range()
    if call is not None:
        call(fd, offset, length, _WRITE)


@cache
def _sync_file_range() -> ctypes._NamedFuncPointer | None:
    try:
        call = ctypes.CDLL(None).sync_file_range
    except AttributeError:
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def reporting(phase: str, total: int, on_event: OnEvent) -> OnBytes:
    """Report the beginning of a phase; call what is returned with the bytes that were just done."""
    on_bytes = counting(phase, total, on_event)
    on_bytes(0)
    return on_bytes


# --- Carrying out a list of copies: shared where the filesystem can, else copied in the kernel, else read and written.
#
# Sharing happens first, on one thread: the kernel locks the target for it.  It wants whole blocks, so an odd head or
# tail of a range is copied.  Copying is spread over threads in jobs of some MiB; holes of a source stay holes.  Memory
# is a buffer a thread, whatever the amount.

JOB = 8 << 20
_JOB_ROWS = 512
_BUFFER = 1 << 20
_CLONE_AT_MOST = 1 << 30
"""One call cannot be interrupted."""
_ODD_RANGES = 16
"""So many refusals in a row of ranges that fit, and a file is taken to be of a kind that is never shared."""

OnBytes = Callable[[int], None]


@dataclass(slots=True)
class Moved:
    """How the bytes went."""

    shared: int = 0
    copied: int = 0


class Mover:
    """Copies from files of a chain into one file. fd: open for reading and writing, the caller's."""

    def __init__(self, files: Sequence[ImageFile], fd: int, *, subject: object, on_bytes: OnBytes) -> None:
        self._files = files
        self._fd = fd
        self._subject = subject
        self._on_bytes = on_bytes
        self._lock = threading.Lock()
        self._local = threading.local()
        self._block = os.fstatvfs(fd).f_bsize
        self._ends = [file_bytes(file.fileno()) for file in files]
        self._sparse = [_sparse(file.fileno()) for file in files]
        self._skip_holes = True
        self.moved = Moved()

    def run(self, copies: Copies, *, onto_zeroes: bool = True) -> None:
        """Do all of them. Raises Unavailable (disk), Corrupt (a source ends early); then the target is not complete.

        onto_zeroes: the targets read as zeroes now, so holes of a source need not be copied.
        """
        self._skip_holes = onto_zeroes
        copies = self._inside(copies)
        with os_errors(self._subject):
            rest = self._share(copies)
            spread(_jobs(rest), self._copy)

    def _inside(self, copies: Copies) -> Copies:
        """Cut where a file ends inside the last sector of its last compressed cluster; the target has a hole there."""
        ends = np.array(self._ends, np.int64)[copies.file]
        over = copies.source + copies.length - ends
        if (over >= 512).any():
            wrong = int((over >= 512).argmax())
            subject = self._files[int(copies.file[wrong])].path
            raise Corrupt(f"the file is cut off before offset {int(copies.source[wrong])}", subject=subject)
        if not (over > 0).any():
            return copies
        missing = np.maximum(over, 0)
        self.count(copied=int(missing.sum()))
        return Copies(copies.file, copies.source, copies.target, copies.length - missing)

    def _share(self, copies: Copies) -> Copies:
        """Share what can be; what is left to copy, by place in the target."""
        block = self._block
        head = -copies.source % block
        middle = np.maximum(copies.length - head, 0) // block * block
        fits = ((copies.source - copies.target) % block == 0) & (middle > 0)
        rows = np.flatnonzero(fits)
        shared = np.zeros(len(copies), np.bool_)
        odd = [0] * len(self._files)
        columns = (copies.file, copies.source + head, copies.target + head, middle)
        for row, number, source, target, length in zip(
            rows.tolist(), *(column[rows].tolist() for column in columns), strict=True
        ):
            if odd[number] >= _ODD_RANGES:
                continue
            refusal = self._share_one(number, source, target, length)
            if refusal is None:
                shared[row] = True
                odd[number] = 0
                self.count(shared=length)
            elif refusal is Refusal.NEVER:
                break
            else:
                odd[number] = _ODD_RANGES if refusal is Refusal.NOT_THIS_FILE else odd[number] + 1
        if not shared.any():
            return copies
        ends = Copies.concatenated(
            Copies(copies.file, copies.source, copies.target, head)[shared],
            Copies(
                copies.file,
                copies.source + head + middle,
                copies.target + head + middle,
                copies.length - head - middle,
            )[shared],
            copies[~shared],
        )
        ends = ends[ends.length > 0]
        return ends[np.argsort(ends.target, kind="stable")]

    def _share_one(self, number: int, source: int, target: int, length: int) -> Refusal | None:
        fd = self._files[number].fileno()
        for done in range(0, length, _CLONE_AT_MOST):
            part = min(length - done, _CLONE_AT_MOST)
            refusal = share_range(fd, source + done, self._fd, target + done, part)
            if refusal is not None:
                return refusal
        return None

    def _copy(self, job: Copies) -> None:
        for number, source, target, length in _rows(job):
            for skip, part in self._stored(number, source, length):
                self._copy_one(number, source + skip, target + skip, part)
            self.count(copied=length)
        first = int(job.target[0])
        start_writing(self._fd, first, int(job.target[-1] + job.length[-1]) - first)

    def _stored(self, number: int, source: int, length: int) -> Iterator[tuple[int, int]]:
        """The parts of a range that are no holes of the file: (bytes before it, bytes)."""
        if not (self._skip_holes and self._sparse[number]):
            yield 0, length
            return
        file = self._files[number]
        at = source
        while at < source + length:
            found = stored_range(file.fileno(), at, size=source + length, subject=file.path)
            if found is None:
                return
            yield found[0] - source, found[1] - found[0]
            at = found[1]

    def _copy_one(self, number: int, source: int, target: int, length: int) -> None:
        file = self._files[number]
        done = copy_range(file.fileno(), source, self._fd, target, length)
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if done < length and buffer is None:
            buffer = self._local.buffer = memoryview(bytearray(_BUFFER))
        while done < length:
            assert buffer is not None
            part = buffer[: min(_BUFFER, length - done)]
            pread_into(file.fileno(), part, offset=source + done, subject=file.path)
            write_all(self._fd, part, target + done)
            done += len(part)

    def count(self, *, shared: int = 0, copied: int = 0) -> None:
        """Note bytes that are done. Thread-safe."""
        with self._lock:
            self.moved.shared += shared
            self.moved.copied += copied
            self._on_bytes(shared + copied)


def _sparse(fd: int) -> bool:
    status = os.fstat(fd)
    return stat.S_ISREG(status.st_mode) and status.st_blocks * 512 < status.st_size


def _rows(copies: Copies) -> Iterator[tuple[int, int, int, int]]:
    return zip(
        copies.file.tolist(), copies.source.tolist(), copies.target.tolist(), copies.length.tolist(), strict=True
    )


def _jobs(copies: Copies) -> Iterator[Copies]:
    """Long rows cut, short ones gathered; in the order of the list."""
    parts = np.maximum(-(-copies.length // JOB), 1)
    row = np.repeat(np.arange(len(copies)), parts)
    skip = (np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)) * JOB
    length = np.minimum(copies.length[row] - skip, JOB)
    cut = Copies(copies.file[row], copies.source[row] + skip, copies.target[row] + skip, length)
    total = np.cumsum(length)
    first = 0
    while first < len(row):
        reach = int(total[first] - length[first]) + JOB
        stop = max(first + 1, min(int(np.searchsorted(total, reach, side="right")), first + _JOB_ROWS))
        yield cut[first:stop]
        first = stop


def shares_extents(view: ImageChain, first: int) -> bool:
    """Whether new files beside the top can share the blocks of all the files from `first` on.

    Tried with one block and a file that never has a name.
    """
    try:
        with Directory.open(view.top.real_path.parent) as directory:
            block = os.fstatvfs(directory.fd).f_bsize
            probe = directory.create_unnamed()
    except OSError:  # no such files here, or no permission: then nothing is promised
        return False
    try:
        for file in view.files[first:]:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return False
            if status.st_size >= block and share_range(file.fileno(), 0, probe, 0, block) is not None:
                return False
    except OSError:  # a full or failing disk: the work itself meets and reports that
        return False
    finally:
        os.close(probe)
    return True
