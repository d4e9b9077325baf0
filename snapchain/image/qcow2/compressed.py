"""Decompression of one cluster, bounded: never more output than a cluster, never a window above 8 MiB.

A compressed cluster's end is known to the sector only, so bytes of the next one may follow it: decompression stops
when the cluster is full, as in qcow2_zlib_decompress and qcow2_zstd_decompress (QEMU 7.2, block/qcow2-threads.c).
"""

from __future__ import annotations

import zlib
from typing import Literal

from snapchain.errors import Corrupt

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
