"""One file out of a run of neighbouring files, decided before a byte moves.

    files[first:] of the view   ->   what survives, where it lies, where it goes

The run's own maps are folded into one, rounded out to the clusters of the result, and laid out as a new file.  Every
DATA byte of that file has a source: plain bytes to copy, compressed clusters to copy as they are, or parts of
compressed clusters to unpack.  What fills a partial cluster up comes from the view, so from files below the run too.
Pure numpy: nothing is read or written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from snapchain.errors import InvalidInput
from snapchain.image.assemble.copies import Copies
from snapchain.image.assemble.geometry import Geometry, choose
from snapchain.image.assemble.packing import kept_compressed, pack
from snapchain.image.assemble.pieces import Pieces, joined_runs, pieces_of
from snapchain.image.chain import ImageChain
from snapchain.image.qcow2.aligned import aligned
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.layout import Layout, plan as lay_out
from snapchain.model.extents import Extents, Int64s, fold


@dataclass(frozen=True, slots=True, eq=False)
class Assembly:
    """A merged file, planned. Bytes throughout.

    view:    the chain up to the uppermost input; first: number of the lowest input in it, 0 for the root
    layout:  of the new file
    plain:   copies of bytes as they are; squeezed: copies of compressed clusters as they are; targets are file offsets
    unpack_guest, unpack_length, unpack_file: ranges of compressed clusters that are stored plain in the result
    """

    view: ImageChain
    first: int
    layout: Layout
    plain: Copies
    squeezed: Copies
    unpack_guest: Int64s
    unpack_length: Int64s
    unpack_file: Int64s

    @property
    def geometry(self) -> Geometry:
        """The clusters of the result."""
        return Geometry(self.layout.cluster_size, self.layout.extended_l2)

    @property
    def bytes_moved(self) -> int:
        """Bytes that the new file takes from the old ones, shared or copied; unpacked ones as they are then."""
        return self.plain.bytes + self.squeezed.bytes + int(self.unpack_length.sum())

    @property
    def bytes_needed(self) -> int:
        """Room that the new file takes where nothing can be shared: its metadata and what moves."""
        return self.layout.metadata_bytes + self.bytes_moved


def merged_extents(view: ImageChain, first: int, *, in_place: int | None = None) -> Extents:
    """The composition of files[first:] alone; DATA is the number of the owner in the chain.

    in_place: number of a file that keeps what it has: what its tables call data is DATA, holes of the file or not
    """

    def own(number: int) -> Extents:
        # Not by file.extents, which a file keeps: with millions of extents tens of MiB.
        file = view.files[number]
        return file.physical.extents() if number == in_place else file.shown_extents()

    return fold(own(number).owned_by(number) for number in range(first, len(view.files)))


def plan(
    view: ImageChain,
    first: int,
    *,
    backing: Backing | None,
    cluster_size: int | None = None,
    extended_l2: bool | None = None,
) -> Assembly:
    """Plan one file that reads, on the file below `first`, as the whole view does.

    view: up to the uppermost input (`chain.at(last)`); backing: the link that the result records, None exactly when
    the root is among the inputs (first 0); cluster_size, extended_l2: chosen by the contributors unless given.

    Raises InvalidInput for a range that is none, or clusters that cannot hold the disk.
    """
    if not 0 <= first < len(view.files):
        raise InvalidInput(f"file {first} is none of the {len(view.files)} of the chain")
    if (backing is None) != (first == 0):
        raise InvalidInput("a merged file has a backing file exactly when the root is not among its inputs")
    merged = merged_extents(view, first)
    # Not by view.resolve(), which keeps it as long as the view.
    shown = merged_extents(view, 0) if first else merged
    geometry = choose(view.files, first, merged, cluster_size=cluster_size, extended_l2=extended_l2)
    target = aligned(merged, shown, cluster_size=geometry.grain)
    del merged
    pieces = pieces_of(target, shown, view.files)
    del shown
    kept, method = kept_compressed(pieces, view.files, size=view.size, cluster_size=geometry.cluster_size)
    packed, squeezed = pack(pieces[kept], method)
    layout = lay_out(
        target,
        cluster_size=geometry.cluster_size,
        backing=backing,
        extended_l2=geometry.extended_l2,
        packed=packed,
    )
    # With millions of extents each of these is tens of MiB.
    del target
    unpack = pieces[(pieces.stored > 0) & ~kept]
    if pieces.stored.any():
        pieces = pieces[pieces.stored == 0]
    first_row, length = joined_runs([unpack.file], unpack.guest, unpack.length)
    return Assembly(
        view,
        first,
        layout,
        _plain(pieces, layout),
        squeezed.moved(layout.packed_offset),
        unpack.guest[first_row],
        length,
        unpack.file[first_row].astype(np.int64),
    )


def _plain(pieces: Pieces, layout: Layout) -> Copies:
    """Where each piece goes. A piece lies within one DATA run of the result, so in one stretch of its file."""
    return Copies(pieces.file, pieces.host, layout.host_of(pieces.guest), pieces.length).joined()
