"""Partition tables: MBR with its chain of logical partitions, and GPT, as Linux numbers them.

    LBA 0          LBA 1        LBA 2 ..
    [MBR       ]   [GPT header] [entries of 128 bytes]      p1, p2, ...
      4 entries; one of type 5, f or 85 leads to a chain of tables with the logical partitions p5, p6, ...

Everything here is hostile: counts are bounded, and a partition that does not lie within the disk is left out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

Read = Callable[[int, int], bytes]
"""(offset, length) -> bytes; fewer at the end of the disk."""

_MBR = 510
_SIGNATURE = b"\x55\xaa"
_EXTENDED = {0x05, 0x0F, 0x85}
_PROTECTIVE = 0xEE
_MOST_LOGICAL = 128
_MOST_ENTRIES = 1024
_SECTORS = (512, 4096)


class Partition(NamedTuple):
    """name: p1, p2, ...; start, size: bytes"""

    name: str
    start: int
    size: int


def partitions(read: Read, size: int) -> list[Partition]:
    """The partitions of a disk of `size` bytes, by number; none where it has no table."""
    for sector in _SECTORS:
        found = _gpt(read, size, sector)
        if found is not None:
            return found
    return [*_mbr(read, size)]


def _fits(start: int, length: int, size: int) -> bool:
    return 0 < start < size and 0 < length <= size - start


def _gpt(read: Read, size: int, sector: int) -> list[Partition] | None:
    """None where there is no GPT of this sector size."""
    for place in (sector, size - sector):  # the second is the spare copy at the end
        header = read(place, 92)
        if len(header) == 92 and header.startswith(b"EFI PART"):
            break
    else:
        return None
    entries, count, width = struct.unpack_from("<QII", header, 72)
    if not 128 <= width <= 4096:
        return []
    table = read(entries * sector, min(count, _MOST_ENTRIES) * width) if entries * sector < size else b""
    found = []
    for number in range(len(table) // width):
        first, last = struct.unpack_from("<QQ", table, number * width + 32)
        is_used = any(table[number * width : number * width + 16])
        start, length = first * sector, (last + 1 - first) * sector
        if is_used and _fits(start, length, size):
            found.append(Partition(f"p{number + 1}", start, length))
    return found


def _mbr(read: Read, size: int) -> Iterator[Partition]:
    table = _table(read(0, 512))
    if table is None or any(kind == _PROTECTIVE for kind, _, _ in table):
        return
    chain = 0
    for number, (kind, first, count) in enumerate(table, 1):
        if kind in _EXTENDED:
            chain = chain or first
        elif kind and _fits(first * 512, count * 512, size):
            yield Partition(f"p{number}", first * 512, count * 512)
    at = chain
    seen = set()
    for number in range(5, 5 + _MOST_LOGICAL):
        if not at or at in seen or at * 512 >= size:
            return
        seen.add(at)
        logical = _table(read(at * 512, 512))
        if logical is None:
            return
        kind, first, count = logical[0]
        if kind and _fits((at + first) * 512, count * 512, size):
            yield Partition(f"p{number}", (at + first) * 512, count * 512)
        following, beyond, _ = logical[1]
        at = chain + beyond if following in _EXTENDED else 0


def _table(block: bytes) -> list[tuple[int, int, int]] | None:
    """(type, first sector, sectors) of the four entries; None where the block is no partition table."""
    if len(block) < 512 or block[_MBR:512] != _SIGNATURE:
        return None
    rows = [block[446 + 16 * each : 462 + 16 * each] for each in range(4)]
    if any(row[0] not in {0, 0x80} for row in rows):  # the first sector of a FAT or NTFS has the signature too
        return None
    return [(row[4], *struct.unpack_from("<II", row, 8)) for row in rows]
