"""Which clusters of a file change, and from where their bytes come; in numpy passes over runs.

`cells` decides what changes.  Here each changed cluster gets its place: the one that it has, or one at the end of the
file.  What the target shows through the inputs above it is never overwritten.  The tables are read, nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from snapchain.errors import Corrupt, InvalidInput, Unsupported
from snapchain.image.chain import ImageChain
from snapchain.image.file import ImageFile
from snapchain.image.physical import Int64s
from snapchain.image.pieces import Pieces, joined_runs, pieces_of
from snapchain.image.pread import file_bytes
from snapchain.image.qcow2.encode import subcluster_bitmaps, values_of
from snapchain.image.qcow2.format import COPIED, ZERO_FLAG, Autoclear
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.tables import ImageFd, UInt64s
from snapchain.merge.amendment.allocation import (
    Cells,
    ClusterAllocation,
    allocate_clusters,
    behind_end,
    cells,
    cut,
    end_of_last_cell,
)
from snapchain.merge.amendment.link import header_head, relink
from snapchain.merge.assembly import merged_extents
from snapchain.merge.copying import Copies
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, where

_AUTOCLEAR = Autoclear.BITMAPS | Autoclear.DATA_FILE_RAW


@dataclass(frozen=True, slots=True, eq=False)
class Amendment:
    """A file's change, planned. Bytes throughout.

    view:    the chain up to the uppermost input; target: number of the file in it that is changed
    backing: the link that it then records; end: of the file now, rounded up to clusters: where new clusters begin
    copies:  bytes to copy as they are; unpack_*: ranges of compressed clusters to store plain; zero_*: to overwrite
             with zeroes; all targets are offsets in the changed file
    cluster, entry, bitmap: the L2 entries that change: number of the guest cluster, ascending, and what its entry and
             its bitmap of subclusters (None where there are none) become
    new_clusters: data clusters that come at `end`
    """

    view: ImageChain
    target: int
    backing: Backing | None
    end: int
    copies: Copies
    unpack_file: Int64s
    unpack_guest: Int64s
    unpack_target: Int64s
    unpack_length: Int64s
    zero_target: Int64s
    zero_length: Int64s
    cluster: Int64s
    entry: UInt64s
    bitmap: UInt64s | None
    new_clusters: int

    @property
    def file(self) -> ImageFile:
        """The one that is changed, as it was when this was planned."""
        return self.view.files[self.target]

    @property
    def cluster_size(self) -> int:
        """Of the changed file."""
        return self.file.cluster_size

    @property
    def bytes_moved(self) -> int:
        """Bytes that the file takes from others, shared or copied; unpacked ones as they are then."""
        return self.copies.bytes + self.bytes_unpacked

    @property
    def bytes_unpacked(self) -> int:
        """Of compressed clusters, which do not stay so."""
        return int(self.unpack_length.sum())

    @property
    def bytes_needed(self) -> int:
        """Room that the file may grow by: data, tables, and all reference counts anew."""
        size = self.cluster_size
        tables = self.new_tables_at_most * size
        l1 = -(-self.view.size // self._guest_bytes_per_l2) * 8 + size if self.view.size > self.file.size else 0
        clusters = (self.end + self.new_clusters * size + tables + l1) // size
        return self.new_clusters * size + tables + l1 + clusters * 8 + 8 * size

    @property
    def new_tables_at_most(self) -> int:
        """L2 tables of the clusters whose entries change."""
        numbers = self.cluster // (self._guest_bytes_per_l2 // self.cluster_size)
        return int((numbers[1:] != numbers[:-1]).sum()) + min(len(numbers), 1)

    @property
    def _guest_bytes_per_l2(self) -> int:
        assert self.file.header is not None
        return self.file.header.guest_bytes_per_l2


def plan_absorb(view: ImageChain, first: int, *, backing: Backing | None) -> Amendment:
    """Plan that the top of the view takes in what files[first:-1] show through it.

    backing: the link that it records then, None exactly for first 0. Raises Unsupported for a target that cannot be
    changed in place, InvalidInput for a range that is none.
    """
    _check(view, first, backing)
    file = _changeable(view, len(view.files) - 1)
    relink(header_head(file.fileno(), subject=file.path), backing, subject=file.path)  # is there room for it
    return _amendment(view, first, len(view.files) - 1, backing)


def plan_commit(view: ImageChain, first: int, *, backing: Backing | None) -> Amendment:
    """Plan that files[first] takes in what the files above it hold, and the view's size.

    backing: its link, which does not change. Raises as `plan_absorb`; nothing else may depend on files[first].
    """
    _check(view, first, backing)
    file = _changeable(view, first)
    assert file.header is not None
    if file.header.bitmaps:
        raise Unsupported("its persistent bitmaps would be wrong", subject=file.path)
    return _amendment(view, first, first, backing)


def _check(view: ImageChain, first: int, backing: Backing | None) -> None:
    if not 0 <= first < len(view.files) - 1:
        raise InvalidInput("the range must contain at least two files")
    if (backing is None) != (first == 0):
        raise InvalidInput("a merged file has a backing file exactly when the root is not among its inputs")


def _changeable(view: ImageChain, number: int) -> ImageFile:
    file = view.files[number]
    if file.header is None:
        raise Unsupported("a raw image is not merged in place", subject=file.path)
    if file.header.snapshots:
        raise Unsupported("its internal snapshots share its clusters", subject=file.path)
    if file.header.fields.autoclear_features & ~_AUTOCLEAR:
        raise Unsupported("unknown autoclear features are set; the file cannot be changed in place", subject=file.path)
    return file


def _amendment(view: ImageChain, first: int, target: int, backing: Backing | None) -> Amendment:
    file = view.files[target]
    assert file.header is not None
    image = ImageFd(file.fileno(), file_bytes(file.fileno()), file.header, file.path)
    merged = merged_extents(view, first, in_place=target)
    change = cells(view, target, merged, rooted=backing is None)
    del merged
    placed = allocate_clusters(image, change, size=view.size)
    shown = view.resolve()
    new, place = _targets(pieces_of(change.fresh, shown, view.files), placed.runs)
    held = _plain_runs(file)
    over, over_place = _targets(pieces_of(change.over, shown, view.files), held)
    used = placed.used_before
    blank = [
        _zeroes(change.fresh, shown, (placed.runs[0][used], placed.runs[1][used], placed.runs[2][used])),
        _zeroes(change.over, shown, held),
        behind_end(image, placed, size=view.size),
    ]
    entry, bitmap = _entries(image, change, placed, rooted=backing is None)
    del change, shown, held
    pieces = [(new, place), (over, over_place)]
    del new, place, over, over_place
    copies = Copies.concatenated(*(_plain(*part) for part in pieces))
    unpack_file, unpack_guest, unpack_target, unpack_length = _unpacked(pieces)
    return Amendment(
        view,
        target,
        backing,
        placed.end,
        copies,
        unpack_file,
        unpack_guest,
        unpack_target,
        unpack_length,
        np.concatenate([at for at, _ in blank]),
        np.concatenate([length for _, length in blank]),
        placed.cluster,
        entry,
        bitmap,
        placed.new_clusters,
    )


def _plain_runs(file: ImageFile) -> tuple[Int64s, Int64s, Int64s]:
    """(guest start, guest stop, place) of plain data, the last one as far as its cell reaches."""
    physical = file.physical
    plain = (physical.kind == DATA) & (physical.stored == 0)
    stop = physical.ends
    if len(stop):
        stop[-1] = end_of_last_cell(file)
    return physical.start[plain], stop[plain], physical.host[plain]


def _targets(pieces: Pieces, runs: tuple[Int64s, Int64s, Int64s]) -> tuple[Pieces, Int64s]:
    """Pieces cut where the target's runs end, and the place of each."""
    begins, ends, host = runs
    row, run, at, length = cut(pieces.guest, pieces.length, (begins, ends))
    moved = pieces[row]
    start = np.where(moved.stored == 0, moved.host + (at - moved.guest), moved.host)
    found = Pieces(at, length, moved.file, start, moved.stored, moved.whole)
    return found, host[run] + (at - begins[run])


