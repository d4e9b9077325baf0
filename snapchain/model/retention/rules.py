"""The rules of retention: each looks at all points, newest first, and has an opinion on each of them.

`keep_last` and `keep_period` count; `keep_within` and `keep_label` do not.  Semantics are restic's
(doc/060_forget.rst) and, up to one difference told in policy.py, those of Proxmox Backup Server (pruning):

- of each period only its newest point counts;
- periods follow the calendar of the time zone: weeks run from Monday to Sunday (ISO 8601), so the turn of the
  year may fall inside one; hours that the clock shows twice in autumn are two hours;
- periods without points do not count: 7 daily points may reach back further than 7 days;
- `within` reaches back from the newest point, or from the clock where that is earlier, so that a disk that is no
  longer shipped keeps what it has.  Points whose time is in doubt (clocks.py) are not shown to any rule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from enum import Enum
from typing import Protocol

from snapchain.model.retention.duration import Duration

UNLIMITED = -1
"""A count that never runs out."""


class RetentionPoint(Protocol):
    """What the rules ask of a point: its time, with a zone, and its labels."""

    @property
    def time(self) -> datetime: ...

    @property
    def labels(self) -> Collection[str]: ...


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one rule says of one point, and why."""

    keeps: bool
    reason: str


class Period(Enum):
    """The periods of which a newest point may be kept; the value names the rule and its option."""

    HOUR = "hourly"
    DAY = "daily"
    WEEK = "weekly"
    MONTH = "monthly"
    YEAR = "yearly"

    def name_of(self, local: datetime) -> str:
        """The period in which a local time lies: equal exactly when two times lie in the same one."""
        return _NAMES[self](local)


def _week(local: datetime) -> str:
    year, week, _ = local.isocalendar()
    return f"{year:04}-W{week:02}"


_NAMES: dict[Period, Callable[[datetime], str]] = {
    Period.HOUR: lambda local: f"{local:%Y-%m-%d %H:00%z}",  # the offset tells an hour from its repetition
    Period.DAY: lambda local: f"{local:%Y-%m-%d}",
    Period.WEEK: _week,
    Period.MONTH: lambda local: f"{local:%Y-%m}",
    Period.YEAR: lambda local: f"{local:%Y}",
}


def keep_last(points: Sequence[RetentionPoint], count: int) -> list[Opinion]:
    """The newest `count` points."""
    total = "all" if count == UNLIMITED else str(count)
    return [
        Opinion(keeps=True, reason=f"last {place} of {total}")
        if count == UNLIMITED or place <= count
        else Opinion(keeps=False, reason=f"not among the last {count}")
        for place, _ in enumerate(points, start=1)
    ]


def keep_period(
    points: Sequence[RetentionPoint], period: Period, count: int, *, zone: tzinfo, eras: Sequence[int]
) -> list[Opinion]:
    """The newest point of each of the newest `count` periods that have any; of each era, where clocks disagree.

    eras: of each point (clocks.py)
    """
    total = "all" if count == UNLIMITED else str(count)
    places: dict[str, int] = {}
    seen: set[tuple[str, int]] = set()
    opinions = []
    for point, era in zip(points, eras, strict=True):
        name = period.name_of(point.time.astimezone(zone))
        if (name, era) in seen:
            opinions.append(Opinion(keeps=False, reason=f"{period.value}: a newer point stands for {name}"))
            continue
        seen.add((name, era))
        place = places.setdefault(name, len(places) + 1)
        if count == UNLIMITED or place <= count:
            opinions.append(Opinion(keeps=True, reason=f"{period.value} {place} of {total}: {name}"))
        else:
            opinions.append(Opinion(keeps=False, reason=f"{period.value}: {name} is not among the last {count}"))
    return opinions


def keep_within(
    points: Sequence[RetentionPoint], duration: Duration, *, zone: tzinfo, now: datetime | None
) -> list[Opinion]:
    """All points younger than `duration` before the newest one, or before `now` where that is earlier."""
    times = [point.time for point in points]
    if not times:
        return []
    limit = duration.before(min(max(times), now or max(times)), zone)
    return [
        Opinion(keeps=True, reason=f"within {duration} of the newest")
        if time > limit
        else Opinion(keeps=False, reason=f"older than {duration} before the newest")
        for time in times
    ]


def keep_label(points: Sequence[RetentionPoint], label: str) -> list[Opinion]:
    """All points that bear the label."""
    return [
        Opinion(keeps=True, reason=f"label {label}")
        if label in point.labels
        else Opinion(keeps=False, reason=f"no label {label}")
        for point in points
    ]
