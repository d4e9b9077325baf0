"""A place for every changed cluster that stores anything: the host cluster that it has already, else a new one.

A cluster has a place though nothing shows it where it was made beforehand, reads as zeroes, or holds data in some of
its subclusters only.  New ones come at the end of the file, in guest order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from snapchain.image.chain import ImageChain
from snapchain.image.file import ImageFile
from snapchain.image.physical import Int64s, Mask
from snapchain.image.pieces import joined_runs
from snapchain.image.qcow2.aligned import aligned
from snapchain.image.qcow2.format import COMPRESSED
from snapchain.image.qcow2.references import host_offsets, whole_l1
from snapchain.image.qcow2.tables import ImageFd, UInt64s, read_clusters
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, covering, distinct, pairwise, rounded, where

_TABLES_BYTES = 2 << 20


@dataclass(frozen=True, slots=True, eq=False)
class ClusterAllocation:
    """cluster: int64[n], guest clusters whose entries change, ascending; host: the place of each, 0 for none.

    dropped: bool[n], entries behind the end of the old or the new disk, which must go
    runs: (guest start, guest stop, place) of what has a place, in runs; used_before: bool, the place is no new one
    end: of the file, rounded up to clusters; there new_clusters begin
    """

    cluster: Int64s
    host: Int64s
    dropped: Mask
    runs: tuple[Int64s, Int64s, Int64s]
    used_before: Mask
    end: int
    new_clusters: int


def allocate_clusters(image: ImageFd, change: Cells, *, size: int) -> ClusterAllocation:
    """size: virtual, of the result."""
    step = image.header.cluster_size
    cluster = _numbers(change.changed, step)
    stores = where(change.changed, rounded(_data(change.content), step))
    needs = np.zeros(len(cluster), np.bool_)
    needs[np.searchsorted(cluster, _numbers(stores, step))] = True
    l1 = whole_l1(image)
    old_end = -(-image.header.size // step)
    host = np.zeros(len(cluster), np.int64)
    stale: list[Int64s] = []
    for first, stop, entries in _tables(image, l1, _wanted_tables(image, l1, cluster, size)):
        low, high = np.searchsorted(cluster, [first, stop])
        here = entries[cluster[low:high] - first]
        plain = ((here & np.uint64(COMPRESSED)) == 0) & (cluster[low:high] < old_end)
        host[low:high] = np.where(plain, host_offsets(here), 0)
        beyond = max(min(old_end, -(-size // step)) - first, 0)
        stale.append(np.flatnonzero(entries[beyond:]) + beyond + first)
    host[~needs] = 0
    new = needs & (host == 0)
    end = -(-image.size // step) * step
    count = int(new.sum())
    host[new] = end + np.arange(count) * step
    runs, used_before = _runs(cluster[needs] * step, host[needs], new[needs], step)
    gone = np.concatenate(stale) if stale else np.empty(0, np.int64)
    gone = gone[~_among(gone, cluster)]
    dropped = np.zeros(len(cluster), np.bool_)
    if len(gone):
        order = np.argsort(np.concatenate([cluster, gone]), kind="stable")
        cluster = np.concatenate([cluster, gone])[order]
        host = np.concatenate([host, np.zeros(len(gone), np.int64)])[order]
        dropped = np.concatenate([dropped, np.ones(len(gone), np.bool_)])[order]
    return ClusterAllocation(cluster, host, dropped, runs, used_before, end, count)


def behind_end(image: ImageFd, placed: ClusterAllocation, *, size: int) -> tuple[Int64s, Int64s]:
    """(place, length) of what the last cluster holds behind the end of the disk, where it is not new.

    QEMU fills that from a longer backing file when it copies on write, and hides it when the disk grows: but only as
    long as it stands on a longer one.
    """
    step = image.header.cluster_size
    number, inside = divmod(size, step)
    at = int(np.searchsorted(placed.cluster, number))
    if at < len(placed.cluster) and placed.cluster[at] == number:
        host = int(placed.host[at])
    else:
        host = _place_now(image, number)
    if not inside or not 0 < host < placed.end:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.array([host + inside], np.int64), np.array([step - inside], np.int64)


def _place_now(image: ImageFd, number: int) -> int:
    """Of a guest cluster that is stored plain; 0 for any other."""
    l1 = whole_l1(image)
    table, row = divmod(number, image.header.guest_bytes_per_l2 // image.header.cluster_size)
    if table >= len(l1) or not l1[table]:
        return 0
    entries = read_clusters(image, host_offsets(l1[table : table + 1]))[0]
    entry = entries[row * 2 if image.header.extended_l2 else row]
    return 0 if entry & np.uint64(COMPRESSED) else int(host_offsets(np.array([entry], np.uint64))[0])


def _runs(guest: Int64s, host: Int64s, new: Mask, step: int) -> tuple[tuple[Int64s, Int64s, Int64s], Mask]:
    """Neighbours in guest and file joined to runs; for each whether its place was used before."""
    row, length = joined_runs([host - guest, new.astype(np.int32)], guest, np.full(len(guest), step, np.int64))
    begins = guest[row]
    return (begins, begins + length, host[row]), ~new[row]


def _among(some: Int64s, ascending: Int64s) -> Mask:
    if not len(ascending):
        return np.zeros(len(some), np.bool_)
    found: Mask = ascending[np.minimum(np.searchsorted(ascending, some), len(ascending) - 1)] == some
    return found


def _data(content: Extents) -> Extents:
    held = content.val >= DATA
    return covering(content.size, content.at[held], content.ends[held])


def _numbers(chosen: Extents, step: int) -> Int64s:
    """The clusters of whole ones, ascending."""
    held = chosen.val >= DATA
    first = chosen.at[held] // step
    count = -(-chosen.ends[held] // step) - first
    run = np.repeat(np.arange(len(first)), count)
    numbers: Int64s = first[run] + np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count)
    return numbers


def _wanted_tables(image: ImageFd, l1: UInt64s, cluster: Int64s, size: int) -> Int64s:
    """The L1 entries whose tables matter: of changed clusters, and all behind the old or the new end."""
    per_table = image.header.guest_bytes_per_l2 // image.header.cluster_size
    number = cluster // per_table
    touched = number[np.append(True, number[1:] != number[:-1])] if len(number) else number
    if size != image.header.size:
        behind = min(size, image.header.size) // image.header.guest_bytes_per_l2
        touched = distinct(touched, np.arange(behind, len(l1)))
    within = touched[touched < len(l1)]
    there: Int64s = within[l1[within] != 0]
    return there


def _tables(image: ImageFd, l1: UInt64s, wanted: Int64s) -> Iterator[tuple[int, int, UInt64s]]:
    """(first cluster, one past the last, entries) of each wanted L2 table; with subclusters a non-empty bitmap of an
    entry without a place counts as an entry.
    """
    size = image.header.cluster_size
    per_table = image.header.guest_bytes_per_l2 // size
    batch = max(1, _TABLES_BYTES // size)
    for begin in range(0, len(wanted), batch):
        part = wanted[begin : begin + batch]
        for number, table in zip(part.tolist(), read_clusters(image, host_offsets(l1[part])), strict=True):
            entries = table
            if image.header.extended_l2:
                entries = table[0::2] | (table[1::2] != 0).astype(np.uint64)
            yield number * per_table, (number + 1) * per_table, entries


# --- What each cell of the target has, and what it is to have; a cell is a cluster, or a subcluster.
#
#     zero     it is to read as zeroes: an entry without a place (or, in the root, none at all)
#     kept     it is stored plain already: what other files show in it is written over it (only for commit: the files
#              above hide that until the switch)
#     fresh    it is stored nowhere, or compressed: all of it is written, into a new cluster or into room that its
#              cluster has already
#
# Only clusters in which another input decides what is seen can change at all.

_ABSENT, _ZERO, _PLAIN, _PACKED = range(4)
"""What the target has in a cell."""


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Maps of the view's size: DATA for the chosen bytes, ABSENT for all others.

    changed: whole clusters whose entries change; fresh: cells to be filled; over: bytes to be written in cells that
    are kept; content: what the cells of changed clusters then are (ABSENT, ZERO, DATA)
    """

    changed: Extents
    fresh: Extents
    over: Extents
    content: Extents


