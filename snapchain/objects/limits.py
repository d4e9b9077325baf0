"""How large an object may be, by its kind: the one place where that is decided.

Every store applies it to every read, counts while it reads, and never trusts a size that it was told.  Writers keep to
it as well, so nothing is stored that could not be read again: see repository/envelope.py, which also bounds what a
record unpacks to.
"""

from __future__ import annotations

from snapchain.errors import Corrupt

_KIB, _MIB = 1 << 10, 1 << 20

LARGEST_OBJECT = 257 * _MIB
"""Bytes. Of an object of no kind that is listed here."""
LARGEST: dict[str, int] = {
    "config": 64 * _KIB,
    "keys": 64 * _KIB,
    "witness": 4 * _KIB,
    "leases": 16 * _MIB,
    "disks": 16 * _MIB,
    "index": 65 * _MIB,
    "layers": 64 * _MIB,
    "packs": 132 * _MIB,
}
"""First segment of a name -> bytes. A pack has at most 128 MiB, or one blob of 4 MiB that found no room in another."""
MOST_LISTED: dict[str, int] = {"keys": 10_000, "leases": 100_000, "disks": 1_000_000, "index": 100_000}
"""First segment of a prefix -> names that a listing of it may have."""
LONGEST_LISTING = 2_000_000
"""Names that any other listing may have: it is held in memory. Packs of 16 MiB would be 30 TiB, of 128 MiB 240 TiB."""
LARGEST_LISTED_SIZE = 1 << 53
"""Bytes. A larger object cannot be, on any store."""


def largest(name: str) -> int:
    """Bytes that an object of this name may have."""
    return LARGEST.get(name.partition("/")[0], LARGEST_OBJECT)


def most_listed(prefix: str) -> int:
    """Names that the listing of a prefix may have."""
    return MOST_LISTED.get(prefix.partition("/")[0], LONGEST_LISTING)


def check_size(name: str, size: int, *, subject: str) -> int:
    """`size`, when so many bytes of this object may be held in memory. Raises Corrupt."""
    if size > largest(name):
        raise Corrupt(f"it has {size} bytes; at most {largest(name)} are plausible", subject=subject)
    return size
