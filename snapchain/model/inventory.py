"""What a destination lacks, decided from two inventories and nothing else.

The source has layers, each known by an opaque key (a fingerprint, a content id).  A layer that the source made by
merging also says what it `replaces`, and which `empty` layers above it were merged into it.  The destination has layers
of its own, each made from one or more consecutive source layers.  Both chains are laid out over the same row of oldest
keys and compared from the root:

    source       a   b   cd[c d]   e         c and d were merged at the source
    destination  a+b     c   d               a and b were merged at the destination, c and d are separate

    UpToDate     the destination's chain covers exactly the source's
    Send         it covers a lower part: put the rest on top
    Collapse     it covers it, but holds apart what the source has merged: behind by a merge
    Diverged     each side has layers that the other lacks

A destination that holds merged what the source holds apart is not behind: it reads the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from snapchain.errors import InvalidInput

Same = Callable[[Hashable, Hashable], bool]
MAX_LAYERS = 200
"""QEMU opens chains of 200 files and no deeper."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One layer of the source.

    source:   its key
    replaces: the layers it was merged from, lowest first, where the source still knows them
    empty:    layers above it that held nothing and were merged into it, lowest first; the file is the same
    """

    source: Hashable
    replaces: tuple[Wanted, ...] = ()
    empty: tuple[Wanted, ...] = ()


@dataclass(frozen=True, slots=True)
class Held:
    """One layer of the destination.

    layer_id: its name there
    sources:  keys of the consecutive source layers it was made from, lowest first; empty when nobody knows
    """

    layer_id: str
    sources: tuple[Hashable, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Destination layers [first, stop) that are the one source layer `wanted`."""

    first: int
    stop: int
    wanted: int


@dataclass(frozen=True, slots=True)
class Inside:
    """The destination's chain ends inside a source layer: it holds some of the parts that this was merged from.

    rest:              keys of the parts that it does not hold, lowest first
    base_count, first: its lowest `base_count` layers are the lowest `first` source layers, as far up as ends meet
    """

    rest: tuple[Hashable, ...]
    base_count: int
    first: int


@dataclass(frozen=True, slots=True)
class UpToDate:
    """The destination's chain covers exactly what is wanted; `base_count` is its length."""

    base_count: int


@dataclass(frozen=True, slots=True)
class Send:
    """Put source layers `first` and up on the lowest `base_count` destination layers.

    The uppermost of those may hold parts of source layer `first`, which the source has merged since: putting it on top
    of them reads right, since merging is idempotent.
    `inside`: where the destination ends inside that layer, be it in the middle of one of its own
    """

    base_count: int
    first: int
    inside: Inside | None = None


@dataclass(frozen=True, slots=True)
class Collapse:
    """The destination holds apart what the source has merged: each of `merges` may be merged there too.

    Then source layers `first` and up go on top, as in `Send`; none when `first` is the number of layers wanted.
    `base_count` and the spans count destination layers as they are before any merge.
    """

    merges: tuple[Span, ...]
    base_count: int
    first: int
    inside: Inside | None = None


@dataclass(frozen=True, slots=True)
class Diverged:
    """The chains differ above the lowest `base_count` destination layers, which are source layers [0, first).

    ours:   keys that the source has and the destination does not; empty when the destination is merely ahead
    theirs: ids of the destination's layers beyond the common base

    A destination whose points may branch takes source layers `first` and up on its lowest `base_count` layers; one
    that holds a single chain has to be told which side to give up.
    """

    base_count: int
    first: int
    ours: tuple[Hashable, ...]
    theirs: tuple[str, ...]

    @property
    def is_related(self) -> bool:
        """Whether there is a common base at all."""
        return self.base_count > 0

    @property
    def is_ahead(self) -> bool:
        """Whether the destination holds all that is wanted, and more on top."""
        return not self.ours


Missing = UpToDate | Send | Collapse | Diverged


def missing(have: Sequence[Held], want: Sequence[Wanted], *, same: Same = operator.eq) -> Missing:
    """What makes the destination's chain `have` read as the source's chain `want`; both root first.

    same: whether two keys stand for one content; equality unless said otherwise

    Raises InvalidInput when nothing is wanted: a chain has at least a root.
    """
    if not want:
        raise InvalidInput("the source has no layers")
    row: list[Hashable] = []
    # How many destination layers end at each place of the row; only at their ends are two chains comparable.
    ends = {0: 0}
    for count, held in enumerate(have, start=1):
        row.extend(held.sources or (_UNKNOWN,))
        ends[len(row)] = count

    merges: list[Span] = []
    place = common_place = common_first = 0
    for number, wanted in enumerate(want):
        if place == len(row):
            return _covered(merges, base_count=len(have), first=number)
        reached = _follow(wanted, row, place, same)
        if reached is None:
            return _parted(have, want, base_count=ends[common_place], first=common_first, ahead=False)
        if not reached.whole:
            # The row ended inside this layer: the destination holds its lower parts.
            if place in ends:
                common_place, common_first = place, number
            inside = Inside(reached.rest, ends[common_place], common_first)
            return _covered(merges, base_count=len(have), first=number, inside=inside)
        if reached.place in ends:
            first, stop = ends[common_place], ends[reached.place]
            if common_place == place and stop - first > 1:
                merges.append(Span(first, stop, number))
            common_place, common_first = reached.place, number + 1
        place = reached.place
    if place < len(row):
        return _parted(have, want, base_count=ends[common_place], first=common_first, ahead=True)
    if merges:
        return _covered(merges, base_count=len(have), first=len(want))
    return UpToDate(len(have))


_UNKNOWN = object()


@dataclass(frozen=True, slots=True)
class _Reached:
    """Where in the row a wanted layer ends; not whole when the row ends inside it, before `rest`."""

    place: int
    whole: bool
    rest: tuple[Hashable, ...] = ()


def _follow(wanted: Wanted, row: Sequence[Hashable], place: int, same: Same) -> _Reached | None:
    """Follow one wanted layer along the row from `place` on. None when the row holds something else.

    Empty layers may be in the row, all or some of them: it reads the same.
    """
    pending = [(wanted, False)]  # (layer, is it empty); not recursive: one of years of nightly merges is nested as deep
    while pending:
        if place == len(row):
            rest = tuple(part.source for part, is_empty in reversed(pending) if not is_empty)
            return _Reached(place, whole=not rest, rest=rest)
        part, is_empty = pending.pop()
        pending.extend((each, True) for each in reversed(part.empty))
        if row[place] is not _UNKNOWN and same(row[place], part.source):
            place += 1
        elif part.replaces:
            pending.extend((each, is_empty) for each in reversed(part.replaces))
        elif not is_empty:
            return None
    return _Reached(place, whole=True)


def _covered(merges: Sequence[Span], *, base_count: int, first: int, inside: Inside | None = None) -> Send | Collapse:
    if merges:
        return Collapse(tuple(merges), base_count, first, inside)
    return Send(base_count, first, inside)


def _parted(have: Sequence[Held], want: Sequence[Wanted], *, base_count: int, first: int, ahead: bool) -> Diverged:
    ours = () if ahead else tuple(wanted.source for wanted in want[first:])
    return Diverged(base_count, first, ours, tuple(held.layer_id for held in have[base_count:]))
