"""The layout of a new qcow2 file, planned before its first byte is written.

    header | refcount table | refcount blocks | L1 | L2 tables | data clusters | compressed clusters

Metadata comes first and data follows in guest order, so a linear read of the guest is a linear read of the file.  No
cluster is left over, so `qemu-img check` finds neither errors nor leaks.  Pure: maps in, a frozen plan out, in numpy
passes over runs; `encode` turns the plan into table bytes, `write` puts them into a file.

Source: QEMU docs/interop/qcow2.txt; limits from block/qcow2.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from snapchain.errors import InvalidInput
from snapchain.image.qcow2.format import (
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_L2_CLUSTER_BITS,
    SECTOR,
    SUBCLUSTERS,
    CompressionType,
)
from snapchain.image.qcow2.header import Backing
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, Int64s, covering, where

DEFAULT_CLUSTER_SIZE = 64 * 1024
REFCOUNT_BYTES = 2


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Compressed clusters in one area of the file.

    guest:    int64[n], guest offsets, multiples of the cluster size, ascending
    position: int64[n], first byte of the compressed data, counted from the start of the area
    stored:   int64[n], upper bound of its length; ends on a sector when taken from another image
    area:     bytes of the area; whole runs copied from another image keep their distances within it
    method:   one for the whole file
    """

    guest: Int64s
    position: Int64s
    stored: Int64s
    area: int
    method: CompressionType = CompressionType.ZLIB

    @staticmethod
    def none() -> Packed:
        """No compressed clusters."""
        empty = np.empty(0, np.int64)
        return Packed(empty, empty, empty, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A qcow2 v3 file, placed.  All offsets and sizes in bytes; every offset is a multiple of `cluster_size`.

    extents:  the map that the file will have: DATA, ZERO (only with a backing file) or ABSENT; cut at `size`
    l2_index: int64[m], the L1 entries that have an L2 table; table j lies at l2_offset + j * cluster_size
    guest, host, length: int64[n], the plain DATA runs, ascending by guest and by host; ranges contiguous in the guest
              are contiguous in the file
    cluster_guest, cluster_stop, cluster_host: int64[k], the host clusters behind them, in runs
    """

    size: int
    cluster_size: int
    extended_l2: bool
    backing: Backing | None
    extents: Extents
    packed: Packed
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_blocks_offset: int
    refcount_blocks: int
    l1_offset: int
    l1_entries: int
    l2_offset: int
    l2_index: Int64s
    data_offset: int
    packed_offset: int
    file_bytes: int
    guest: Int64s
    host: Int64s
    length: Int64s
    cluster_guest: Int64s
    cluster_stop: Int64s
    cluster_host: Int64s

    @property
    def l2_entry_bytes(self) -> int:
        """8, or 16 with extended L2 entries."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table."""
        return self.cluster_size // self.l2_entry_bytes

    @property
    def metadata_bytes(self) -> int:
        """Bytes before the first data cluster."""
        return self.data_offset

    @property
    def data_bytes(self) -> int:
        """Guest bytes stored plain."""
        return int(self.length.sum())

    def host_of(self, offsets: Int64s) -> Int64s:
        """File offsets of many guest bytes; -1 where no plain data lies."""
        if not len(self.guest):
            return np.full(len(offsets), -1, np.int64)
        run = np.searchsorted(self.guest, offsets, side="right") - 1
        within = offsets - self.guest[run]
        held = (run >= 0) & (within < self.length[run])
        return np.where(held, self.host[run] + within, np.int64(-1))


def plan(
    extents: Extents,
    *,
    cluster_size: int = DEFAULT_CLUSTER_SIZE,
    backing: Backing | None = None,
    extended_l2: bool = False,
    packed: Packed | None = None,
) -> Layout:
    """Place a layer in a new file.

    extents: aligned to `cluster_size` (with `extended_l2` to a 32nd of it); only the size may cut the last cluster.
             Any value >= 0 is DATA.  Without a backing file ZERO needs no entry (root law).
    packed:  the clusters among the DATA that are stored compressed.

    A size that is no multiple of 512 is rounded up as in QEMU. Only a file without a backing file allows this: there
    the added bytes read as zeroes.

    Raises InvalidInput for a wrong cluster size, a map that is not aligned, or a disk too large for the cluster size.
    """
    _check_cluster_size(cluster_size, extended_l2=extended_l2)
    packed = packed or Packed.none()
    extents = _kinds(_whole_sectors(extents, backing), backing)
    _check_alignment(extents, cluster_size // SUBCLUSTERS if extended_l2 else cluster_size)
    _check_packed(packed, extents, cluster_size)

    coverage = cluster_size * (cluster_size // (16 if extended_l2 else 8))
    l1_entries = _ceil(extents.size, coverage)
    if l1_entries * 8 > MAX_L1_BYTES:
        raise InvalidInput(
            f"a disk of {extents.size} bytes is too large for clusters of {cluster_size} bytes",
            hint="choose a larger cluster size",
        )
    l2_index = _needed_tables(extents, coverage, l1_entries)

    plain = extents if not len(packed.guest) else _without(extents, packed, cluster_size)
    data = plain.val == DATA
    guest, length = plain.at[data], plain.lengths[data]
    if extended_l2:
        clusters = covering(extents.size, guest // cluster_size * cluster_size, _round_up(guest + length, cluster_size))
        held = clusters.val == DATA
        cluster_guest, cluster_stop = clusters.at[held], clusters.ends[held]
    else:
        cluster_guest, cluster_stop = guest, guest + length
    host_bytes = _round_up(cluster_stop - cluster_guest, cluster_size)
    data_clusters = int(host_bytes.sum()) // cluster_size

    l1_clusters = _ceil(l1_entries * 8, cluster_size)
    packed_clusters = _ceil(packed.area, cluster_size)
    table_clusters, blocks = _refcounts(1 + l1_clusters + len(l2_index) + data_clusters + packed_clusters, cluster_size)
    ends = np.cumsum(
        [1, table_clusters, blocks, l1_clusters, len(l2_index), data_clusters, packed_clusters], dtype=np.int64
    )
    table, block, l1, l2, first, after, end = (ends * cluster_size).tolist()

    cluster_host = first + np.cumsum(host_bytes) - host_bytes
    if extended_l2:
        owner = np.searchsorted(cluster_guest, guest, side="right") - 1
        host = cluster_host[owner] + (guest - cluster_guest[owner]) if len(guest) else guest
    else:
        host = cluster_host
    return Layout(
        size=extents.size,
        cluster_size=cluster_size,
        extended_l2=extended_l2,
        backing=backing,
        extents=extents,
        packed=packed,
        refcount_table_offset=table,
        refcount_table_clusters=table_clusters,
        refcount_blocks_offset=block,
        refcount_blocks=blocks,
        l1_offset=l1,
        l1_entries=l1_entries,
        l2_offset=l2,
        l2_index=l2_index,
        data_offset=first,
        packed_offset=after,
        file_bytes=end,
        guest=guest,
        host=host,
        length=length,
        cluster_guest=cluster_guest,
        cluster_stop=cluster_stop,
        cluster_host=cluster_host,
    )


def _whole_sectors(extents: Extents, backing: Backing | None) -> Extents:
    size = -(-extents.size // SECTOR) * SECTOR
    if size == extents.size:
        return extents
    if backing is not None:
        raise InvalidInput(f"an overlay of {extents.size} bytes is no multiple of {SECTOR}; QEMU has no such overlays")
    return extents.resized(size, int(extents.val[-1]))


def _kinds(extents: Extents, backing: Backing | None) -> Extents:
    kinds = np.clip(extents.val, ABSENT, DATA)
    return extents.mapped(kinds if backing is not None else np.where(kinds == ZERO, ABSENT, kinds))


def _check_cluster_size(cluster_size: int, *, extended_l2: bool) -> None:
    least = 1 << (MIN_EXTENDED_L2_CLUSTER_BITS if extended_l2 else MIN_CLUSTER_BITS)
    most = 1 << MAX_CLUSTER_BITS
    if not least <= cluster_size <= most or cluster_size & (cluster_size - 1):
        raise InvalidInput(
            f"a cluster size of {cluster_size} bytes is not allowed",
            hint=f"choose a power of two from {least} to {most}",
        )


def _check_alignment(extents: Extents, grain: int) -> None:
    wrong = extents.at % grain != 0
    if wrong.any():
        raise InvalidInput(f"the run at guest byte {int(extents.at[wrong][0])} does not start a cell of {grain} bytes")


def _check_packed(packed: Packed, extents: Extents, cluster_size: int) -> None:
    if not len(packed.guest):
        return
    offset = packed.position % SECTOR
    stop = np.minimum(packed.guest + cluster_size, extents.size)
    sound = (
        not (packed.guest % cluster_size).any()
        and not (np.diff(packed.guest) <= 0).any()
        and bool((packed.guest < extents.size).all())
        and bool((packed.position >= 0).all())
        and bool((packed.stored > 0).all())
        and bool((packed.position + packed.stored <= packed.area).all())
        and bool(((offset + packed.stored - 1) // SECTOR < cluster_size // 256).all())
        and not (where(extents, covering(extents.size, packed.guest, stop), otherwise=DATA).val != DATA).any()
    )
    if not sound:
        raise InvalidInput("the compressed clusters do not fit the map")


def _without(extents: Extents, packed: Packed, cluster_size: int) -> Extents:
    held = covering(extents.size, packed.guest, np.minimum(packed.guest + cluster_size, extents.size))
    return where(extents, held.mapped(np.where(held.val == DATA, ABSENT, DATA)))


def _needed_tables(extents: Extents, coverage: int, l1_entries: int) -> Int64s:
    """The L1 entries that map anything but ABSENT, ascending."""
    held = extents.val != ABSENT
    first = extents.at[held] // coverage
    last = (extents.ends[held] - 1) // coverage
    steps = np.bincount(first, minlength=l1_entries + 1) - np.bincount(last + 1, minlength=l1_entries + 1)
    return np.flatnonzero(np.cumsum(steps) > 0)


def _refcounts(clusters: int, cluster_size: int) -> tuple[int, int]:
    """Clusters of the refcount table, and refcount blocks, that count `clusters` and themselves."""
    table = blocks = 0
    while True:
        need_blocks = _ceil(clusters + table + blocks, cluster_size // REFCOUNT_BYTES)
        need_table = _ceil(need_blocks * 8, cluster_size)
        if (need_table, need_blocks) == (table, blocks):
            break
        table, blocks = need_table, need_blocks
    if table * cluster_size > MAX_REFCOUNT_TABLE_BYTES:
        raise InvalidInput(
            f"a file of {clusters} clusters of {cluster_size} bytes is larger than qcow2 allows",
            hint="choose a larger cluster size",
        )
    return table, blocks


def _ceil(count: int, per: int) -> int:
    return -(-count // per)


def _round_up(offsets: Int64s, grain: int) -> Int64s:
    return -(-offsets // grain) * grain
