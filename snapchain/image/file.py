"""One opened image file: its format, its map, and its bytes.

All checks are made when it is opened; later reads fail only for faults of the disk or another writer.
Reads are positioned, so any number of threads may share a file.
"""

from __future__ import annotations

import os
import stat
import threading
import time
import zlib
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from snapchain.errors import Busy, Corrupt, InvalidInput
from snapchain.host.path_resolution import Resolved
from snapchain.host.rights import Rights
from snapchain.image.backing import Place
from snapchain.image.holes import without_holes
from snapchain.image.physical import Physical, RunBudget
from snapchain.image.pread import file_bytes, pread, pread_into
from snapchain.image.qcow2.header import Backing, Qcow2Header, read_header
from snapchain.image.qcow2.mapping import map_image
from snapchain.image.qcow2.tables import ImageFd
from snapchain.image.raw import SECTOR, map_raw
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents
from snapchain.model.fingerprint import SECOND_NS, Fingerprint

Format = Literal["qcow2", "raw"]


class ImageFile:
    """An image file, open for reading; a context manager. Offsets and sizes in bytes.

    path: as QEMU would open it, absolute; real_path: with links resolved; chosen_by: see `Place`
    size: virtual size; cluster_size: 0 for raw; grain: the smallest piece that is allocated on its own
    fingerprint: taken before its tables were read; see `changed`
    """

    def __init__(self, place: Place, fd: int, *, format: Format, budget: RunBudget, is_written: bool = False) -> None:
        """Read the header and the map of `fd`, which the object owns from here on, even when this raises.

        is_written: it may change meanwhile
        """
        self._is_written = is_written
        self.path: Path = place.path
        self.real_path: Path = place.real
        self.chosen_by: Rights | None = place.chosen_by
        self.format: Format = format
        self.header: Qcow2Header | None = None
        self._fd = fd
        self._local = threading.local()
        try:
            self.fingerprint: Fingerprint = settle(fd)
            status = os.fstat(fd)
            self.device: tuple[int, int] = (status.st_dev, status.st_ino)
            self.physical: Physical = self._map(status, budget)
        except BaseException:
            self.close()
            raise

    def _map(self, status: os.stat_result, budget: RunBudget) -> Physical:
        file_size = file_bytes(self._fd)
        budget.grant(file_size if stat.S_ISBLK(status.st_mode) else status.st_blocks * 512)
        if self.format == "raw":
            physical = map_raw(self._fd, budget=budget, subject=self.path)
        else:
            self.header = read_header(self._fd, subject=self.path)
            physical = map_image(ImageFd(self._fd, file_size, self.header, self.path), budget=budget)
        if not self._is_written and self.changed():
            raise Busy("the file changes while it is read", subject=self.path, hint="stop its user first")
        return physical

    @property
    def size(self) -> int:
        """Virtual size."""
        return self.physical.size

    @property
    def cluster_size(self) -> int:
        """0 for raw."""
        return self.header.cluster_size if self.header else 0

    @property
    def grain(self) -> int:
        """Cluster, subcluster (extended L2) or sector (raw)."""
        return self.header.grain if self.header else SECTOR

    @property
    def compression(self) -> Literal["zlib", "zstd"]:
        """The method of its compressed clusters."""
        return self.header.compression if self.header else "zlib"

    @property
    def backing(self) -> Backing | None:
        """The backing link as recorded."""
        return self.header.backing if self.header else None

    @cached_property
    def extents(self) -> Extents:
        """The map of this file alone as ABSENT, ZERO and DATA; cached while the file is open."""
        return self.shown_extents()

    def shown_extents(self) -> Extents:
        """The map from its tables (`physical.extents()`), with holes of the file as ZERO; computed on each call."""
        if self.header is None:
            return self.physical.extents()  # by its holes already
        held = file_bytes(self._fd)
        return without_holes(self.physical, self._fd, file_bytes=held, grain=self.grain, subject=self.path)

    def changed(self) -> bool:
        """Whether the file was written to, or its name given to another file, since the map was read."""
        opened = os.fstat(self._fd)
        if not fingerprint_of(opened).same_content_as(self.fingerprint):
            return True
        try:
            named = self.real_path.lstat()
        except OSError:
            return True
        return (named.st_dev, named.st_ino) != self.device

    @property
    def resolved(self) -> Resolved:
        """Its path without links, and the user whose link chose it."""
        return Resolved(self.real_path, self.chosen_by)

    def check_may_be_changed(self) -> None:
        """Raises Unsupported where root is about to change a file that it reads through another user's link."""
        self.resolved.check_may_be_changed(self.path)

    def fileno(self) -> int:
        """The read-only descriptor, which this object closes."""
        return self._fd

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the guest bytes from `offset` on, none of which may be ABSENT here. Thread-safe.

        Raises Corrupt (compressed data, file cut off), Unavailable (the disk fails), InvalidInput (range not held).
        """
        view = buffer.cast("B")
        physical = self.physical
        if not 0 <= offset <= offset + len(view) <= physical.size:
            raise InvalidInput(f"bytes {offset}+{len(view)} are outside the image", subject=self.path)
        run = int(physical.start.searchsorted(offset, side="right")) - 1
        last = len(physical.start) - 1
        done = 0
        while done < len(view):
            start = int(physical.start[run])
            end = int(physical.start[run + 1]) if run < last else physical.size
            skip = offset + done - start
            part = view[done : done + end - start - skip]
            kind = int(physical.kind[run])
            if kind == DATA and physical.stored[run]:
                part[:] = self._unpacked(run)[skip : skip + len(part)]
            elif kind == DATA:
                pread_into(self._fd, part, offset=int(physical.host[run]) + skip, subject=self.path)
            elif kind == ZERO:
                part[:] = bytes(len(part))
            else:
                assert kind == ABSENT
                raise InvalidInput(f"guest offset {start + skip} is not in this file", subject=self.path)
            done += len(part)
            run += 1

    def _unpacked(self, run: int) -> memoryview:
        """A compressed cluster; the last one of each thread is kept, for reads smaller than a cluster."""
        kept: tuple[int, memoryview] | None = getattr(self._local, "kept", None)
        if kept is not None and kept[0] == run:
            return kept[1]
        guest, host = int(self.physical.start[run]), int(self.physical.host[run])
        length = int(self.physical.stored[run])
        # The last sector of the last compressed cluster may be cut off.
        length = min(length, file_bytes(self._fd) - host)
        if length <= 0:
            raise Corrupt(f"the file is cut off before the data of guest offset {guest}", subject=self.path)
        data = pread(self._fd, length, offset=host, subject=self.path)
        plain = decompress(
            data,
            self.cluster_size,
            compression=self.compression,
            place=f"offset {host} of the file, guest offset {guest},",
            subject=self.path,
        )
        view = memoryview(plain)
        self._local.kept = (run, view)
        return view

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --- The fingerprint (model/fingerprint.py) of an open file, taken when no write can hide behind its mtime.

_TICK = 20_000_000
"""Nanoseconds. The kernel stamps files by a clock that steps every 1 to 10 ms."""


def fingerprint_of(status: os.stat_result) -> Fingerprint:
    """From a stat of the open file."""
    return Fingerprint(
        inode=status.st_ino, size=status.st_size, mtime_ns=status.st_mtime_ns, ctime_ns=status.st_ctime_ns
    )


def settle(fd: int) -> Fingerprint:
    """The fingerprint of an open file, once no write can hide behind its mtime; sleeps at most a second."""
    found = fingerprint_of(os.fstat(fd))
    window = SECOND_NS if found.is_coarse else _TICK
    age = time.time_ns() - found.mtime_ns
    # An mtime well in the future needs no wait: a write would set it back to now.
    if -_TICK < age < window:
        time.sleep((window - max(age, 0)) / SECOND_NS)
        found = fingerprint_of(os.fstat(fd))
    return found


# --- Decompression of one cluster, bounded: never more output than a cluster, never a window above 8 MiB.
#
# A compressed cluster's end is known to the sector only, so bytes of the next one may follow it: decompression stops
# when the cluster is full, as in qcow2_zlib_decompress and qcow2_zstd_decompress (QEMU 7.2, block/qcow2-threads.c).

_RAW_DEFLATE_4K_WINDOW = -12
_MAX_ZSTD_WINDOW = 8 << 20
"""RFC 8878 asks decoders for this much; a qcow2 cluster has 2 MiB at most."""


def decompress(
    data: bytes, cluster_size: int, *, compression: Literal["zlib", "zstd"], place: str, subject: object
) -> bytes:
    """Exactly `cluster_size` bytes out of a compressed cluster, or Corrupt naming its place."""
    plain = _inflate(data, cluster_size) if compression == "zlib" else _unpack(data, cluster_size)
    if len(plain) != cluster_size:
        raise Corrupt(f"the compressed cluster at {place} does not unpack to {cluster_size} bytes", subject=subject)
    return plain


def _inflate(data: bytes, cluster_size: int) -> bytes:
    try:
        return zlib.decompressobj(_RAW_DEFLATE_4K_WINDOW).decompress(data, cluster_size)
    except zlib.error:
        return b""


def _unpack(data: bytes, cluster_size: int) -> bytes:
    import zstandard

    reader = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW).stream_reader(data, read_across_frames=True)
    plain = bytearray(cluster_size)
    view = memoryview(plain)
    done = 0
    try:
        while done < cluster_size and (count := reader.readinto(view[done:])):
            done += count
    except zstandard.ZstdError:
        return b""
    return bytes(view[:done])
