"""One file out of a run of neighbouring files, decided before a byte moves.

    files[first:] of the view   ->   what survives, where it lies, where it goes

The run's own maps are folded into one, rounded out to the clusters of the result, and laid out as a new file.  Every
DATA byte of that file has a source: plain bytes to copy, compressed clusters to copy as they are, or parts of
compressed clusters to unpack.  What fills a partial cluster up comes from the view, so from files below the run too.
Pure numpy: nothing is read or written.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from snapchain.errors import InvalidInput
from snapchain.host.os_errors import os_errors
from snapchain.image.chain import ImageChain
from snapchain.image.file import ImageFile
from snapchain.image.physical import Int32s, Mask
from snapchain.image.pieces import Pieces, joined_runs, pieces_of
from snapchain.image.pread import write_all
from snapchain.image.qcow2 import encode
from snapchain.image.qcow2.aligned import aligned
from snapchain.image.qcow2.format import (
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MIN_EXTENDED_L2_CLUSTER_BITS,
    SECTOR,
    SUBCLUSTERS,
    CompressionType,
    guest_bytes_per_l2,
)
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.layout import DEFAULT_CLUSTER_SIZE, Layout, Packed, plan as lay_out
from snapchain.image.threads import spread
from snapchain.merge.copying import JOB, Copies, Moved, Mover, OnBytes
from snapchain.model.extents import DATA, Extents, Int64s, fold


@dataclass(frozen=True, slots=True, eq=False)
class Assembly:
    """A merged file, planned. Bytes throughout.

    view:    the chain up to the uppermost input; first: number of the lowest input in it, 0 for the root
    layout:  of the new file
    plain:   copies of bytes as they are; squeezed: copies of compressed clusters as they are; targets are file offsets
    unpack_guest, unpack_length, unpack_file: ranges of compressed clusters that are stored plain in the result
    """

    view: ImageChain
    first: int
    layout: Layout
    plain: Copies
    squeezed: Copies
    unpack_guest: Int64s
    unpack_length: Int64s
    unpack_file: Int64s

    @property
    def geometry(self) -> Geometry:
        """The clusters of the result."""
        return Geometry(self.layout.cluster_size, self.layout.extended_l2)

    @property
    def bytes_moved(self) -> int:
        """Bytes that the new file takes from the old ones, shared or copied; unpacked ones as they are then."""
        return self.plain.bytes + self.squeezed.bytes + int(self.unpack_length.sum())

    @property
    def bytes_needed(self) -> int:
        """Room that the new file takes where nothing can be shared: its metadata and what moves."""
        return self.layout.metadata_bytes + self.bytes_moved


def merged_extents(view: ImageChain, first: int, *, in_place: int | None = None) -> Extents:
    """The composition of files[first:] alone; DATA is the number of the owner in the chain.

    in_place: number of a file that keeps what it has: what its tables call data is DATA, holes of the file or not
    """

    def own(number: int) -> Extents:
        # Not by file.extents, which a file keeps: with millions of extents tens of MiB.
        file = view.files[number]
        return file.physical.extents() if number == in_place else file.shown_extents()

    return fold(own(number).owned_by(number) for number in range(first, len(view.files)))


def plan_assembly(
    view: ImageChain,
    first: int,
    *,
    backing: Backing | None,
    cluster_size: int | None = None,
    extended_l2: bool | None = None,
) -> Assembly:
    """Plan one file that reads, on the file below `first`, as the whole view does.

    view: up to the uppermost input (`chain.at(last)`); backing: the link that the result records, None exactly when
    the root is among the inputs (first 0); cluster_size, extended_l2: chosen by the contributors unless given.

    Raises InvalidInput for a range that is none, or clusters that cannot hold the disk.
    """
    if not 0 <= first < len(view.files):
        raise InvalidInput(f"file {first} is none of the {len(view.files)} of the chain")
    if (backing is None) != (first == 0):
        raise InvalidInput("a merged file has a backing file exactly when the root is not among its inputs")
    merged = merged_extents(view, first)
    # Not by view.resolve(), which keeps it as long as the view.
    shown = merged_extents(view, 0) if first else merged
    geometry = choose_geometry(view.files, first, merged, cluster_size=cluster_size, extended_l2=extended_l2)
    target = aligned(merged, shown, cluster_size=geometry.grain)
    del merged
    pieces = pieces_of(target, shown, view.files)
    del shown
    kept, method = kept_compressed(pieces, view.files, size=view.size, cluster_size=geometry.cluster_size)
    packed, squeezed = pack(pieces[kept], method)
    layout = lay_out(
        target,
        cluster_size=geometry.cluster_size,
        backing=backing,
        extended_l2=geometry.extended_l2,
        packed=packed,
    )
    # With millions of extents each of these is tens of MiB.
    del target
    unpack = pieces[(pieces.stored > 0) & ~kept]
    if pieces.stored.any():
        pieces = pieces[pieces.stored == 0]
    first_row, length = joined_runs([unpack.file], unpack.guest, unpack.length)
    return Assembly(
        view,
        first,
        layout,
        _plain(pieces, layout),
        squeezed.moved(layout.packed_offset),
        unpack.guest[first_row],
        length,
        unpack.file[first_row].astype(np.int64),
    )


def _plain(pieces: Pieces, layout: Layout) -> Copies:
    """Where each piece goes. A piece lies within one DATA run of the result, so in one stretch of its file."""
    return Copies(pieces.file, pieces.host, layout.host_of(pieces.guest), pieces.length).joined()


# --- What clusters the merged file has, decided from what the inputs still contribute.
#
# The largest contributor's cluster size: most data then keeps its shape, and its compressed clusters fit.  Smaller
# cells of other layers that do not fill a cluster are filled up from the view below.  Subclusters survive: where a
# contributor has them, the result has them.


@dataclass(frozen=True, slots=True)
class Geometry:
    """cluster_size in bytes; extended_l2: each cluster has 32 subclusters."""

    cluster_size: int
    extended_l2: bool = False

    @property
    def grain(self) -> int:
        """The smallest piece that is allocated on its own, bytes."""
        return self.cluster_size // SUBCLUSTERS if self.extended_l2 else self.cluster_size


def surviving_bytes(merged: Extents, files: int) -> Int64s:
    """int64[files], DATA bytes that each file of the chain still gives to a composed map."""
    held = merged.val >= DATA
    total = np.zeros(files, np.int64)
    np.add.at(total, merged.val[held], merged.lengths[held])
    return total


def choose_geometry(
    files: Sequence[ImageFile],
    first: int,
    merged: Extents,
    *,
    cluster_size: int | None = None,
    extended_l2: bool | None = None,
) -> Geometry:
    """The clusters of a file that holds `merged`, the composition of files[first:]; what is given is not chosen."""
    share = surviving_bytes(merged, len(files))
    inputs = [number for number in range(first, len(files)) if files[number].header is not None]
    givers = [number for number in inputs if share[number]] or inputs[-1:]
    if extended_l2 is None:
        extended_l2 = any(header.extended_l2 for number in givers if (header := files[number].header))
    if cluster_size is not None:
        return Geometry(cluster_size, extended_l2)
    # Of equal ones the uppermost: most reads go there.
    largest = max(givers, key=lambda number: (int(share[number]), number), default=None)
    bits = (files[largest].cluster_size if largest is not None else DEFAULT_CLUSTER_SIZE).bit_length() - 1
    if extended_l2:
        bits = max(bits, MIN_EXTENDED_L2_CLUSTER_BITS)
    # A lower layer may have been much smaller than the disk is now.
    while bits < MAX_CLUSTER_BITS and _l1_bytes(merged.size, bits, extended_l2=extended_l2) > MAX_L1_BYTES:
        bits += 1
    return Geometry(1 << bits, extended_l2)


def _l1_bytes(size: int, bits: int, *, extended_l2: bool) -> int:
    return -(-size // guest_bytes_per_l2(bits, extended_l2=extended_l2)) * 8


# --- Compressed clusters that travel as they are.
#
# One that survives whole, in a result with the same cluster size and compression method, is copied without being
# unpacked.  Its neighbours in the source file come along in the same copy: what touches in the source keeps its
# distances.  Of two methods the one of more bytes stays, since a qcow2 file has one; the others are unpacked.

_METHODS = {"zlib": CompressionType.ZLIB, "zstd": CompressionType.ZSTD}
_SHARED_FROM = 64 << 10
_BLOCK = 4096
"""Chunks from _SHARED_FROM on keep their place within a block, so that the filesystem can share them."""


def kept_compressed(
    pieces: Pieces, files: Sequence[ImageFile], *, size: int, cluster_size: int
) -> tuple[Mask, CompressionType]:
    """Which pieces stay compressed in a file of `size` guest bytes, and the method of that file."""
    fits = pieces.whole & (pieces.stored > 0)
    fits &= np.array([file.cluster_size == cluster_size for file in files], np.bool_)[pieces.file]
    # A cluster that the old disk's end cuts may hold anything behind it; cut at the new end, that stays hidden.
    ends_here = np.array([file.size == size for file in files], np.bool_)[pieces.file]
    fits &= (pieces.length == cluster_size) | (ends_here & (pieces.guest + pieces.length == size))
    is_zstd = np.array([file.compression == "zstd" for file in files], np.bool_)[pieces.file]
    zstd = int(pieces.stored[fits & is_zstd].sum())
    zlib = int(pieces.stored[fits & ~is_zstd].sum())
    method = _METHODS["zstd" if zstd > zlib else "zlib"]
    return fits & (is_zstd == (method is CompressionType.ZSTD)), method


def pack(kept: Pieces, method: CompressionType) -> tuple[Packed, Copies]:
    """Lay out compressed clusters in one area; the copies' targets count from its start."""
    if not len(kept):
        return Packed.none(), Copies.none()
    order = np.lexsort((kept.host, kept.file))
    file, host = kept.file[order], kept.host[order]
    stop = host + kept.stored[order]
    # Neighbours share the sector in which one ends and the next begins; no chunk holds clusters of two files.
    fresh = np.ones(len(order), np.bool_)
    for begin, end in _stretches(file):
        stop[begin:end] = np.maximum.accumulate(stop[begin:end])
        fresh[begin + 1 : end] = host[begin + 1 : end] > stop[begin : end - 1]
    first = np.flatnonzero(fresh)
    source = host[first]
    length = stop[np.append(first[1:], len(stop)) - 1] - source
    target, area = _placed(source, length)
    position = np.empty(len(order), np.int64)
    position[order] = host + (target - source)[np.cumsum(fresh) - 1]
    packed = Packed(kept.guest, position, kept.stored.astype(np.int64), area, method)
    return packed, Copies(file[first], source, target, length)


