"""The stretches of two chains that are equal without reading: both show one place, or the same compressed bytes.

A pair is a stretch of the guest that each of two chains takes from one stretch of one file.  One place is the same
offset of the same file, or offsets of two files whose blocks are the very same blocks of the disk (`fiemap`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from snapchain.image.chain import ImageChain
from snapchain.image.fiemap import DiskMap, disk_map, same_blocks
from snapchain.image.file import ImageFile
from snapchain.image.physical import Int32s, Int64s, Mask
from snapchain.image.pieces import Pieces, joined_runs, pieces_of
from snapchain.image.pread import file_bytes, pread
from snapchain.model.extents import Extents, distinct


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Columns of equal length, ascending by guest. `one`, `other`: of the two chains, as in `Pieces`."""

    guest: Int64s
    length: Int64s
    one: Int32s
    one_host: Int64s
    one_stored: Int32s
    other: Int32s
    other_host: Int64s
    other_stored: Int32s
    whole: Mask

    def __len__(self) -> int:
        return len(self.guest)

    def __getitem__(self, chosen: Mask | Int64s | slice) -> Pairs:
        return Pairs(
            self.guest[chosen],
            self.length[chosen],
            self.one[chosen],
            self.one_host[chosen],
            self.one_stored[chosen],
            self.other[chosen],
            self.other_host[chosen],
            self.other_stored[chosen],
            self.whole[chosen],
        )

    def joined(self) -> Pairs:
        """Plain neighbours that continue in the guest and in both files, joined."""
        keys = [self.one, self.other, self.one_host - self.guest, self.other_host - self.guest]
        first, length = joined_runs(keys, self.guest, self.length)
        rows = self[first]
        return Pairs(
            rows.guest,
            length,
            rows.one,
            rows.one_host,
            rows.one_stored,
            rows.other,
            rows.other_host,
            rows.other_stored,
            rows.whole,
        )

    def cut(self, size: int) -> Pairs:
        """Plain pairs, none longer than `size`."""
        parts = np.maximum(-(-self.length // size), 1)
        row = np.repeat(np.arange(len(self)), parts)
        skip = (np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)) * size
        rows = self[row]
        return Pairs(
            rows.guest + skip,
            np.minimum(rows.length - skip, size),
            rows.one,
            rows.one_host + skip,
            rows.one_stored,
            rows.other,
            rows.other_host + skip,
            rows.other_stored,
            rows.whole,
        )

    def rows(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """(guest, length, number and offset of one file, number and offset of the other)."""
        columns = (self.guest, self.length, self.one, self.one_host, self.other, self.other_host)
        return zip(*(column.tolist() for column in columns), strict=True)


def pairs_of(wanted: Extents, one: ImageChain, other: ImageChain) -> Pairs:
    """The pairs behind the DATA of `wanted`, where both chains have DATA."""
    left = pieces_of(wanted, one.resolve(), one.files)
    right = pieces_of(wanted, other.resolve(), other.files)
    guest = distinct(left.guest, right.guest)
    if not len(guest):
        none = np.empty(0, np.int64)
        less = none.astype(np.int32)
        return Pairs(none, none, less, none, less, less, none, less, none.astype(np.bool_))
    mine, my_host, my_end = _at(left, guest)
    theirs, their_host, their_end = _at(right, guest)
    stop = np.minimum(my_end, their_end)
    whole = left.whole[mine] & right.whole[theirs] & (left.guest[mine] == right.guest[theirs]) & (my_end == their_end)
    return Pairs(
        guest,
        stop - guest,
        left.file[mine],
        my_host,
        left.stored[mine],
        right.file[theirs],
        their_host,
        right.stored[theirs],
        whole,
    )


def _at(pieces: Pieces, guest: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """(row, place in its file, end of the piece) at guest offsets, all of which some piece covers."""
    row = np.searchsorted(pieces.guest, guest, side="right") - 1
    skip = np.where(pieces.stored[row] == 0, guest - pieces.guest[row], 0)
    return row, pieces.host[row] + skip, pieces.guest[row] + pieces.length[row]


def same_place(pairs: Pairs, one: ImageChain, other: ImageChain) -> Mask:
    """Which pairs are one place, plain or compressed. Queries filesystems that share extents and report them."""
    alike = (pairs.one_stored == pairs.other_stored) & ((pairs.one_stored == 0) | pairs.whole)
    proven = np.zeros(len(pairs), np.bool_)
    maps: dict[tuple[int, int], DiskMap | None] = {}
    for number in distinct(pairs.one).tolist():
        of_one = alike & (pairs.one == number)
        for other_number in distinct(pairs.other[of_one]).tolist():
            rows = np.flatnonzero(of_one & (pairs.other == other_number))
            file, other_file = one.files[number], other.files[other_number]
            if not _one_reading(file, other_file, squeezed=bool(pairs.one_stored[rows].any())):
                rows = rows[pairs.one_stored[rows] == 0]
            length = np.where(pairs.one_stored[rows] > 0, pairs.one_stored[rows], pairs.length[rows]).astype(np.int64)
            if file.device == other_file.device:
                proven[rows] = pairs.one_host[rows] == pairs.other_host[rows]
                continue
            mine, theirs = _mapped(file, maps), _mapped(other_file, maps)
            if mine is not None and theirs is not None:
                proven[rows] = same_blocks(mine, pairs.one_host[rows], theirs, pairs.other_host[rows], length)
    return proven


def _mapped(file: ImageFile, maps: dict[tuple[int, int], DiskMap | None]) -> DiskMap | None:
    if file.device not in maps:
        maps[file.device] = disk_map(file.fileno(), size=file_bytes(file.fileno()))
    return maps[file.device]


def _one_reading(one: ImageFile, other: ImageFile, *, squeezed: bool) -> bool:
    """Whether equal compressed bytes are equal clusters."""
    return not squeezed or (one.compression == other.compression and one.cluster_size == other.cluster_size)


def equal_compressed(pairs: Pairs, one: ImageChain, other: ImageChain) -> Mask:
    """Which pairs are whole compressed clusters with equal stored bytes. (Others may still read the same.)"""
    equal = np.zeros(len(pairs), np.bool_)
    alike = pairs.whole & (pairs.one_stored > 0) & (pairs.one_stored == pairs.other_stored)
    for row in np.flatnonzero(alike).tolist():
        file, other_file = one.files[int(pairs.one[row])], other.files[int(pairs.other[row])]
        if _one_reading(file, other_file, squeezed=True):
            stored = int(pairs.one_stored[row])
            mine = _stored(file, int(pairs.one_host[row]), stored)
            equal[row] = mine == _stored(other_file, int(pairs.other_host[row]), stored) and bool(mine)
    return equal


def _stored(file: ImageFile, offset: int, length: int) -> bytes:
    """A compressed cluster's bytes; the last sector of a file may be cut off, which reads as zeroes."""
    held = min(length, file_bytes(file.fileno()) - offset)
    return pread(file.fileno(), held, offset=offset, subject=file.path).ljust(length, b"\0") if held > 0 else b""
