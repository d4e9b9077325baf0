"""Which layers of a chain may become one: what must stay where it is, and what views must remain.

    places      0 1 2 3 4 5 6 7        barred 0, 7: in no merge at all
    may be       [1 2 3][4 5 6]        kept 3: its view remains, so it may only be the uppermost of a merge

barred   the root (unless it is to be merged too), the top, what is held, what some destination lacks, and the newest
         layer that a destination shares with this chain: the next shipment builds on it
kept     views that a rule of retention names
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snapchain.errors import InvalidInput
from snapchain.model.extents import Int64s


@dataclass(frozen=True, slots=True, order=True)
class MergeRange:
    """Layers `first` to `last`, both included, counted from the root, are to become one."""

    first: int
    last: int

    @property
    def removes(self) -> int:
        """By how many layers the chain becomes shorter."""
        return self.last - self.first


def barred(
    count: int,
    *,
    present: Collection[int] = (),
    held: Collection[int] = (),
    silent: Collection[int] = (),
    root: bool = True,
    top: bool = True,
) -> frozenset[int]:
    """The places of a chain of `count` layers that no merge may touch.

    present: for each destination how many layers, from the root on, it holds; held: places that stay as they are;
    silent: layers that say nothing: no shipment brings one to a destination, so above what all destinations hold they
    may be merged with each other; root, top: whether the ends stay

    Raises InvalidInput when a destination holds more layers than there are.
    """
    if any(not 0 <= there <= count for there in present):
        raise InvalidInput(f"a destination cannot hold {max(present)} of {count} layers")
    stays = set(range(min(present, default=count), count))
    stays -= {place for place in silent if place >= max(present, default=0)}
    stays |= {there - 1 for there in present if there}
    stays |= {place for place in held if 0 <= place < count}
    if count and root:
        stays.add(0)
    if count and top:
        stays.add(count - 1)
    return frozenset(stays)


def segments(count: int, *, stays: Collection[int], kept: Collection[int] = ()) -> tuple[MergeRange, ...]:
    """The longest ranges that may be merged, lowest first; each part of one may be merged too.

    stays: places in no range; kept: places that may only be the uppermost of a range
    """
    found: list[MergeRange] = []
    first = 0
    for place in range(count + 1):
        if place == count or place in stays:
            if place - first > 1:
                found.append(MergeRange(first, place - 1))
            first = place + 1
        elif place in kept:
            if place > first:
                found.append(MergeRange(first, place))
            first = place + 1
    return tuple(found)


# --- Which merges of a chain to do: as few as suffice at the least cost, or as much as a budget allows.
#
# cheapest   the cap: so many layers fewer, no more; bytes moved less bytes freed are as few as can be
# best       the budget: bytes freed, then layers removed, are as many as can be
#
# "Best gain per byte moved" is asked of the budget as a whole.  The set of the highest ratio would often be one tiny
# merge, which leaves the rest of the budget unused; with the bytes to move given, the most bytes freed are the best
# ratio.  That is the knapsack problem, with ranges that must not overlap: walking up the chain, for the layers so far
# all sets are kept that are not worse than another one in cost and gain at once (Bellman's recurrence on Pareto
# fronts). Their number may grow exponentially, in theory; past FRONT of them they are thinned evenly, and the choice is
# then a good one that keeps to the budget, not surely the best.

Float64s = npt.NDArray[np.float64]

FRONT = 10_000
"""Sets kept for all places of a chain together; a chain of 8 layers has 64 at most."""
_WHOLE = 1 << 30
_NEVER = np.iinfo(np.int64).max // 4


def most_removable(allowed: Sequence[MergeRange]) -> int:
    """By how many layers a chain can become shorter."""
    return sum(each.removes for each in allowed)


def cheapest(allowed: Sequence[MergeRange], *, freed: Int64s, moved: Int64s, removes: int) -> tuple[MergeRange, ...]:
    """Merges that make the chain shorter by `removes` layers, or by as many as can be; lowest first. Exact.

    allowed: ranges that, with every part of them, may be merged (choice.segments)
    freed, moved: int64[n, n], bytes of each range [first, last]

    Of equal costs, the one with fewer merges wins.
    """
    removes = min(removes, most_removable(allowed))
    # One more than the largest number of merges, so that their number decides among equals.
    scale = removes + 1
    costs = np.full(removes + 1, _NEVER, np.int64)
    costs[0] = 0
    steps: list[tuple[dict[int, Int64s], MergeRange]] = []
    for span in allowed:
        rows: dict[int, Int64s] = {span.first: costs}
        came: dict[int, Int64s] = {}
        for place in range(span.first, span.last + 1):
            row = rows[place].copy()
            start = np.full(removes + 1, -1, np.int64)
            for first in range(max(span.first, place - removes), place):
                shift = place - first
                net = (int(moved[first, place]) - int(freed[first, place])) * scale + 1
                offered = rows[first][: removes + 1 - shift] + net
                better = offered < row[shift:]
                row[shift:][better] = offered[better]
                start[shift:][better] = first
            rows[place + 1], came[place + 1] = row, start
        costs = np.minimum(rows[span.last + 1], _NEVER)
        steps.append((came, span))
    return _walked_back(steps, removes)


def _walked_back(steps: Sequence[tuple[dict[int, Int64s], MergeRange]], removes: int) -> tuple[MergeRange, ...]:
    chosen: list[MergeRange] = []
    for came, span in reversed(steps):
        place = span.last + 1
        while place > span.first:
            first = int(came[place][removes])
            if first < 0:
                place -= 1
                continue
            chosen.append(MergeRange(first, place - 1))
            removes -= place - 1 - first
            place = first
    return tuple(reversed(chosen))


def combined(costs: Sequence[tuple[Float64s, float]]) -> tuple[Int64s, int]:
    """One table of costs, and its budget, for several kinds of cost that each have a budget of their own.

    A choice within it is within each of them, since a sum of maxima is at least the maximum of sums. Where two budgets
    are nearly used up, a little of both may be left.
    """
    if len(costs) == 1:
        table, budget = costs[0]
        return np.ceil(table).astype(np.int64), int(budget)
    shares = [np.ceil(table * (_WHOLE / max(budget, 1e-9))) for table, budget in costs]
    return np.minimum(np.maximum.reduce(shares), _NEVER).astype(np.int64), _WHOLE


@dataclass(frozen=True, slots=True)
class _Set:
    """Merges of the layers so far. before: the same without the last of them."""

    cost: int
    freed: int
    removed: int
    last: MergeRange | None = None
    before: _Set | None = None

    def ranges(self) -> tuple[MergeRange, ...]:
        found: list[MergeRange] = []
        at: _Set | None = self
        while at is not None:
            if at.last is not None:
                found.append(at.last)
            at = at.before
        return tuple(reversed(found))


def best(
    allowed: Sequence[MergeRange], *, freed: Int64s, cost: Int64s, budget: int, removes: int | None = None
) -> tuple[MergeRange, ...]:
    """Merges that cost no more than `budget` together and free the most bytes; lowest first.

    allowed: ranges that, with every part of them, may be merged (choice.segments)
    freed, cost: int64[n, n] of each range [first, last], 0 or more; the budget is in units of cost
    removes: when given, first of all come as near as can be to so many layers fewer, and not beyond

    Of equal gains the one that removes more layers wins, then the one that costs less.  Exact up to FRONT sets.
    """
    front = [_Set(0, 0, 0)]
    places = sum(each.removes + 1 for each in allowed)
    room = max(16, FRONT // max(places, 1))
    for span in allowed:
        fronts = {span.first: front}
        for place in range(span.first, span.last + 1):
            sets = list(fronts[place])
            for first in range(span.first, place):
                price, gain, step = int(cost[first, place]), int(freed[first, place]), place - first
                sets += [
                    _Set(each.cost + price, each.freed + gain, each.removed + step, MergeRange(first, place), each)
                    for each in fronts[first]
                    if each.cost + price <= budget and (removes is None or each.removed + step <= removes)
                ]
            fronts[place + 1] = _thinned(_undominated(sets, by_layers=removes is not None), room)
        front = fronts[span.last + 1]
    if removes is None:
        return max(front, key=lambda each: (each.freed, each.removed, -each.cost)).ranges()
    return max(front, key=lambda each: (each.removed, each.freed, -each.cost)).ranges()


def _undominated(sets: list[_Set], *, by_layers: bool) -> list[_Set]:
    """The sets that no other set equals or beats in everything; cheapest first.

    by_layers: how many layers are removed counts for itself, else only among sets that free as much
    """
    sets.sort(key=lambda each: (each.cost, -each.freed, -each.removed))
    kept: list[_Set] = []
    if not by_layers:
        top = (-1, -1)
        for each in sets:
            if (each.freed, each.removed) > top:
                top = (each.freed, each.removed)
                kept.append(each)
        return kept
    # A limit: a set that removes fewer leaves room for another merge, so only sets that remove equally many are
    # compared.
    most = [-1] * (max(each.removed for each in sets) + 1)
    for each in sets:
        if each.freed > most[each.removed]:
            kept.append(each)
            most[each.removed] = each.freed
    return kept


def _thinned(sets: list[_Set], room: int) -> list[_Set]:
    """At most `room` of them, evenly spread over their costs, both ends among them."""
    if len(sets) <= room:
        return sets
    chosen = np.unique(np.linspace(0, len(sets) - 1, room).round().astype(np.int64))
    return [sets[place] for place in chosen.tolist()]