def _stretches(file: Int32s) -> Iterator[tuple[int, int]]:
    """Where each file's rows begin and end; rows are sorted by file."""
    edges = np.flatnonzero(np.diff(file, prepend=-1, append=-1))
    yield from itertools.pairwise(edges.tolist())


def _placed(source: Int64s, length: Int64s) -> tuple[Int64s, int]:
    """Where each chunk begins, and where all end: at the source's place within a sector, or within a block."""
    grain = np.where(length >= _SHARED_FROM, _BLOCK, SECTOR)
    within = source % grain
    # Each chunk takes whole sectors or blocks of its own, so places are sums.
    room = -(-(within + length) // grain) * grain
    # Blocks first, in order, then sectors: no large chunk is set off by a small one before it.
    order = np.argsort(-grain, kind="stable")
    begins = np.empty(len(source), np.int64)
    begins[order] = np.cumsum(room[order]) - room[order]
    return begins + within, int(room.sum())


# --- Making the file that `plan` has laid out: data first, then the tables, then the header that makes it an image.
#
# Nothing is flushed in between: until the whole file is flushed, its temporary name is not taken for an image.

_STEP = 1 << 20


def write_assembly(
    assembly: Assembly, fd: int, *, subject: object = None, on_bytes: OnBytes = lambda _count: None
) -> Moved:
    """Write a new file; the caller flushes it before it is used.

    fd: a new empty file, open for reading and writing; it stays the caller's. on_bytes: called with the
    bytes of `assembly.bytes_moved` that were just done, from several threads, one call at a time.

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
