"""The work behind each strategy, planned to the byte, and the one that is taken."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import Unsupported
from snapchain.host.directory import Directory
from snapchain.image import ImageChain
from snapchain.image.physical import Int64s
from snapchain.image.qcow2.header import Backing
from snapchain.merge.amendment import Amendment, plan_absorb, plan_commit
from snapchain.merge.assembly import Assembly, plan_assembly
from snapchain.merge.copying import share_range
from snapchain.merge.inputs import KeptFile, bitmaps
from snapchain.model.merging import Strategy, cheapest

_SPARE = 1 << 20
"""For what the filesystem itself needs to note."""
_MOST_RUNS = 1 << 19
"""In place, a plan takes some 300 bytes of memory for each run of the result, and each changes an L2 entry of its own.
With more runs a new file is better, which lays them in order, too, unless only the others find room."""


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """One way to make the result. Sizes in bytes. shares_extents: what moves is shared, not copied."""

    strategy: Strategy
    work: Assembly | Amendment
    shares_extents: bool

    @property
    def bytes_moved(self) -> int:
        """Shared or copied."""
        return self.work.bytes_moved

    @property
    def bytes_needed(self) -> int:
        """Room that it takes while the inputs are still there."""
        if isinstance(self.work, Assembly) and self.shares_extents:
            return self.work.layout.metadata_bytes + _SPARE
        return self.work.bytes_needed + _SPARE

    @property
    def cluster_size(self) -> int:
        """Of the result."""
        return self.work.geometry.cluster_size if isinstance(self.work, Assembly) else self.work.cluster_size

    @property
    def extended_l2(self) -> bool:
        """Of the result."""
        if isinstance(self.work, Assembly):
            return self.work.geometry.extended_l2
        return self.work.file.header is not None and self.work.file.header.extended_l2


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What bounds the choice.

    asked: the strategy, unless the best one is wanted; kept: lower inputs that stay as they are
    free: room in the result's directory; unlocks: files of this user's own count as writable
    """

    asked: Strategy | None
    cluster_size: int | None
    keep_inputs: bool
    drop_bitmaps: bool
    kept: Sequence[KeptFile]
    free: int
    unlocks: bool = False


def choose(
    view: ImageChain, first: int, *, backing: Backing | None, terms: Constraints, shares: Int64s, runs: int
) -> Method:
    """The strategy that is asked for, or the best one. view: up to the uppermost input.

    shares: guest bytes that each file of the view gives to the result. They tell what each way moves nearly to the
    byte, so that only the best one has to be planned: with millions of extents a plan is hundreds of MiB.
    runs: of the result's map

    Raises Unsupported, with the reason, where what is asked for does not fit.
    """
    asked = terms.asked
    if not terms.drop_bitmaps:
        asked = _keeping_bitmaps(view, first, terms)
    if asked is not None:
        return _way(asked, view, first, backing=backing, terms=terms)
    if terms.keep_inputs or terms.cluster_size is not None or shares_extents(view, first):
        return _way(Strategy.NEW, view, first, backing=backing, terms=terms)
    total = int(shares.sum())
    moved = {
        Strategy.NEW: total,
        Strategy.ABSORB: total - int(shares[len(view.files) - 1]),
        Strategy.COMMIT: total - int(shares[first]),
    }
    needed = {strategy: count + _SPARE for strategy, count in moved.items()}
    fits = {strategy for strategy, count in needed.items() if count <= terms.free}
    if runs > _MOST_RUNS and (Strategy.NEW in fits or not fits):
        return _way(Strategy.NEW, view, first, backing=backing, terms=terms)
    planned: set[Strategy] = set()
    while True:
        strategy = cheapest(moved, needed, free=terms.free)
        try:
            way = _way(strategy, view, first, backing=backing, terms=terms)
        except Unsupported:
            if strategy is Strategy.NEW:
                raise
            way = None
        # What is compressed stays so, if need be in a new file.
        if way is None or (isinstance(way.work, Amendment) and way.work.bytes_unpacked):
            del moved[strategy], needed[strategy]
            continue
        moved[strategy], needed[strategy] = way.bytes_moved, way.bytes_needed
        if strategy in planned or cheapest(moved, needed, free=terms.free) is strategy:
            return way
        planned.add(strategy)
        del way  # before the next one is planned


