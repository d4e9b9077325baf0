"""A policy is a set of rules; a point goes only when every one of them lets it go.

Rules are asked one by one and do not know of each other: the newest point of a Sunday is the newest of its hour,
day and week and counts for all three, as in restic.  Proxmox Backup Server differs in this one thing: there a
rule starts where the finer ones end, so the same numbers keep more.  restic's habit, since 0.16, of also keeping
the oldest point while a count is not used up is not followed.

Whatever the rules say, these stay: the newest by time; the last one shipped, which is another one when the source's
clock was set back; those whose time is in doubt (clocks.py); and those that somebody holds.  A held point counts for
the rules as any other: it is the newest of its day, or it is not.  Without any rule everything stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, tzinfo
from typing import Generic, TypeVar

from snapchain.errors import InvalidInput
from snapchain.model.retention.clocks import Doubt, backdated, doubts, eras as eras_of
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
    """What becomes of one point: for a kept one the reasons to keep it, for another one why each rule let it go.

    doubt: why its time does not count
    """

    point: P
    kept: bool
    reasons: tuple[str, ...]
    doubt: Doubt | None = None


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
    now:    the clock of this run; None trusts all times
    holds:  why a point stays whatever the rules say, one text for each reason

    Raises InvalidInput for a point whose time has no zone.
    """
    for point in points:
        if point.time.utcoffset() is None:
            raise InvalidInput("its time has no zone", subject=point)
    times = [point.time for point in points]
    doubtful = [None] * len(points) if now is None else doubts(times, now)
    if policy.is_empty:
        return tuple(
            Decision(point, kept=True, reasons=("no rule given",), doubt=doubt)
            for point, doubt in zip(points, doubtful, strict=True)
        )
    back = [False] * len(points) if now is None else backdated(times, doubtful)
    era = [0] * len(points) if now is None else eras_of(times)

    def heard(places: Sequence[int]) -> dict[int, list[Opinion]]:
        """What each rule says of the points at these places."""
        newest_first = sorted(places, key=lambda place: (times[place], place), reverse=True)
        opinions = _opinions([(points[place], era[place]) for place in newest_first], policy, zone=zone, now=now)
        return {place: [rule[rank] for rule in opinions] for rank, place in enumerate(newest_first)}

    judged = [place for place, doubt in enumerate(doubtful) if doubt is None]
    counted = [place for place in judged if not back[place]]
    newest = max(counted, key=lambda place: (times[place], place), default=None)
    opinions = heard(judged) | heard(counted)
    decisions = []
    for place, (point, doubt) in enumerate(zip(points, doubtful, strict=True)):
        reasons = list(holds(point))
        if doubt is not None:
            reasons.append(doubt.value)
        elif place == newest:
            reasons.append("newest")
        elif place == len(points) - 1:
            reasons.append("last shipped")
        mine = opinions.get(place, [])
        reasons += [opinion.reason for opinion in mine if opinion.keeps]
        kept = bool(reasons)
        decisions.append(Decision(point, kept, tuple(reasons or [opinion.reason for opinion in mine]), doubt))
    return tuple(decisions)


def _opinions(
    points: Sequence[tuple[RetentionPoint, int]], policy: Policy, *, zone: tzinfo, now: datetime | None
) -> list[list[Opinion]]:
    """What each rule that is set says of the points, which come newest first, each with its era."""
    shown, eras = [point for point, _ in points], [era for _, era in points]
    opinions = []
    if policy.last:
        opinions.append(keep_last(shown, policy.last))
    opinions.extend(
        keep_period(shown, period, policy.count_of(period), zone=zone, eras=eras)
        for period in Period
        if policy.count_of(period)
    )
    if policy.within is not None:
        opinions.append(keep_within(shown, policy.within, zone=zone, now=now))
    opinions.extend(keep_label(shown, label) for label in sorted(policy.labels))
    return opinions
