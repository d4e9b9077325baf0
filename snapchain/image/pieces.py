"""The file bytes behind the guest bytes of a view, as numpy columns: one row for each stretch of one file.

A row is plain (its bytes lie in the file as they are) or part of a compressed cluster.  Guest bytes that read as
zeroes have no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snapchain.image.file import ImageFile
from snapchain.image.physical import Int32s, Int64s, Mask, Physical
from snapchain.model.extents import DATA, Extents, distinct, pairwise


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Columns of equal length, ascending by guest, without overlap. Offsets and lengths in bytes.

    file:   number of the file in the chain
    host:   plain: where the bytes begin in that file; compressed: where the cluster's compressed data begins
    stored: 0 for plain; for a compressed cluster the upper bound of its compressed bytes
    whole:  compressed: the piece is the whole visible part of the cluster
    """

    guest: Int64s
    length: Int64s
    file: Int32s
    host: Int64s
    stored: Int32s
    whole: Mask

    def __len__(self) -> int:
        return len(self.guest)

    def __getitem__(self, chosen: Mask | Int64s) -> Pieces:
        return Pieces(
            self.guest[chosen],
            self.length[chosen],
            self.file[chosen],
            self.host[chosen],
            self.stored[chosen],
            self.whole[chosen],
        )


def pieces_of(wanted: Extents, view: Extents, files: Sequence[ImageFile]) -> Pieces:
    """The pieces behind the DATA of `wanted`, as `view` (DATA: number of the owner) shows it. Both of one size."""
    at, want, owner = pairwise(wanted, view)
    chosen = (want >= DATA) & (owner >= DATA)
    start, stop = at[chosen], np.append(at[1:], np.int64(view.size))[: len(at)][chosen]
    owner = owner[chosen]
    del at, want, chosen
    parts = [
        _of_file(files[number].physical, start[mine], stop[mine], number)
        for number in distinct(owner).tolist()
        if len(mine := np.flatnonzero(owner == number))
    ]
    if not parts:
        none = np.empty(0, np.int64)
        return Pieces(none, none, none.astype(np.int32), none, none.astype(np.int32), none.astype(np.bool_))
    if len(parts) == 1:
        return parts[0]
    joined = Pieces(
        np.concatenate([part.guest for part in parts]),
        np.concatenate([part.length for part in parts]),
        np.concatenate([part.file for part in parts]),
        np.concatenate([part.host for part in parts]),
        np.concatenate([part.stored for part in parts]),
        np.concatenate([part.whole for part in parts]),
    )
    del parts
    return joined[np.argsort(joined.guest, kind="stable")]


def _of_file(physical: Physical, start: Int64s, stop: Int64s, number: int) -> Pieces:
    """The ranges [start, stop) of one file, all DATA there, cut at the ends of its runs."""
    first = np.searchsorted(physical.start, start, side="right") - 1
    count = np.searchsorted(physical.start, stop, side="left") - first
    before = np.cumsum(count) - count
    row = np.repeat(np.arange(len(start)), count)
    run = first[row] + (np.arange(len(row)) - before[row])
    begins, ends = physical.start[run], physical.ends[run]
    guest = np.maximum(begins, start[row])
    end = np.minimum(ends, stop[row])
    stored = physical.stored[run]
    host = physical.host[run]
    host += np.where(stored == 0, guest - begins, 0)
    whole = (guest == begins) & (end == ends)
    return Pieces(guest, end - guest, np.full(len(row), number, np.int32), host, stored, whole)


def joined_runs(
    keys: Sequence[npt.NDArray[np.int64] | npt.NDArray[np.int32]], start: Int64s, length: Int64s
) -> tuple[Int64s, Int64s]:
    """(first row, length) of rows joined where `start` continues and all `keys` equal the row before."""
    if not len(start):
        return np.empty(0, np.int64), length
    fresh = np.empty(len(start), np.bool_)
    fresh[0] = True
    fresh[1:] = start[1:] != start[:-1] + length[:-1]
    for key in keys:
        fresh[1:] |= key[1:] != key[:-1]
    first = np.flatnonzero(fresh)
    return first, np.add.reduceat(length, first)
