"""Which clusters of a file change, and from where their bytes come; in numpy passes over runs.

A cell is a cluster of the target.  Each that changes becomes one of these:

    zero     it reads as zeroes: an entry without a place (or, in the root, none at all)
    kept     it is stored plain already: what upper files hold of it is written over it (only for commit: upper files
             hide that until the switch)
    new      it gets a cluster at the end of the file, filled from the view

What the target shows through the inputs above it is never overwritten, nor are its tables followed by anything new
before they are on the disk.
"""

from __future__ import annotations

import numpy as np

from snapchain.errors import InvalidInput, Unsupported
from snapchain.image.assemble.copies import Copies
from snapchain.image.assemble.pieces import Pieces, joined_runs, pieces_of
from snapchain.image.chain import ImageChain
from snapchain.image.file import ImageFile
from snapchain.image.inplace.amendment import Amendment
from snapchain.image.physical import Int64s
from snapchain.image.pread import file_bytes
from snapchain.image.qcow2.aligned import aligned
from snapchain.image.qcow2.format import COPIED, ZERO_FLAG, Autoclear
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.tables import UInt64s
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, covering, fold, pairwise, rounded, where

_ABSENT, _ZERO, _PLAIN, _PACKED = range(4)
"""What the target has in a cell."""
_AUTOCLEAR = Autoclear.BITMAPS | Autoclear.DATA_FILE_RAW


def plan_absorb(view: ImageChain, first: int, *, backing: Backing | None) -> Amendment:
    """Plan that the top of the view takes in what files[first:-1] show through it.

    backing: the link that it records then. Raises Unsupported for a target that cannot be changed in place.
    """
    _check(view, first)
    target = len(view.files) - 1
    file = _changeable(view, target)
    merged = _composed(view, first)
    wanted = aligned(merged, view.resolve(), cluster_size=file.cluster_size)
    # Where the target has something, it stays.
    lacking = where(wanted, file.extents.mapped(np.where(file.extents.val == ABSENT, DATA, ABSENT)))
    return _amendment(view, target, lacking, Extents.absent(view.size), merged, (backing, first == 0))


def plan_commit(view: ImageChain, first: int, *, backing: Backing | None) -> Amendment:
    """Plan that files[first] takes in what the files above it hold. backing: its link, which does not change.

    Raises Unsupported for a target that cannot be changed in place, or is of another size than the view.
    """
    _check(view, first)
    file = _changeable(view, first)
    if file.size != view.size:
        raise Unsupported("the lowest input has another size than the uppermost", subject=file.path)
    merged = _composed(view, first)
    upper = _composed(view, first + 1)
    wanted = aligned(merged, view.resolve(), cluster_size=file.cluster_size)
    touched = where(wanted, rounded(upper, file.cluster_size))
    return _amendment(view, first, touched, upper, merged, (backing, first == 0))


def _check(view: ImageChain, first: int) -> None:
    if not 0 <= first < len(view.files) - 1:
        raise InvalidInput(f"file {first} and those above it are not several of {len(view.files)}")


def _changeable(view: ImageChain, number: int) -> ImageFile:
    file = view.files[number]
    if file.header is None:
        raise Unsupported("a raw image is not merged in place", subject=file.path)
    if file.header.extended_l2:
        raise Unsupported("an image with subclusters is not merged in place", subject=file.path)
    if file.header.snapshots:
        raise Unsupported("its internal snapshots share its clusters", subject=file.path)
    if file.header.fields.autoclear_features & ~_AUTOCLEAR:
        raise Unsupported("it bears notes of a kind that a change would make wrong", subject=file.path)
    return file


def _composed(view: ImageChain, first: int) -> Extents:
    return fold(file.extents.owned_by(number) for number, file in enumerate(view.files) if number >= first)


def _held(file: ImageFile) -> Extents:
    """What each cell of a file has, as one of _ABSENT.. of this module."""
    physical = file.physical
    kind = np.where(physical.stored > 0, _PACKED, np.where(physical.kind == DATA, _PLAIN, _ZERO))
    kind = np.where(physical.kind == ABSENT, _ABSENT, kind).astype(np.int64)
    return Extents(physical.size, physical.start, kind) if len(kind) else Extents.absent(0)