def cells(view: ImageChain, target: int, merged: Extents, *, rooted: bool) -> Cells:
    """merged: all inputs composed, by owner; rooted: the result has no backing file."""
    file = view.files[target]
    assert file.header is not None
    size = file.cluster_size
    foreign = merged.mapped(np.where((merged.val == ABSENT) | (merged.val == target), ABSENT, DATA))
    wanted = where(aligned(merged, view.resolve(), cluster_size=file.grain), rounded(foreign, size))
    at, want, has = pairwise(wanted, _held(file, view.size))
    del wanted
    stop = np.append(at[1:], np.int64(view.size))[: len(at)]
    data, zero = want >= DATA, want == ZERO
    if file.header.version == 2 and not rooted:
        # Version 2 has no entry that reads as zeroes on a backing file: a cluster that is a hole of the file does.
        data, zero = data | zero, np.zeros(len(at), np.bool_)
    fresh, kept = data & (has != _PLAIN), data & (has == _PLAIN)
    new_zero = zero & (has != _ZERO) & ~((has == _ABSENT) & rooted)
    content = np.where(data, DATA, np.where(zero & (not rooted or has == _ZERO), ZERO, ABSENT)).astype(np.int64)

    def mask(chosen: Mask) -> Extents:
        return covering(view.size, at[chosen], stop[chosen])

    changes = fresh | new_zero
    head = at[changes] // size * size
    tail = np.minimum(-(-stop[changes] // size) * size, view.size)
    return Cells(
        covering(view.size, head, tail),
        mask(fresh),
        where(mask(kept), foreign),
        Extents(view.size, at, want).mapped(content),
    )


def _held(file: ImageFile, size: int) -> Extents:
    """What each cell has, up to another size; a last cell that is cut by the file's end counts as whole."""
    physical = file.physical
    if not len(physical):
        return Extents.constant(size, _ABSENT)
    kind = np.where(physical.stored > 0, _PACKED, np.where(physical.kind == DATA, _PLAIN, _ZERO))
    kind = np.where(physical.kind == ABSENT, _ABSENT, kind).astype(np.int64)
    held = Extents(physical.size, physical.start, kind).mapped(kind)
    return held.resized(min(end_of_last_cell(file), size), int(kind[-1])).resized(size, _ABSENT)


def end_of_last_cell(file: ImageFile) -> int:
    """Where the cell ends that the virtual size cuts; of compressed data all of the cluster."""
    physical = file.physical
    grain = file.cluster_size if len(physical) and physical.stored[-1] else file.grain
    return -(-file.size // grain) * grain


def cut(start: Int64s, length: Int64s, runs: tuple[Int64s, Int64s]) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """Ranges cut at the edges of runs (starts, stops), which hold all of them: (range, run, start, length) of each."""
    begins, ends = runs
    first = np.searchsorted(begins, start, side="right") - 1
    count = np.searchsorted(begins, start + length, side="left") - first
    row = np.repeat(np.arange(len(start)), count)
    run = first[row] + np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    at = np.maximum(begins[run], start[row])
    return row, run, at, np.minimum(ends[run], (start + length)[row]) - at