def _keeping_bitmaps(view: ImageChain, first: int, terms: Constraints) -> Strategy | None:
    """Those of the uppermost input stay true in its own file; those of the others would not in any."""
    held = bitmaps(view.files[first:])
    if not held:
        return terms.asked
    top_alone = len(held) == 1 and held[0][0] is view.top
    if top_alone and terms.asked in {None, Strategy.ABSORB} and not (terms.keep_inputs or terms.cluster_size):
        return Strategy.ABSORB
    file, names = held[0]
    raise Unsupported(
        f"it holds persistent bitmaps ({names}), which would be wrong after a merge",
        subject=file.path,
        hint="--drop-bitmaps merges without them; the next incremental backup must then read everything",
    )


def _way(strategy: Strategy, view: ImageChain, first: int, *, backing: Backing | None, terms: Constraints) -> Method:
    if strategy is Strategy.NEW:
        work = plan_assembly(view, first, backing=backing, cluster_size=terms.cluster_size)
        return Method(strategy, work, shares_extents(view, first))
    if terms.keep_inputs:
        raise Unsupported(
            f"strategy {strategy.value} writes to an input", subject=view.top.path, hint="new-file does not"
        )
    if terms.cluster_size not in {None, view.files[first if strategy is Strategy.COMMIT else -1].cluster_size}:
        raise Unsupported(
            f"strategy {strategy.value} cannot change the cluster size", subject=view.top.path, hint="new-file can"
        )
    target = view.files[first if strategy is Strategy.COMMIT else -1]
    if not _may_write(target.real_path, terms):
        raise Unsupported(f"strategy {strategy.value} writes to it, which is not allowed", subject=target.path)
    shared = shares_extents(view, first)
    if strategy is Strategy.ABSORB:
        return Method(strategy, plan_absorb(view, first, backing=backing), shared)
    _check_commit(view, first, kept=terms.kept)
    return Method(strategy, plan_commit(view, first, backing=backing), shared)


def _may_write(path: Path, terms: Constraints) -> bool:
    return os.access(path, os.W_OK) or (terms.unlocks and path.stat().st_uid == os.geteuid())


def _check_commit(view: ImageChain, first: int, *, kept: Sequence[KeptFile]) -> None:
    lowest = view.files[first]
    if kept:
        raise Unsupported(
            f"a commit would change the content of an input that must stay as it is: {kept[0].reason}",
            subject=kept[0].path,
            hint="the other strategies do not change it",
        )
    if lowest.real_path.parent != view.top.real_path.parent:
        raise Unsupported("the lowest input lies in another directory than the uppermost", subject=lowest.path)
    if not lowest.real_path.is_file():
        raise Unsupported("it is a device", subject=lowest.path)
    if lowest.header is not None and lowest.header.bitmaps:
        raise Unsupported("its persistent bitmaps would be wrong", subject=lowest.path)


def shares_extents(view: ImageChain, first: int) -> bool:
    """Whether new files beside the top can share the blocks of all the files from `first` on.

    Tried with one block and a file that never has a name.
    """
    try:
        with Directory.open(view.top.real_path.parent) as directory:
            block = os.fstatvfs(directory.fd).f_bsize
            probe = directory.create_unnamed()
    except OSError:  # no such files here, or no permission: then nothing is promised
        return False
    try:
        for file in view.files[first:]:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return False
            if status.st_size >= block and share_range(file.fileno(), 0, probe, 0, block) is not None:
                return False
    except OSError:  # a full or failing disk: the work itself will meet that, and say so
        return False
    finally:
        os.close(probe)
    return True
