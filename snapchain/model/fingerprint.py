"""Recognises a file without reading it: stored in records, sent to replicas, and noted beside images.

Equal inode, size and mtime mean equal content: a write moves the mtime.  Two cases would deceive:

- a whole-second mtime (a coarse clock, or a time that a copy or a restore has set): then the ctime must be equal too;
- a write in the same tick of the clock as the stat: image/file.py waits until the mtime is older than a tick.

ctime alone would be too strict: libvirt changes the owner of backing files, and so their ctime, at every start.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

SECOND_NS = 1_000_000_000
_END_OF_TIME = 1 << 94
"""Beyond 64 bits of seconds: some filesystems keep any such time."""


class Fingerprint(BaseModel):
    """inode, size in bytes (as stat gives it; 0 for a block device), mtime and ctime in nanoseconds since 1970."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inode: int = Field(ge=0, lt=1 << 64)
    size: int = Field(ge=0, lt=1 << 63)
    mtime_ns: int = Field(ge=-_END_OF_TIME, lt=_END_OF_TIME)
    ctime_ns: int = Field(ge=-_END_OF_TIME, lt=_END_OF_TIME)

    @property
    def is_coarse(self) -> bool:
        """Whether the mtime is a whole second, so that two writes may share it."""
        return self.mtime_ns % SECOND_NS == 0

    @property
    def content_key(self) -> tuple[int, int, int, int]:
        """(inode, size, mtime, ctime or 0): equal for two looks at one file with no write between."""
        return (self.inode, self.size, self.mtime_ns, self.ctime_ns if self.is_coarse else 0)

    def same_content_as(self, other: Fingerprint) -> bool:
        """Whether no write happened between two looks at one file."""
        return self.content_key == other.content_key


def same_file(mine: object, theirs: object) -> bool:
    """Whether both are fingerprints of one regular file that nobody has written to in between.

    A block device is never recognised: its node does not show that it was written to.
    """
    if not isinstance(mine, Fingerprint) or not isinstance(theirs, Fingerprint) or not mine.size:
        return False
    return mine.same_content_as(theirs)


SHORT_KEY_BYTES = 8
"""A short key is only compared with one file at one position, so 64 bits are enough."""
_FIELDS = struct.Struct("<QQqqqq")
_LOW = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class ShortKey:
    """A file, by a hash of its fingerprint: what is recorded where a layer has too many files to list in full."""

    raw: bytes


def short_key(source: Fingerprint) -> ShortKey:
    """Equal for two looks at a file between which nothing was written to it."""
    from blake3 import blake3  # inside: `inspect` needs no hash

    inode, size, mtime, ctime = source.content_key
    times = (mtime >> 32, mtime & _LOW, ctime >> 32, ctime & _LOW)
    return ShortKey(blake3(_FIELDS.pack(inode, size, *times)).digest(SHORT_KEY_BYTES))
