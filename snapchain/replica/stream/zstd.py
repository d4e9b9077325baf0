"""zstd frames that hold exactly as many bytes as was said before; nothing else is unpacked."""

from __future__ import annotations

import threading

import zstandard

from snapchain.errors import Corrupt
from snapchain.host.batches import Buffer

_local = threading.local()


def packed(data: Buffer, *, level: int) -> bytes:
    """One zstd frame that names its content size."""
    kept: dict[int, zstandard.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    compressor = kept.get(level)
    if compressor is None:
        compressor = kept[level] = zstandard.ZstdCompressor(level=level)
    return compressor.compress(data)


def unpacked(data: Buffer, length: int, *, subject: str) -> bytes:
    """The content of one zstd frame, `length` bytes. Raises Corrupt when it holds more, less, or is none."""
    try:
        # What the frame claims decides how much memory is taken, so it is read first.
        claimed = zstandard.frame_content_size(data)
        if claimed != length:
            raise Corrupt(f"compressed bytes claim to hold {claimed}, not {length}", subject=subject)
        plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Corrupt(f"compressed bytes cannot be unpacked: {error}", subject=subject) from error
    if len(plain) != length:
        raise Corrupt(f"compressed bytes hold {len(plain)}, not {length}", subject=subject)
    return plain
