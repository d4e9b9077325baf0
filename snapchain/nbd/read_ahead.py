"""Which blocks a client will want next: read off the requests of its connection. Blocks without data do not count.

requests   [0][1]  [7]  [2] [3]          of a guest that boots, of a copy: several streams, interleaved
stream 1   0 1 2 3 -> fetch 4 to 7       each time that half of the window is used, the next one is twice as long
stream 2   7                             one request is no stream
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST = 2
"""Blocks of the first window."""
_STREAMS = 8
_SLACK = 4
"""Blocks: requests that are sent at once arrive in any order."""


@dataclass(slots=True, eq=False)
class _Stream:
    """next: the block that should come; reach: the block up to which all was fetched; window: in blocks, 0 so far"""

    next: int
    reach: int
    window: int


class ReadAhead:
    """Of one connection. Not thread-safe. most: blocks of a window at most; 0 fetches nothing ahead"""

    def __init__(self, most: int) -> None:
        self._most = most
        self._streams: list[_Stream] = []

    def wanted(self, first: int, stop: int) -> tuple[int, int] | None:
        """A request reads blocks [first, stop): the blocks [begin, end) to fetch ahead, None for none."""
        streams = self._streams
        stream = next((each for each in streams if -_SLACK <= first - each.next <= _SLACK), None)
        if stream is None:
            streams.append(_Stream(stop, stop, 0))
            del streams[:-_STREAMS]
            return None
        if stream is not streams[-1]:  # the least recently used one goes first
            streams.remove(stream)
            streams.append(stream)
        if stop <= stream.next:
            return None
        stream.next = stop
        stream.reach = max(stream.reach, stop)
        if stream.reach - stop > stream.window // 2 or not self._most:
            return None
        stream.window = min(self._most, max(FIRST, 2 * stream.window))
        begin, stream.reach = stream.reach, max(stream.reach, stop + stream.window)
        return (begin, stream.reach) if begin < stream.reach else None
