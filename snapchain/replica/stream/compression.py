"""zstd frames of an exact size, and the level that costs no time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

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


# --- The compression level: as high as costs no time.
#
# Frames wait in a short queue for the link. While the queue is full, the link is the bottleneck, and the level rises if
# processors are idle too. While it is empty, or processors are busy, the level falls, but never below a size that a
# stream of `zstd -3`, as rsync uses, would have. On one machine there is no link to save.

LADDER = (4, 5, 6, 9, 12)
"""Levels of zstd. Each costs some 1.5 times the one before and spares from 0.6 down to 0.1 % of the bytes."""
_FIRST = 0
_UP, _DOWN = 2, 4
"""Frames in a row that must find the queue full, or empty, before the level changes."""
_IDLE, _SHORT = 0.85, 0.6
"""Of the time that compressing takes, what a processor works on it: above the first there are processors to spare,
below the second others want them too, and the other end may be one of them."""
_WEIGHT = 1 / 16
"""Of the newest frame in what is held for that share."""


class Link(Enum):
    """What lies between the two ends."""

    LOCAL = "local"
    NETWORK = "network"


class Levels:
    """The level for the next frame. Read from any thread; the thread that fills the queue reports its fullness."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._rung = _FIRST
        self._seen = 0
        self._share = 1.0

    @property
    def level(self) -> int | None:
        """Of zstd; None for no compression."""
        return None if self._link is Link.LOCAL else LADDER[self._rung]

    @contextmanager
    def compressing(self) -> Iterator[int | None]:
        """The level for a frame that is compressed within the block, in one thread."""
        begun, worked = time.monotonic(), time.thread_time()
        yield self.level
        self.took(time.monotonic() - begun, time.thread_time() - worked)

    def took(self, wall: float, processor: float) -> None:
        """Compressing a frame took that many seconds, and so many of a processor."""
        # Two threads may do this at once, and one of the two be lost: it is a mean.
        if wall > 0:
            self._share += (min(1.0, processor / wall) - self._share) * _WEIGHT

    def queue_seen(self, fullness: float) -> None:
        """fullness: from 0 to 1, of the queue when a frame was put into it."""
        if fullness <= 0 or self._share < _SHORT:
            step = -1
        else:
            step = 1 if fullness >= 1 and self._share > _IDLE else 0
        self._seen = self._seen + step if step * self._seen >= 0 else step
        if not step:
            self._seen = 0
        if self._seen >= _UP or self._seen <= -_DOWN:
            self._rung = max(0, min(len(LADDER) - 1, self._rung + step))
            self._seen = 0