def _plain(pieces: Pieces, place: Int64s) -> Copies:
    plain = pieces.stored == 0
    return Copies(pieces.file[plain], pieces.host[plain], place[plain], pieces.length[plain]).joined()


def _unpacked(parts: list[tuple[Pieces, Int64s]]) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """(file, guest, target, length) of what lies in compressed clusters."""
    packed = [(pieces, place, pieces.stored > 0) for pieces, place in parts]
    file = np.concatenate([pieces.file[rows] for pieces, _, rows in packed]).astype(np.int64)
    guest = np.concatenate([pieces.guest[rows] for pieces, _, rows in packed])
    length = np.concatenate([pieces.length[rows] for pieces, _, rows in packed])
    goes = np.concatenate([place[rows] for _, place, rows in packed])
    row, length = joined_runs([file, goes - guest], guest, length)
    return file[row], guest[row], goes[row], length


def _zeroes(chosen: Extents, shown: Extents, runs: tuple[Int64s, Int64s, Int64s]) -> tuple[Int64s, Int64s]:
    """(place, length) of the chosen bytes that read as zeroes, as far as they lie in these runs."""
    blank = where(chosen, shown.mapped(np.where(shown.val < DATA, np.int64(DATA), np.int64(ABSENT))))
    rows = blank.val >= DATA
    begins, ends, host = runs
    if not rows.any() or not len(begins):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    start, stop = blank.at[rows], blank.ends[rows]
    # Runs do not hold all of it: where they leave a gap, a new cluster comes, which is a hole.
    first = np.searchsorted(ends, start, side="right")
    count = np.maximum(np.searchsorted(begins, stop, side="left") - first, 0)
    row = np.repeat(np.arange(len(start)), count)
    run = first[row] + np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    at = np.maximum(begins[run], start[row])
    return host[run] + (at - begins[run]), np.minimum(ends[run], stop[row]) - at


