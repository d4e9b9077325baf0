"""How hard to compress: as hard as costs no time.

Frames wait in a short queue for the link.  While it is full, the link is the bottleneck, and where processors have
time too, the level rises.  While it is empty, or processors are what is short, it falls, but never so far that more
bytes would travel than a stream of `zstd -3`, which is rsync's, makes of the same data.  Where both ends are one
machine there is no link to save.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

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
    """The level for the next frame. Asked from any thread; told of the queue by the one that fills it."""

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
