"""From a judged header to the map of the image: tables checked, read in batches, decoded, and laid out as runs."""

from __future__ import annotations

import numpy as np

from snapchain.errors import Corrupt
from snapchain.host.terminal import shell_word
from snapchain.image.physical import Int64s, Physical, PhysicalBuilder, RunBudget, Runs
from snapchain.image.qcow2.entries import decode_standard
from snapchain.image.qcow2.format import SNAPSHOT_ENTRY_BYTES
from snapchain.image.qcow2.overlap import Claims, check_compressed_starts
from snapchain.image.qcow2.subclusters import decode_extended
from snapchain.image.qcow2.tables import ImageFd, l2_batches, read_l1, read_refcount_blocks
from snapchain.model.extents import DATA


def map_image(image: ImageFd, *, budget: RunBudget) -> Physical:
    """Where the guest bytes of an open qcow2 file lie, without its backing file.

    Raises Corrupt for tables that are outside the file, overlap, or break the format; Unsupported when the map would
    cost more runs than `budget` has.
    """
    header = image.header
    if not header.size:
        return PhysicalBuilder(0, budget=budget, subject=image.subject).finish()
    index, offset = read_l1(image)
    claims = _metadata(image)
    claims.tables("an L2 table", offset, header.cluster_size)
    # Before the tables are read: a pointer to the wrong table would only be seen as strange entries.
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
    """Without what the last cluster or table says about bytes behind the virtual size."""
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

    A last cluster that is partly there is shown by QEMU with zeroes for the rest, and `qemu-img check` finds no fault
    in it; neither that nor `qemu-img resize` makes the file longer.
    """
    size = image.header.cluster_size
    whole = -(-image.size // size) * size
    if needed > whole:
        return "it was truncated: copy it again, or restore it from a point"
    return (
        f"copy it again, or restore it from a point; if the {needed - image.size} bytes that are missing of its last "
        f"cluster may be zeroes, as QEMU reads them: truncate -s {whole} {shell_word(image.subject)}"
    )
