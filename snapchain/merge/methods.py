"""The strategies: what each would move and need, planned to the byte, and which one is taken.

A new strategy is a member of `Strategy`, a module with a class that implements `Method`, and an entry in `_KINDS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from snapchain.errors import Unsupported
from snapchain.image import ImageChain, ImageFile
from snapchain.image.physical import Int64s
from snapchain.image.qcow2.header import Backing
from snapchain.merge import in_place, new_file
from snapchain.merge.copying import SPARE, shares_extents
from snapchain.merge.inputs import KeptFile, bitmaps
from snapchain.merge.request import MergeRequest
from snapchain.model.economics import Into
from snapchain.model.events import OnEvent
from snapchain.model.merging import Strategy, cheapest

if TYPE_CHECKING:
    from snapchain.host.locks import ImageLock
    from snapchain.merge.journal import OpenJournal
    from snapchain.merge.step import MergeStep

_MOST_RUNS = 1 << 19
"""In place, a plan takes some 300 bytes of memory for each run of the result, and each changes an L2 entry of its own.
With more runs a new file is better, which lays them in order, too, unless only the others find room."""


class Method(Protocol):
    """One way to make the result, planned. Sizes in bytes.

    bytes_moved: shared or copied; bytes_needed: room that it takes while the inputs are still there
    shares_extents: what moves is shared, not copied; unpacks: compressed clusters do not stay compressed
    cluster_size, extended_l2: of the result
    """

    @property
    def strategy(self) -> Strategy: ...

    @property
    def bytes_moved(self) -> int: ...

    @property
    def bytes_needed(self) -> int: ...

    @property
    def shares_extents(self) -> bool: ...

    @property
    def unpacks(self) -> bool: ...

    @property
    def cluster_size(self) -> int: ...

    @property
    def extended_l2(self) -> bool: ...

    def make(self, step: MergeStep, old: ImageChain, *, locks: Sequence[ImageLock], on_event: OnEvent) -> OpenJournal:
        """Make the result, prove it, and let it take its place; what is left to do is in the journal.

        locks: of the inputs, against writers at least. Whatever this raises, the chain reads as before.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Kind:
    """plan: (view, first input, link of the result, request, whether extents are shared) -> the method.

    into: where the result comes to be, for estimates from the maps alone
    """

    plan: Callable[[ImageChain, int, Backing | None, MergeRequest], Method]
    into: Into


_KINDS = {
    Strategy.NEW: _Kind(new_file.plan, Into.NEW),
    Strategy.ABSORB: _Kind(in_place.plan_absorb, Into.UPPER),
    Strategy.COMMIT: _Kind(in_place.plan_commit, Into.LOWER),
}


def into_of(strategy: Strategy) -> Into:
    """Where a strategy's result comes to be."""
    return _KINDS[strategy].into


def choose(
    view: ImageChain,
    first: int,
    request: MergeRequest,
    *,
    backing: Backing | None,
    kept: Sequence[KeptFile],
    free: int,
    shares: Int64s,
    runs: int,
) -> Method:
    """The strategy that is requested, or the best one. view: up to the uppermost input.

    kept: lower inputs that stay as they are; free: room in the result's directory, bytes
    shares: guest bytes that each file of the view gives to the result. By them, what each strategy moves is known
    nearly to the byte, so that only the best one has to be planned: with millions of extents a plan is hundreds of MiB.
    runs: of the result's map

    Raises Unsupported, with the reason, where the requested strategy does not fit.
    """

    def planned(strategy: Strategy) -> Method:
        return _planned(strategy, view, first, request, backing=backing, kept=kept)

    requested = request.strategy if request.drop_bitmaps else _keeping_bitmaps(view, first, request)
    if requested is not None:
        return planned(requested)
    if request.keep_inputs or request.cluster_size is not None or shares_extents(view, first):
        return planned(Strategy.NEW)
    total = int(shares.sum())
    stays = {Into.NEW: 0, Into.UPPER: int(shares[len(view.files) - 1]), Into.LOWER: int(shares[first])}
    moved = {strategy: total - stays[kind.into] for strategy, kind in _KINDS.items()}
    needed = {strategy: count + SPARE for strategy, count in moved.items()}
    fits = {strategy for strategy, count in needed.items() if count <= free}
    if runs > _MOST_RUNS and (Strategy.NEW in fits or not fits):
        return planned(Strategy.NEW)
    known: set[Strategy] = set()
    while True:
        strategy = cheapest(moved, needed, free=free)
        try:
            method = planned(strategy)
        except Unsupported:
            if strategy is Strategy.NEW:
                raise
            method = None
        # What is compressed stays so, if need be in a new file.
        if method is None or method.unpacks:
            del moved[strategy], needed[strategy]
            continue
        moved[strategy], needed[strategy] = method.bytes_moved, method.bytes_needed
        if strategy in known or cheapest(moved, needed, free=free) is strategy:
            return method
        known.add(strategy)
        del method  # before the next one is planned


def _keeping_bitmaps(view: ImageChain, first: int, request: MergeRequest) -> Strategy | None:
    """Persistent bitmaps of the uppermost input stay true in its own file; bitmaps of other inputs do in no file."""
    held = bitmaps(view.files[first:])
    if not held:
        return request.strategy
    top_alone = len(held) == 1 and held[0][0] is view.top
    fits = request.strategy in {None, Strategy.ABSORB} and not (request.keep_inputs or request.cluster_size)
    if top_alone and fits:
        return Strategy.ABSORB
    file, names = held[0]
    raise Unsupported(
        f"it holds persistent bitmaps ({names}), which would be wrong after a merge",
        subject=file.path,
        hint="--drop-bitmaps merges without them; the next incremental backup must then read everything",
    )


def _planned(
    strategy: Strategy,
    view: ImageChain,
    first: int,
    request: MergeRequest,
    *,
    backing: Backing | None,
    kept: Sequence[KeptFile],
) -> Method:
    into = into_of(strategy)
    if into is not Into.NEW:
        _check_in_place(strategy, view, view.files[first if into is Into.LOWER else -1], request)
    if into is Into.LOWER:
        _check_lowest(view, view.files[first], kept=kept)
    return _KINDS[strategy].plan(view, first, backing, request)


def _check_in_place(strategy: Strategy, view: ImageChain, target: ImageFile, request: MergeRequest) -> None:
    """Raises Unsupported for an input that a strategy may not write to."""
    if request.keep_inputs:
        raise Unsupported(
            f"strategy {strategy.value} writes to an input", subject=view.top.path, hint="new-file does not"
        )
    if request.cluster_size not in {None, target.cluster_size}:
        raise Unsupported(
            f"strategy {strategy.value} cannot change the cluster size", subject=view.top.path, hint="new-file can"
        )
    path = target.real_path
    if not os.access(path, os.W_OK) and not (request.unlocks and path.stat().st_uid == os.geteuid()):
        raise Unsupported(f"strategy {strategy.value} writes to it, which is not allowed", subject=target.path)


def _check_lowest(view: ImageChain, lowest: ImageFile, *, kept: Sequence[KeptFile]) -> None:
    """Raises Unsupported for a lowest input that cannot take the place of the uppermost."""
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
