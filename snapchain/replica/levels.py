"""How hard to compress: as hard as costs no time.

Frames wait in a short queue for the link.  While it is full, the link is the bottleneck and processors have time: the
level rises.  While it is empty, the processors are: it falls, but never so far that more bytes would travel than
`zstd -3` makes of the same data.  Where both ends are one machine there is no link to save.
"""

from __future__ import annotations

from enum import Enum

LADDER = (5, 6, 7, 9, 12)
"""Levels of zstd. Above 12 each percent saved costs more time than any link takes for it."""
_FIRST = LADDER.index(9)
_UP, _DOWN = 2, 4
"""Frames in a row that must find the queue full, or empty, before the level changes. It begins high and rises soon:
what went over a slow link at a low level cannot be had back, and a fast link loses some tenths of a second.
"""


class Link(Enum):
    """What lies between the two ends."""

    LOCAL = "local"
    NETWORK = "network"


class Levels:
    """The level for the next frame. Asked from any thread; told by the one that fills the queue."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._rung = _FIRST
        self._seen = 0

    @property
    def level(self) -> int | None:
        """Of zstd; None for no compression."""
        return None if self._link is Link.LOCAL else LADDER[self._rung]

    def queue_seen(self, fullness: float) -> None:
        """fullness: from 0 to 1, of the queue when a frame was put into it."""
        step = 1 if fullness >= 1 else -1 if fullness <= 0 else 0
        self._seen = self._seen + step if step * self._seen >= 0 else step
        if not step:
            self._seen = 0
        if self._seen >= _UP or self._seen <= -_DOWN:
            self._rung = max(0, min(len(LADDER) - 1, self._rung + step))
            self._seen = 0
