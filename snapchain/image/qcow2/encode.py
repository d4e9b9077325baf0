"""The bytes of every table of a planned qcow2 file, in bounded batches.

`metadata` yields (file offset, bytes) for all but the header, in file order; `header` returns the cluster that makes
the file an image and is therefore written last.  Pure: no file is touched here.

A batch of L2 tables is one flat array of entries; each finds its run by counting the run starts before it, so the cost
is one pass over entries and runs, never a Python object per cluster.  Source: QEMU docs/interop/qcow2.txt.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from snapchain.errors import InvalidInput
from snapchain.image.qcow2.format import (
    COMPRESSED,
    COPIED,
    MAX_BACKING_NAME_BYTES,
    SECTOR,
    SUBCLUSTERS,
    V3_HEADER_BYTES,
    ZERO_FLAG,
    CompressionType,
    ExtensionType,
    HeaderFields,
    Incompatible,
    compressed_offset_bits,
    pack_extension,
)
from snapchain.image.qcow2.layout import REFCOUNT_BYTES, Layout
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, Int64s

BATCH = 4 * 1024 * 1024
Uint64s = npt.NDArray[np.uint64]


def header(layout: Layout) -> bytes:
    """The header cluster. Raises InvalidInput when the backing name does not fit into it."""
    extensions = b""
    name = b""
    if layout.backing is not None:
        if not layout.backing.format:
            raise InvalidInput("a backing link without a format would be probed", subject=ascii(layout.backing.name))
        name = backing_name(layout.backing.name, is_uri=layout.backing.is_uri)
        extensions = pack_extension(ExtensionType.BACKING_FORMAT, layout.backing.format.encode())
    extensions += pack_extension(ExtensionType.END, b"")
    name_offset = V3_HEADER_BYTES + len(extensions)
    if name_offset + len(name) > layout.cluster_size:
        raise InvalidInput(
            f"a backing name of {len(name)} bytes does not fit a header cluster of {layout.cluster_size} bytes",
            hint="choose a larger cluster size",
        )
    features = Incompatible(0)
    if layout.packed.method is not CompressionType.ZLIB:
        features |= Incompatible.COMPRESSION
    if layout.extended_l2:
        features |= Incompatible.EXTENDED_L2
    fields = HeaderFields(
        backing_file_offset=name_offset if name else 0,
        backing_file_size=len(name),
        cluster_bits=layout.cluster_size.bit_length() - 1,
        size=layout.size,
        l1_size=layout.l1_entries,
        l1_table_offset=layout.l1_offset,
        refcount_table_offset=layout.refcount_table_offset,
        refcount_table_clusters=layout.refcount_table_clusters,
        incompatible_features=features,
        compression_type=layout.packed.method,
    )
    return (fields.pack() + extensions + name).ljust(layout.cluster_size, b"\0")


def metadata(layout: Layout) -> Iterator[tuple[int, memoryview]]:
    """(file offset, bytes) of the refcount table, the refcount blocks, L1 and L2; some BATCH bytes at a time."""
    yield layout.refcount_table_offset, _bytes(refcount_table(layout))
    step = max(1, BATCH // layout.cluster_size)
    for first in range(0, layout.refcount_blocks, step):
        count = min(step, layout.refcount_blocks - first)
        yield layout.refcount_blocks_offset + first * layout.cluster_size, _bytes(refcounts(layout, first, count))
    if layout.l1_entries:
        yield layout.l1_offset, _bytes(l1_table(layout))
    for first in range(0, len(layout.l2_index), step):
        count = min(step, len(layout.l2_index) - first)
        yield layout.l2_offset + first * layout.cluster_size, _bytes(l2_tables(layout, first, count))


def refcount_table(layout: Layout) -> Uint64s:
    """uint64[refcount blocks], the offset of each."""
    return (layout.refcount_blocks_offset + np.arange(layout.refcount_blocks) * layout.cluster_size).astype(np.uint64)


def refcounts(layout: Layout, first: int, count: int) -> npt.NDArray[np.uint16]:
    """uint16[count * counts per block] of refcount blocks [first, first + count).

    One for every cluster, except in the area of compressed clusters, where several may share a cluster.
    """
    per_block = layout.cluster_size // REFCOUNT_BYTES
    start, stop = first * per_block, (first + count) * per_block
    counts = np.zeros(stop - start, np.uint16)
    single = layout.packed_offset // layout.cluster_size
    counts[: max(0, single - start)] = 1
    if stop > single and len(layout.packed.guest):
        shared = _packed_counts(layout)
        low = max(start, single)
        piece = shared[low - single : stop - single]
        counts[low - start : low - start + len(piece)] = piece
    return counts


def _packed_counts(layout: Layout) -> npt.NDArray[np.uint16]:
    """How many compressed clusters touch each host cluster of their area, counted in whole sectors as QEMU does."""
    packed = layout.packed
    clusters = (layout.file_bytes - layout.packed_offset) // layout.cluster_size
    first = packed.position // layout.cluster_size
    last = (packed.position + packed.stored - 1) // layout.cluster_size
    steps = np.bincount(first, minlength=clusters + 1) - np.bincount(last + 1, minlength=clusters + 1)
    return np.cumsum(steps)[:clusters].astype(np.uint16)


def l1_table(layout: Layout) -> Uint64s:
    """uint64[l1_entries]."""
    entries = np.zeros(layout.l1_entries, np.uint64)
    offsets = layout.l2_offset + np.arange(len(layout.l2_index), dtype=np.int64) * layout.cluster_size
    entries[layout.l2_index] = offsets.astype(np.uint64) | np.uint64(COPIED)
    return entries


def l2_tables(layout: Layout, first: int, count: int) -> Uint64s:
    """uint64[count * cluster_size / 8], the L2 tables [first, first + count) one after the other."""
    size, per_table = layout.cluster_size, layout.l2_entries
    tables = layout.l2_index[first : first + count]
    guest = (tables[:, None] * (per_table * size) + np.arange(per_table, dtype=np.int64) * size).reshape(-1)
    entries = _placed(guest, layout)
    if not layout.extended_l2:
        kinds = values_of(guest, layout.extents)
        entries[kinds == ZERO] |= np.uint64(ZERO_FLAG)
        _add_packed(entries, tables, layout)
        return entries
    both = np.zeros(2 * len(entries), np.uint64)
    both[1::2] = subcluster_bitmaps(guest, layout.extents, layout.cluster_size)
    _add_packed(entries, tables, layout, bitmaps=both[1::2])
    both[0::2] = entries
    return both


def _placed(guest: Int64s, layout: Layout) -> Uint64s:
    """The entries of plain clusters; 0 for all others."""
    run = run_of(guest, layout.cluster_guest)
    entries = np.zeros(len(guest), np.uint64)
    if len(layout.cluster_guest):
        held = (run >= 0) & (guest < layout.cluster_stop[run])
        chosen = run[held]
        host = layout.cluster_host[chosen] + (guest[held] - layout.cluster_guest[chosen])
        entries[held] = host.astype(np.uint64) | np.uint64(COPIED)
    return entries


def values_of(guest: Int64s, extents: Extents) -> Int64s:
    """The map on ascending offsets, which may run past its end (ABSENT there)."""
    return np.where(guest < extents.size, extents.val[run_of(guest, extents.at)], ABSENT)


def run_of(offsets: Int64s, starts: Int64s) -> Int64s:
    """For ascending offsets the index of the last start that is not above each, else -1."""
    low = int(np.searchsorted(starts, offsets[0], side="right"))
    high = int(np.searchsorted(starts, offsets[-1], side="right"))
    steps = np.bincount(np.searchsorted(offsets, starts[low:high]), minlength=len(offsets))
    return low - 1 + np.cumsum(steps)


def _add_packed(entries: Uint64s, tables: Int64s, layout: Layout, *, bitmaps: Uint64s | None = None) -> None:
    """Write the descriptors of compressed clusters into `entries` of these tables."""
    packed = layout.packed
    per_table = layout.l2_entries
    low, high = np.searchsorted(
        packed.guest // (per_table * layout.cluster_size), [int(tables[0]), int(tables[-1]) + 1]
    ).tolist()
    if low == high:
        return
    cluster = packed.guest[low:high] // layout.cluster_size
    index = np.searchsorted(tables, cluster // per_table) * per_table + cluster % per_table
    host = layout.packed_offset + packed.position[low:high]
    more_sectors = (host % SECTOR + packed.stored[low:high] - 1) // SECTOR
    shift = np.uint64(compressed_offset_bits(layout.cluster_size.bit_length() - 1))
    entries[index] = host.astype(np.uint64) | (more_sectors.astype(np.uint64) << shift) | np.uint64(COMPRESSED)
    if bitmaps is not None:
        bitmaps[index] = 0


def subcluster_bitmaps(guest: Int64s, extents: Extents, size: int) -> Uint64s:
    """The subcluster bitmaps of these clusters: low half allocated, high half reads as zeroes.

    A run covers whole clusters between its ends, found by counting, and at most two in part, added one by one.
    Bits of different runs never overlap, so adding is the same as or-ing.
    """
    low = int(np.searchsorted(extents.at, guest[0], side="right")) - 1
    high = int(np.searchsorted(extents.at, guest[-1] + size - 1, side="right"))
    at, stop, val = extents.at[low:high], extents.ends[low:high], extents.val[low:high]
    bitmaps = np.zeros(len(guest), np.uint64)
    for kind, shift in ((DATA, 0), (ZERO, SUBCLUSTERS)):
        chosen = val == kind
        for cells, first, last in _cut(at[chosen], stop[chosen], size):
            index = np.searchsorted(guest, cells)
            inside = (index < len(guest)) & (guest[np.minimum(index, len(guest) - 1)] == cells)
            bits = ((np.uint64(1) << last[inside]) - (np.uint64(1) << first[inside])) << np.uint64(shift)
            np.add.at(bitmaps, index[inside], bits)
        whole_from, whole_to = -(-at[chosen] // size) * size, stop[chosen] // size * size
        some = whole_from < whole_to
        steps = np.zeros(len(guest) + 1, np.int64)
        np.add.at(steps, np.searchsorted(guest, whole_from[some]), 1)
        np.add.at(steps, np.searchsorted(guest, whole_to[some]), -1)
        bitmaps[np.cumsum(steps[:-1]) > 0] = np.uint64(((1 << SUBCLUSTERS) - 1) << shift)
    return bitmaps


def _cut(at: Int64s, stop: Int64s, size: int) -> Iterator[tuple[Int64s, Uint64s, Uint64s]]:
    """The clusters that runs cover in part: (guest offset, first subcluster, one past the last)."""
    grain = size // SUBCLUSTERS
    head, tail = at // size * size, stop // size * size
    lone = (head == tail) & (at < stop)
    begins = (at > head) & ~lone
    finishes = (stop > tail) & ~lone
    for cells, start, end in (
        (head[lone], at[lone], stop[lone]),
        (head[begins], at[begins], head[begins] + size),
        (tail[finishes], tail[finishes], stop[finishes]),
    ):
        yield cells, ((start - cells) // grain).astype(np.uint64), (-(-(end - cells) // grain)).astype(np.uint64)


def backing_name(name: str, *, is_uri: bool = False) -> bytes:
    """The name as QEMU stores it. A colon before the first slash means a protocol, not a file."""
    try:
        raw = name.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput("a backing name must be UTF-8", subject=ascii(name)) from error
    is_protocol = ":" in name.split("/", 1)[0]
    if not raw or len(raw) > MAX_BACKING_NAME_BYTES or any(byte < 0x20 for byte in raw) or is_protocol != is_uri:
        raise InvalidInput(
            f"not a backing name that QEMU takes for a plain file of at most {MAX_BACKING_NAME_BYTES} bytes",
            subject=ascii(name),
            hint="put ./ before a relative name with a colon",
        )
    return raw


def _bytes(table: npt.NDArray[np.uint64] | npt.NDArray[np.uint16]) -> memoryview:
    """Big-endian, as all of qcow2."""
    return table.astype(table.dtype.newbyteorder(">")).view(np.uint8).data
