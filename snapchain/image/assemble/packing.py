"""Compressed clusters that travel as they are.

One that survives whole, in a result with the same cluster size and compression method, is copied without being
unpacked.  Its neighbours in the source file come along in the same copy: what touches in the source keeps its
distances.  Of two methods the one of more bytes stays, since a qcow2 file has one; the others are unpacked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from snapchain.image.assemble.copies import Copies
from snapchain.image.assemble.pieces import Pieces
from snapchain.image.file import ImageFile
from snapchain.image.physical import Int32s, Int64s, Mask
from snapchain.image.qcow2.format import SECTOR, CompressionType
from snapchain.image.qcow2.layout import Packed

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
    # A cluster that the old disk's end cuts may hold anything behind it; cut at the new end, nobody sees that.
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
