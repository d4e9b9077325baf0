"""A policy is a set of rules; a point goes only when every one of them lets it go.

Rules are asked one by one and do not know of each other: the newest point of a Sunday is the newest of its hour,
day and week and counts for all three, as in restic.  Proxmox Backup Server differs in this one thing: there a
rule starts where the finer ones end, so the same numbers keep more.  restic's habit, since 0.16, of also keeping
the oldest point while a count is not used up is not followed.

Whatever the rules say, these stay: the newest by time; the last one shipped, which is another one when the source's
clock was set back; and those that somebody holds.  A held point counts for the rules as any other: it is the newest of
its day, or it is not.  Without any rule everything stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, tzinfo
from typing import Generic, TypeVar

from snapchain.errors import InvalidInput
from snapchain.model.retention.duration import Duration
from snapchain.model.retention.rules import (
    UNLIMITED,
    Opinion,
    Period,
    RetentionPoint,
    keep_label,
    keep_last,
    keep_period,
    keep_within,
)

P = TypeVar("P", bound=RetentionPoint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The `--keep-*` options. A count of 0 is no rule, UNLIMITED never runs out.

    Raises InvalidInput for another negative count.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: Duration | None = None
    labels: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("last", *(period.value for period in Period)):
            if getattr(self, name) < UNLIMITED:
                raise InvalidInput("a count of points cannot be negative", subject=f"keep-{name}")

    @property
    def is_empty(self) -> bool:
        """Whether there is no rule at all."""
        return not any(getattr(self, field.name) for field in fields(self))

    def count_of(self, period: Period) -> int:
        """The count of one period's rule."""
        counts = {
            Period.HOUR: self.hourly,
            Period.DAY: self.daily,
            Period.WEEK: self.weekly,
            Period.MONTH: self.monthly,
            Period.YEAR: self.yearly,
        }
        return counts[period]


@dataclass(frozen=True, slots=True)
class Decision(Generic[P]):
    """What becomes of one point: for a kept one the reasons to keep it, for another one why each rule let it go."""

    point: P
    kept: bool
    reasons: tuple[str, ...]


def _unheld(_: object) -> Sequence[str]:
    return ()


def decide(
    points: Sequence[P],
    policy: Policy,
    *,
    zone: tzinfo,
    now: datetime | None = None,
    holds: Callable[[P], Sequence[str]] = _unheld,
) -> tuple[Decision[P], ...]:
    """A decision for every point, in the order given.

    points: in the order in which they were shipped; of equal times the later shipped one is the newer
    zone:   whose calendar says what an hour, a day and so on is
    now:    lets `within` leave out points of the future; None trusts all times
    holds:  why a point stays whatever the rules say, one text for each reason

    Raises InvalidInput for a point whose time has no zone.
    """
    for point in points:
        if point.time.utcoffset() is None:
            raise InvalidInput("its time has no zone", subject=point)
    if policy.is_empty:
        return tuple(Decision(point, kept=True, reasons=("no rule given",)) for point in points)
    newest_first = sorted(range(len(points)), key=lambda place: (points[place].time, place), reverse=True)
    opinions = _opinions([points[place] for place in newest_first], policy, zone=zone, now=now)
    decisions: dict[int, Decision[P]] = {}
    for rank, place in enumerate(newest_first):
        heard = [rule[rank] for rule in opinions]
        reasons = [opinion.reason for opinion in heard if opinion.keeps]
        if rank == 0:
            reasons.insert(0, "newest")
        elif place == len(points) - 1:
            reasons.insert(0, "last shipped")
        reasons = [*holds(points[place]), *reasons]
        kept = bool(reasons)
        decisions[place] = Decision(points[place], kept, tuple(reasons or [opinion.reason for opinion in heard]))
    return tuple(decisions[place] for place in range(len(points)))


def _opinions(
    points: Sequence[RetentionPoint], policy: Policy, *, zone: tzinfo, now: datetime | None
) -> list[list[Opinion]]:
    """What each rule that is set says of the points, which come newest first."""
    opinions = []
    if policy.last:
        opinions.append(keep_last(points, policy.last))
    opinions.extend(
        keep_period(points, period, policy.count_of(period), zone=zone) for period in Period if policy.count_of(period)
    )
    if policy.within is not None:
        opinions.append(keep_within(points, policy.within, zone=zone, now=now))
    opinions.extend(keep_label(points, label) for label in sorted(policy.labels))
    return opinions