def _amendment(
    view: ImageChain, target: int, wanted: Extents, upper: Extents, merged: Extents, link: tuple[Backing | None, bool]
) -> Amendment:
    """wanted: what the changed cells are to be, ABSENT for all others; upper: what lies above the target, by owner;
    merged: all inputs; link: the backing link, and whether the result is a root.
    """
    backing, rooted = link
    file = view.files[target]
    assert file.header is not None
    size = file.cluster_size
    at, want, has = pairwise(wanted, _held(file))
    stop = np.append(at[1:], np.int64(view.size))[: len(at)]
    zero = want == ZERO
    if file.header.version == 2 and not rooted:
        # Version 2 has no entry that reads as zeroes on a backing file: a cluster that is a hole of the file does.
        fresh = ((want >= DATA) & (has != _PLAIN)) | (zero & (has != _ZERO))
        zero = np.zeros(len(at), np.bool_)
        kept = ((want >= DATA) | (want == ZERO)) & (has == _PLAIN)
        fresh &= ~kept
    else:
        fresh = (want >= DATA) & (has != _PLAIN)
        kept = (want >= DATA) & (has == _PLAIN)
        zero &= (has != _ZERO) & ~((has == _ABSENT) & rooted)
    end = -(-file_bytes(file.fileno()) // size) * size
    begins, clusters = at[fresh], -(-(stop[fresh] - at[fresh]) // size)
    host = end + (np.cumsum(clusters) - clusters) * size
    pieces, place = _into_new(view, _mask(view.size, at, stop, fresh), begins, host)
    over, over_place = _into_kept(view, target, upper, _mask(view.size, at, stop, kept))
    blank, blank_length = _zeroes(file, upper, _mask(view.size, at, stop, kept))
    plain, packed = pieces.stored == 0, pieces.stored > 0
    over_plain, over_packed = over.stored == 0, over.stored > 0
    copies = Copies.concatenated(
        Copies(pieces.file[plain], pieces.host[plain], place[plain], pieces.length[plain]).joined(),
        Copies(over.file[over_plain], over.host[over_plain], over_place[over_plain], over.length[over_plain]).joined(),
    )
    guest = np.concatenate([pieces.guest[packed], over.guest[over_packed]])
    length = np.concatenate([pieces.length[packed], over.length[over_packed]])
    number = np.concatenate([pieces.file[packed], over.file[over_packed]]).astype(np.int64)
    goes = np.concatenate([place[packed], over_place[over_packed]])
    row, length = joined_runs([number, goes - guest], guest, length)
    cluster, entry = _entries(size, (begins, clusters, host), (at[zero], stop[zero]), rooted=rooted)
    return Amendment(
        view,
        target,
        backing,
        end,
        copies,
        number[row],
        guest[row],
        goes[row],
        length,
        blank,
        blank_length,
        cluster,
        entry,
        int(clusters.sum()),
        merged.data_bytes,
    )


def _mask(size: int, at: Int64s, stop: Int64s, chosen: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Extents:
    return covering(size, at[chosen], stop[chosen])


def _into_new(view: ImageChain, cells: Extents, begins: Int64s, host: Int64s) -> tuple[Pieces, Int64s]:
    """All that the view shows in new cells, and where it goes. What reads as zeroes stays a hole of the file."""
    pieces = pieces_of(cells, view.resolve(), view.files)
    if not len(pieces):
        return pieces, np.empty(0, np.int64)
    run = np.searchsorted(begins, pieces.guest, side="right") - 1
    return pieces, host[run] + (pieces.guest - begins[run])


def _into_kept(view: ImageChain, target: int, upper: Extents, cells: Extents) -> tuple[Pieces, Int64s]:
    """What upper files show in cells that stay where they are, and its place in the file."""
    file = view.files[target]
    above = where(cells, upper.mapped(np.where(upper.val >= DATA, DATA, ABSENT)))
    pieces = pieces_of(where(_runs(file), above), upper, view.files)
    return pieces, _place(file, pieces.guest)


def _zeroes(file: ImageFile, upper: Extents, cells: Extents) -> tuple[Int64s, Int64s]:
    """(place, length) of what upper files make zero in cells that stay where they are, cut at the file's runs."""
    blank = where(cells, upper.mapped(np.where(upper.val == ZERO, DATA, ABSENT)))
    at, chosen, _ = pairwise(blank, _runs(file))
    stop = np.append(at[1:], np.int64(file.size))[: len(at)]
    rows = chosen >= DATA
    return _place(file, at[rows]), stop[rows] - at[rows]


def _runs(file: ImageFile) -> Extents:
    """Each run of a file by its number: what is cut at these lies in one stretch of the file."""
    start = file.physical.start
    return Extents(file.size, start, np.arange(len(start), dtype=np.int64))


def _place(file: ImageFile, guest: Int64s) -> Int64s:
    """Where plain data of a file lies in it."""
    if not len(guest):
        return np.empty(0, np.int64)
    run = np.searchsorted(file.physical.start, guest, side="right") - 1
    return file.physical.host[run] + (guest - file.physical.start[run])


def _entries(
    size: int,
    fresh: tuple[Int64s, Int64s, Int64s],
    zero: tuple[Int64s, Int64s],
    *,
    rooted: bool,
) -> tuple[Int64s, UInt64s]:
    """(guest cluster, L2 entry), ascending."""
    begins, clusters, host = fresh
    run = np.repeat(np.arange(len(begins)), clusters)
    within = np.arange(len(run)) - np.repeat(np.cumsum(clusters) - clusters, clusters)
    placed = begins[run] // size + within
    entries = (host[run] + within * size).astype(np.uint64) | np.uint64(COPIED)
    first = zero[0] // size
    count = -(-zero[1] // size) - first
    run = np.repeat(np.arange(len(first)), count)
    blank = first[run] + np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count)
    cluster = np.concatenate([placed, blank])
    entry = np.concatenate([entries, np.full(len(blank), 0 if rooted else ZERO_FLAG, np.uint64)])
    order = np.argsort(cluster, kind="stable")
    return cluster[order], entry[order]