def _entries(
    image: ImageFd, change: Cells, placed: ClusterAllocation, *, rooted: bool
) -> tuple[UInt64s, UInt64s | None]:
    """What the L2 entries of changed clusters become, and their bitmaps where there are subclusters."""
    guest = placed.cluster * image.header.cluster_size
    entry = np.where(placed.host != 0, placed.host.view(np.uint64) | np.uint64(COPIED), np.uint64(0))
    if not len(guest):
        return entry, entry if image.header.extended_l2 else None
    if image.header.extended_l2:
        bitmap = subcluster_bitmaps(guest, change.content, image.header.cluster_size)
        bitmap[placed.dropped] = 0
        return entry, bitmap
    if not rooted:
        zero = (placed.host == 0) & ~placed.dropped & (values_of(guest, change.content) == ZERO)
        entry[zero] = ZERO_FLAG
    return entry, None


# --- No write of an amendment may hit what the view shows from the file that is changed.
#
# The proof takes bytes at one place of one file for the same, before and after; this is what makes that true.


def check_overwrites(amendment: Amendment) -> None:
    """Raises Corrupt for an amendment that would overwrite what is to be seen; nothing was written then."""
    view = amendment.view
    shown = view.resolve()
    own = shown.mapped(np.where(shown.val == amendment.target, np.int64(DATA), np.int64(ABSENT)))
    pieces = pieces_of(own, shown, view.files)
    if not len(pieces):
        return
    order = np.argsort(pieces.host, kind="stable")
    start = pieces.host[order]
    length = np.where(pieces.stored > 0, pieces.stored, pieces.length)[order]
    reach = np.maximum.accumulate(start + length)
    for target, size in (
        (amendment.copies.target, amendment.copies.length),
        (amendment.unpack_target, amendment.unpack_length),
        (amendment.zero_target, amendment.zero_length),
    ):
        # How many visible stretches begin before each write ends, and whether any of those reaches into it.
        before = np.searchsorted(start, target + size, side="left")
        hit = (before > 0) & (reach[before - 1] > target)
        if hit.any():
            raise Corrupt(
                f"the merge would overwrite what is seen at offset {int(target[hit.argmax()])} of the file",
                subject=amendment.file.path,
                hint="this is a fault of snapchain: merge with --strategy new-file, and report it",
            )
