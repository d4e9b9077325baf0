"""A policy is a set of rules; a point goes only when every one of them lets it go.

Rules are asked one by one and do not know of each other: the newest point of a Sunday is the newest of its hour,
day and week and counts for all three, as in restic.  Proxmox Backup Server differs in this one thing: there a
rule starts where the finer ones end, so the same numbers keep more.  restic's habit, since 0.16, of also keeping
the oldest point while a count is not used up is not followed.  Semantics are otherwise restic's (doc/060_forget.rst)
and those of Proxmox Backup Server (pruning):

- of each period only its newest point counts;
- periods follow the calendar of the time zone: weeks run from Monday to Sunday (ISO 8601), so the turn of the
  year may fall inside one; hours that the clock shows twice in autumn are two hours;
- periods without points do not count: 7 daily points may reach back further than 7 days;
- `within` reaches back from the newest point, or from the clock where that is earlier, so that a disk that is no
  longer shipped keeps what it has.  Points whose time is in doubt (clocks.py) are not shown to any rule.

Whatever the rules say, these stay: the newest by time; the last one shipped, which is another one when the source's
clock was set back; those whose time is in doubt (clocks.py); and held points.  A held point counts for the rules as
any other: it is the newest of its day, or it is not.  Without any rule everything stays.

A new rule is a field of Policy, a function here, and a line in `_opinions`: the options of the command line, the keys
of nightly's configuration and the message to a replica follow from the fields.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Generic, Protocol, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    ValidationError,
)

from snapchain.errors import InvalidInput
from snapchain.model.points import check_label
from snapchain.model.retention.clocks import backdated, doubts, eras as eras_of
from snapchain.model.retention.duration import Duration, parse_duration

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


P = TypeVar("P", bound=RetentionPoint)


Count = Annotated[int, Field(ge=UNLIMITED, le=1 << 31)]
Label = Annotated[str, AfterValidator(check_label)]
Span = Annotated[
    InstanceOf[Duration] | None,
    BeforeValidator(lambda value: parse_duration(value) if isinstance(value, str) else value),
    PlainSerializer(lambda value: None if value is None else str(value)),
]


class Policy(BaseModel):
    """Which points to keep: `Policy(daily=7, weekly=4, labels=frozenset({"release"}))`.

    A count of 0 is no rule, and -1 (UNLIMITED) keeps all. `within` is a duration as restic writes it: 1y5m7d2h. The
    fields are the options `--keep-*`, the keys of a `[keep]` table, and fields of a message to a replica. `title` is
    the help of the option. Raises InvalidInput for another negative count, a text that is not a duration or a label,
    and an unknown rule. Its subject is the rule, or what is wrong in it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    last: Count = Field(default=0, title="The newest N points.")
    hourly: Count = Field(default=0, title="The newest point of each of N hours.")
    daily: Count = Field(default=0, title="The newest point of each of N days.")
    weekly: Count = Field(default=0, title="The newest point of each of N weeks.")
    monthly: Count = Field(default=0, title="The newest point of each of N months.")
    yearly: Count = Field(default=0, title="The newest point of each of N years.")
    within: Span = Field(default=None, title="All points of the last 1y5m7d2h.")
    labels: Annotated[frozenset[Label], PlainSerializer(sorted)] = Field(
        default=frozenset(), title="All points with this label. May be repeated."
    )

    if not TYPE_CHECKING:  # type checkers know the fields

        def __init__(self, /, **rules: object) -> None:
            try:
                super().__init__(**rules)
            except ValidationError as error:
                raise _invalid(error) from error

        # As a field of another model a policy is validated with it: errors then name its place there.
        __init__.__pydantic_base_init__ = True

    @property
    def is_empty(self) -> bool:
        """Whether there is no rule at all."""
        return not any(getattr(self, name) for name in Policy.model_fields)

    def count_of(self, period: Period) -> int:
        """The count of one period's rule."""
        count: int = getattr(self, period.value)
        return count


def _invalid(error: ValidationError) -> InvalidInput:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    return cause if isinstance(cause, InvalidInput) else InvalidInput(first["msg"], subject=first["loc"][0])


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
        return tuple(Decision(point, kept=True, reasons=("no rule given",)) for point in points)
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
        decisions.append(Decision(point, kept, tuple(reasons or [opinion.reason for opinion in mine])))
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
