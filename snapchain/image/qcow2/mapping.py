"""From a checked header to the map of the image: tables checked, read in batches, decoded, and joined into runs."""

from __future__ import annotations

import numpy as np

from snapchain.errors import Corrupt
from snapchain.host.terminal import shell_word
from snapchain.image.physical import Int64s, Physical, PhysicalBuilder, RunBudget, Runs
from snapchain.image.qcow2.entries import (
    Cells,
    Decoded,
    cluster_offsets,
    compressed_entries,
    compressed_runs,
    decode_standard,
    in_guest_order,
    place,
)
from snapchain.image.qcow2.format import (
    COMPRESSED,
    COPIED,
    L2_RESERVED,
    OFFSET_MASK,
    SNAPSHOT_ENTRY_BYTES,
    SUBCLUSTERS,
    ZERO_FLAG,
)
from snapchain.image.qcow2.overlap import Claims, check_compressed_starts
from snapchain.image.qcow2.tables import ImageFd, UInt64s, l2_batches, read_l1, read_refcount_blocks
from snapchain.model.extents import ABSENT, DATA, ZERO


def map_image(image: ImageFd, *, budget: RunBudget) -> Physical:
    """The map of an open qcow2 file, without its backing file.

    Raises Corrupt for tables that are outside the file, overlap, or break the format; Unsupported when the map needs
    more runs than `budget` allows.
    """
    header = image.header
    if not header.size:
        return PhysicalBuilder(0, budget=budget, subject=image.subject).finish()
    index, offset = read_l1(image)
    claims = _metadata(image)
    claims.tables("an L2 table", offset, header.cluster_size)
    # Before the tables are read: a pointer to the wrong table would show only as strange entries.
    claims.check()
    builder = PhysicalBuilder(header.size, budget=budget, subject=image.subject)
    misread: list[Int64s] | None = []
    decode = decode_extended if header.extended_l2 else decode_standard
    for guest, tables in l2_batches(image, index, offset):
        if not tables.any():
            continue
        decoded = decode(image, guest, tables)
        claims.data(decoded.clusters)
        runs = _inside(decoded.runs, header.size)
        squeezed = runs.stored > 0
        if squeezed.any():
            claims.compressed(runs[squeezed])
        _check_ends(image, runs)
        builder.add(runs)
        misread = None if misread is None or decoded.misread is None else [*misread, decoded.misread]
    # Freed before the columns are joined: with millions of runs each of these is tens of MiB.
    del index, offset
    claims.check()
    if misread and header.extended_l2:
        _check_misread(image, claims, np.concatenate(misread))
    del claims
    physical = builder.finish()
    if physical.stored.any():
        check_compressed_starts(physical.host[physical.stored > 0], subject=image.subject)
    return physical


def _check_misread(image: ImageFd, claims: Claims, offsets: Int64s) -> None:
    if len(offsets) and not claims.owned(offsets).any():
        raise Corrupt(
            "the extended L2 bit is set, but the tables hold standard entries: their bitmaps are clusters of the file",
            subject=image.subject,
        )


def _metadata(image: ImageFd) -> Claims:
    fields = image.header.fields
    claims = Claims(fields.cluster_bits, subject=image.subject)
    claims.table("the header", 0, image.header.cluster_size)
    claims.table("the L1 table", fields.l1_table_offset, fields.l1_size * 8)
    claims.table(
        "the refcount table", fields.refcount_table_offset, fields.refcount_table_clusters << fields.cluster_bits
    )
    claims.tables("a refcount block", read_refcount_blocks(image), image.header.cluster_size)
    claims.table("the snapshot table", fields.snapshots_offset, fields.nb_snapshots * SNAPSHOT_ENTRY_BYTES)
    claims.table("the bitmap directory", *image.header.bitmap_directory)
    return claims


def _inside(runs: Runs, size: int) -> Runs:
    """The runs without bytes beyond the virtual size."""
    if not len(runs) or int(runs.end[-1]) <= size:
        return runs
    runs = runs[runs.start < size]
    return Runs(runs.start, np.minimum(runs.end, size), runs.kind, runs.host, runs.stored)


def _check_ends(image: ImageFd, runs: Runs) -> None:
    """Guest-visible data ends inside the file. (A last cluster may be cut short behind the virtual size.)"""
    plain = (runs.kind == DATA) & (runs.stored == 0)
    missing = plain & (runs.host + (runs.end - runs.start) > image.size)
    if missing.any():
        host, guest = runs.host[missing], runs.start[missing]
        first = int((guest + np.maximum(image.size - host, 0)).min())
        last = int((host + runs.end[missing] - guest).max())
        raise Corrupt(
            f"the file is cut off at {image.size} bytes, before the data of guest offset {first}",
            subject=image.subject,
            hint=_how_to_mend(image, last),
        )


