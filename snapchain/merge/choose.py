"""Which ranges to merge when the user gives rules and not layers.

What no merge may touch, and which views stay, gives the ranges that may be merged (model/choice.py).  Without a cap or
a budget all of them are; with a cap as few layers as suffice, at the least cost; with a budget what gains most
(model/choice.py).  Costs are first estimated from the maps; then each chosen merge is planned to the byte.  Where the
budget would not suffice, the choice is made again with the exact numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from snapchain.errors import Unsupported
from snapchain.host.replica_layout import layers_of
from snapchain.image.dependent_search import Dependents
from snapchain.merge.copying import shares_extents
from snapchain.merge.inputs import real_paths, users_of, why_not_own
from snapchain.merge.methods import into_of
from snapchain.merge.rates import FIXED_SECONDS, Rates, seconds_of
from snapchain.merge.request import MergeRequest
from snapchain.merge.stack import Stack
from snapchain.merge.step import MergeStep
from snapchain.model import choice as budget
from snapchain.model.choice import MergeRange, barred, segments
from snapchain.model.economics import Into
from snapchain.model.extents import Int64s
from snapchain.model.merging import Strategy
from snapchain.model.retention import decide as decide_retention

_ROUNDS = 6

PlanRange = Callable[[MergeRange], MergeStep]


@dataclass(slots=True)
class Chosen:
    """ranges: lowest first; stays: by place why a file is not merged away; notices: what the user should know."""

    ranges: tuple[MergeRange, ...] = ()
    stays: dict[int, list[str]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _View:
    """A sealed file as a point of the disk."""

    place: int
    time: datetime
    labels: tuple[str, ...]


def choose(stack: Stack, request: MergeRequest, rates: Rates, plan_range: PlanRange, others: Dependents) -> Chosen:
    """Choose the ranges that the rules, the cap and the budget of a request ask for.

    plan_range: plans one range to the byte; may raise Unsupported for files that cannot be merged: these stay

    others: what else depends on the files of the chain
    """
    chosen = Chosen()
    refused: set[int] = set()
    while True:
        chosen.stays = {}
        allowed = _allowed(stack, request, chosen, refused, others)
        try:
            chosen.ranges = _pick(stack, request, rates, allowed, plan_range)
        except Unsupported as error:
            culprit = _place_of(stack, error.subject)
            if culprit is None or culprit in refused:
                raise
            refused.add(culprit)
            chosen.notices.append(f"{error}: it stays as it is")
            continue
        _add_notice_of_cap(stack, request, chosen)
        return chosen


def _allowed(
    stack: Stack, request: MergeRequest, chosen: Chosen, refused: set[int], others: Dependents
) -> tuple[MergeRange, ...]:
    count = len(stack)
    confirmed = real_paths(request.remove)
    foreign = {} if request.flatten else _foreign(stack, confirmed)

    def stays(place: int, why: str) -> None:
        chosen.stays.setdefault(place, []).append(why)

    # A top that is written to after a merge is shipped as a whole again; without destinations that does not matter.
    with_top = not stack.present and request.policy.is_empty
    bars = barred(
        count,
        present=stack.present.values(),
        held={*stack.holds, *refused, *foreign},
        silent=stack.silent,
        root=not request.flatten,
        top=not with_top,
    )
    for place, holds in stack.holds.items():
        stays(place, "held: " + ", ".join(hold.tag for hold in holds))
    for place, lies in foreign.items():
        stays(place, lies)
    for place in refused:
        stays(place, "cannot be merged")
    for name, there in stack.present.items():
        if there:
            stays(there - 1, f"newest at {name}")
        for place in range(there, count):
            if place in bars:
                stays(place, f"not at {name}")
    kept: set[int] = set()
    if not request.policy.is_empty:
        views = [_View(place, *stack.sealed[place]) for place in range(count - 1)]
        for each in decide_retention(views, request.policy, zone=request.zone, now=request.now):
            if each.kept:
                kept.add(each.point.place)
                stays(each.point.place, each.reasons[0])
    for place, file in enumerate(stack.chain.files):
        # Their views must stay under their names.
        if (why := users_of(file.real_path, others, confirmed)) is not None:
            kept.add(place)
            stays(place, why)
    return segments(count, stays=bars, kept=kept)


def _foreign(stack: Stack, confirmed: Collection[Path]) -> dict[int, str]:
    """Files that other disks share, which would stay: a merge would only copy their data, once for each disk."""
    top = stack.chain.top
    layers = layers_of(top.real_path.parent)
    return {
        place: why
        for place, file in enumerate(stack.chain.files)
        if (why := why_not_own(file.real_path, top.path, confirmed)) is not None and file.real_path.parent != layers
    }


def _pick(
    stack: Stack, request: MergeRequest, rates: Rates, allowed: tuple[MergeRange, ...], plan_range: PlanRange
) -> tuple[MergeRange, ...]:
    freed = stack.gains.freed
    moved, shared = _moved(stack, request, allowed)
    removes = None if request.max_layers is None else max(0, len(stack) - request.max_layers)
    if not request.has_budget:
        if removes is None:
            found = allowed
        else:
            found = budget.cheapest(allowed, freed=freed, moved=moved, removes=removes)
        for each in found:
            plan_range(each)
        return found
    costs = _Costs(stack, request, rates, moved, shared=shared)
    found = ()
    for _ in range(_ROUNDS):
        table, whole = budget.combined(costs.tables())
        found = budget.best(allowed, freed=freed, cost=table, budget=whole, removes=removes)
        for each in found:
            costs.correct(each, plan_range(each))
        if costs.within(found):
            return found
    # The estimates were too low again and again: what is known to the byte decides.
    ranked = sorted(found, key=lambda each: (-freed[each.first, each.last], each.first))
    while ranked and not costs.within(ranked):
        ranked.pop()
    return tuple(sorted(ranked))


def _moved(stack: Stack, request: MergeRequest, allowed: tuple[MergeRange, ...]) -> tuple[Int64s, bool]:
    """Bytes that each range moves in the best way, and whether the filesystem shares them instead."""
    moved = stack.gains.moved
    if not allowed:
        return moved[Into.NEW], False
    if request.strategy is None or into_of(request.strategy) is Into.NEW:
        view = stack.chain.at(allowed[-1].last)
        if shares_extents(view, allowed[0].first):
            return moved[Into.NEW], True
    if request.strategy is not None:
        return moved[into_of(request.strategy)], False
    return np.minimum.reduce([moved[into] for into in Into]), False


class _Costs:
    """What each range costs of each budget: estimated, then corrected."""

    def __init__(self, stack: Stack, request: MergeRequest, rates: Rates, moved: Int64s, *, shared: bool) -> None:
        directory = stack.chain.top.real_path.parent
        way = (request.strategy or Strategy.NEW).value
        self._rates = rates
        self._request = request
        self._bytes = np.zeros(moved.shape) if shared else moved.astype(np.float64)
        self._seconds = moved / rates.rate(directory, way, shared=shared) + FIXED_SECONDS

    def tables(self) -> list[tuple[budget.Float64s, float]]:
        request = self._request
        found: list[tuple[budget.Float64s, float]] = []
        if request.budget_bytes is not None:
            found.append((self._bytes, request.budget_bytes))
        if request.budget_seconds is not None:
            # As whole microseconds.
            found.append((self._seconds * 1e6, request.budget_seconds * 1e6))
        return found

    def correct(self, place: MergeRange, plan: MergeStep) -> None:
        at = place.first, place.last
        self._bytes[at] = 0 if plan.shares_extents else plan.bytes_to_move
        self._seconds[at] = seconds_of(plan, self._rates)

    def within(self, ranges: tuple[MergeRange, ...] | list[MergeRange]) -> bool:
        return all(
            sum(float(table[each.first, each.last]) for each in ranges) <= whole for table, whole in self.tables()
        )


def _place_of(stack: Stack, subject: str | None) -> int | None:
    for place, file in enumerate(stack.chain.files):
        if subject in (str(file.path), str(file.real_path)):
            return place
    return None


def _add_notice_of_cap(stack: Stack, request: MergeRequest, chosen: Chosen) -> None:
    if request.max_layers is None:
        return
    left = len(stack) - sum(each.removes for each in chosen.ranges)
    if left > request.max_layers:
        why = "within the budget" if request.has_budget else "without a layer that must stay"
        chosen.notices.append(f"{left} layers are left, not {request.max_layers}: no more can be merged {why}")
