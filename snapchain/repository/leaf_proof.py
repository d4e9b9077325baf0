"""Which leaves of a page are proven by its records alone, once the blobs that it names are known to be whole.

A blob's id is made of the hashes of its pieces of 64 KiB. Where a run is a whole blob, at a multiple of 64 KiB, these
pieces are leaves, and the page lists their hashes: when those give the id, the bytes are those that were shipped, and
need not be read for each layer that names them.

    guest   |  leaf 4  |  leaf 5  |  leaf 6  |       ids: BLAKE3[id key](hash 4 | hash 5) = id of the blob?
    run     [====== a whole blob =]               -> leaves 4 and 5 are proven
    run                            [= part ]      -> leaf 6 is to be read, as the chain shows it
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from snapchain.model.content import LEAF_BYTES
from snapchain.model.extents import Extents, Int64s, covering
from snapchain.repository.pages import Page

Flags = npt.NDArray[np.bool_]


def doubtful(page: Page, size: int, trusted: Flags, blob_id: Callable[[bytes], bytes]) -> tuple[Int64s, Int64s]:
    """Guest ranges (first[n], stop[n]) of the leaves of a page that must be read to be proven, in no order.

    size: of the layer; trusted: of each run, whether its blob is known to be whole, and to lie where the run says
    blob_id: the id of a blob, from the hashes of its pieces
    """
    zero = page.runs["stored"] == 0
    first = -(-page.start // LEAF_BYTES)
    stop = page.stop // LEAF_BYTES
    # What lies past the end of the disk counts as zeroes.
    stop[zero & (page.stop == size)] = -(-size // LEAF_BYTES)
    listed = page.index.searchsorted(first), page.index.searchsorted(stop)
    proven = zero.copy()
    whole = (
        ~zero
        & trusted
        & (page.runs["skip"] == 0)
        & (page.runs["raw"] == page.stop - page.start)
        & (page.start % LEAF_BYTES == 0)
        & (page.stop % LEAF_BYTES == 0)
        & (listed[1] - listed[0] == stop - first)
    )
    hashes, ids = page.leaves["hash"], page.runs["id"]
    for at in np.flatnonzero(whole).tolist():
        pieces = hashes[int(listed[0][at]) : int(listed[1][at])]
        proven[at] = blob_id(pieces.tobytes()) == ids[at].tobytes()
    # Leaves in a run of zeroes that are listed as something else: these alone, since such a run may be of any length.
    run = first.searchsorted(page.index, side="right") - 1
    wrong = page.index[(run >= 0) & zero[run] & (page.index < stop[run])] if len(first) else page.index
    # Of each run: the leaves that it touches before, and after, those that it proves.
    enters, leaves = page.start // LEAF_BYTES, -(-page.stop // LEAF_BYTES)
    first = np.where(proven & (first < stop), first, leaves)
    stop = np.where(proven & (first < stop), stop, leaves)
    begin = np.concatenate([enters, stop, wrong])
    end = np.concatenate([first, leaves, wrong + 1])
    return _bytes_of(begin, end, size)


def touched(page: Page, size: int, runs: Flags) -> tuple[Int64s, Int64s]:
    """Guest ranges of the leaves that some of the runs touch, as `doubtful`."""
    return _bytes_of(page.start[runs] // LEAF_BYTES, -(-page.stop[runs] // LEAF_BYTES), size)


def map_of(size: int, ranges: list[tuple[Int64s, Int64s]]) -> Extents:
    """DATA on these ranges, ABSENT elsewhere."""
    if not ranges:
        return Extents.absent(size)
    first, stop = (np.concatenate(column) for column in zip(*ranges, strict=True))
    order = np.argsort(first, kind="stable")
    return covering(size, first[order], stop[order])


def _bytes_of(first: Int64s, stop: Int64s, size: int) -> tuple[Int64s, Int64s]:
    held = stop > first
    return first[held] * LEAF_BYTES, np.minimum(stop[held] * LEAF_BYTES, size)