def _how_to_mend(image: ImageFd, needed: int) -> str:
    """needed: bytes of the file that are guest-visible data.

    QEMU shows a partly present last cluster with zeroes for the rest, and `qemu-img check` finds no fault in it;
    neither `qemu-img check` nor `qemu-img resize` makes the file longer.
    """
    size = image.header.cluster_size
    whole = -(-image.size // size) * size
    if needed > whole:
        return "it was truncated: copy it again, or restore it from a point"
    return (
        f"copy it again, or restore it from a point; if the {needed - image.size} bytes that are missing of its last "
        f"cluster may be zeroes, as QEMU reads them: truncate -s {whole} {shell_word(image.subject)}"
    )


# --- Extended L2 entries: a standard descriptor, then 32 bits "allocated" and 32 bits "reads as zeroes", by subcluster.
#
# Entries with equal subclusters are treated as whole clusters; only mixed ones are expanded into 32 cells.
# `l2_batches` yields a bounded number at a time.  Source: docs/interop/qcow2.txt, "Extended L2 Entries".

_ALL = (1 << SUBCLUSTERS) - 1


def decode_extended(image: ImageFd, guest: Int64s, tables: UInt64s) -> Decoded:
    """Tables of 16-byte entries, one a row. Raises Corrupt for entries that break the format."""
    descriptor = np.ascontiguousarray(tables[:, 0::2])
    bitmap = np.ascontiguousarray(tables[:, 1::2])
    allocated, zero = bitmap & np.uint64(_ALL), bitmap >> np.uint64(SUBCLUSTERS)
    compressed = compressed_entries(image, guest, descriptor)
    host = cluster_offsets(image, guest, descriptor, compressed, reserved=L2_RESERVED | ZERO_FLAG)
    wrong = ((allocated & zero) != 0) | ((host == 0) & (allocated != 0))
    if compressed is not None:
        wrong |= compressed & (bitmap != 0)
    if wrong.any():
        raise Corrupt(
            f"subcluster bitmap that contradicts itself or its cluster, {place(guest, wrong, image)}",
            subject=image.subject,
        )
    kind = np.full(host.shape, ABSENT, np.int8)
    kind[allocated == _ALL] = DATA
    kind[zero == _ALL] = ZERO
    parts = [Cells(kind, host, guest, image.header.cluster_size).runs()]
    if compressed is not None:
        parts.append(compressed_runs(image, guest, descriptor, compressed))
    mixed = (bitmap != 0) & (kind == ABSENT)
    if mixed.any():
        row, column = np.nonzero(mixed)
        start = guest[row] + column * image.header.cluster_size
        parts.append(_spread(image, start, host[row, column], bitmap[row, column]))
    return Decoded(in_guest_order(*parts), host[host != 0], misread_bitmaps(image, bitmap[bitmap != 0]))


def misread_bitmaps(image: ImageFd, bitmaps: UInt64s) -> Int64s | None:
    """The offsets of bitmaps read as standard L2 entries; None when one of them cannot be such an entry.

    An image whose extended L2 bit is set by mistake or malice has an entry in the place of every second bitmap. QEMU
    would show wrong bytes and report the rest as leaked; a real bitmap hardly ever looks like that.
    """
    host = (bitmaps & np.uint64(OFFSET_MASK)).view(np.int64)
    alike = (bitmaps & np.uint64(L2_RESERVED | ZERO_FLAG | COMPRESSED)) == 0
    alike &= (bitmaps & np.uint64(COPIED)) != 0
    alike &= (host != 0) & (host < image.size) & ((host & (image.header.cluster_size - 1)) == 0)
    return host if alike.all() else None


def _spread(image: ImageFd, start: Int64s, host: Int64s, bitmap: UInt64s) -> Runs:
    """The subclusters of these clusters."""
    unit = image.header.grain
    bit = np.arange(SUBCLUSTERS, dtype=np.uint64)
    bits = bitmap[:, None] >> bit
    kind = np.full(bits.shape, ABSENT, np.int8)
    kind[(bits & np.uint64(1)) != 0] = DATA
    kind[(bits >> np.uint64(SUBCLUSTERS) & np.uint64(1)) != 0] = ZERO
    return Cells(kind, host[:, None] + bit.view(np.int64) * unit, start, unit).runs()
