"""Points that go because they were named, and not because rules let them go: what was decided elsewhere.

The points of a guest's disks go together or not at all, so a decision about one disk is made by looking at all.  Named
are the points that go, never those that stay: what others publish or hold meanwhile stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Protocol, TypeVar

from snapchain.errors import InvalidInput
from snapchain.model.retention.policy import Decision, Policy, RetentionPoint, decide


@dataclass(frozen=True, slots=True)
class DropPoints:
    """The points with these numbers go. Held ones stay all the same.

    newest: whether the last one of the disk may go, too; else it stays although it is named
    """

    numbers: frozenset[int]
    newest: bool = False


@dataclass(frozen=True, slots=True)
class DropAll:
    """Every point goes that is there when it is decided, and is not held."""


Rules = Policy | DropPoints
GuestRules = Rules | DropAll
"""Of the points of a guest. For a disk, DropAll is a DropPoints of all its numbers."""


class NumberedPoint(RetentionPoint, Protocol):
    """A point of one disk."""

    @property
    def point(self) -> int: ...

    @property
    def instant(self) -> str | None: ...


P = TypeVar("P", bound=NumberedPoint)


def decide_by(
    points: Sequence[P],
    rules: Rules,
    *,
    disk: str,
    zone: tzinfo,
    now: datetime | None,
    holds: Callable[[P], Sequence[str]],
) -> tuple[Decision[P], ...]:
    """A decision for every point, in the order given: by a policy as `decide`, or by the numbers of those that go.

    Raises InvalidInput for a policy for a disk with points of a guest: to keep some of them would tear guest points
    apart.
    """
    if isinstance(rules, Policy):
        if any(point.instant is not None for point in points):
            raise InvalidInput(
                "its points belong to points of a guest, which are kept or dropped as a whole",
                subject=disk,
                hint=f"name the guest: DEST::{disk.rpartition('/')[0]}",
            )
        return decide(points, rules, zone=zone, now=now, holds=holds)
    decisions = []
    for place, point in enumerate(points):
        reasons = list(holds(point))
        if point.point not in rules.numbers:
            reasons.append("not named")
        elif place == len(points) - 1 and not rules.newest:
            reasons.append("last shipped")
        decisions.append(Decision(point, bool(reasons), tuple(reasons or ["named"])))
    return tuple(decisions)
