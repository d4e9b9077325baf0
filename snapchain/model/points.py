"""Which point of a disk is meant: `latest`, a number, a label, or a time. The same at every destination.

A time names the newest point not after it. Written in full (RFC 3339) it is an instant; anything shorter is local and
means its end: 2026-11-30 and `yesterday` the end of that day, 2026-11 of the month, 2026-11-30 22:15 of the minute.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Protocol, TypeVar

from snapchain.errors import InvalidInput, NotFound

LATEST = "latest"
TODAY, YESTERDAY = "today", "yesterday"
RESERVED = frozenset({LATEST, TODAY, YESTERDAY})
"""Words that no label may be."""

_DATE = re.compile(r"(\d{4})-(\d\d)(?:-(\d\d))?", re.ASCII)
_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(:\d\d([.,]\d+)?)?([Zz]|[+-]\d\d:?\d\d)?", re.ASCII)
_TICK = timedelta(microseconds=1)


class Moment(Protocol):
    """A point, as far as it may be asked for."""

    @property
    def point(self) -> int: ...

    @property
    def time(self) -> datetime: ...

    @property
    def labels(self) -> tuple[str, ...]: ...


P = TypeVar("P", bound=Moment)


def chosen_point(disk: str, points: Sequence[P], wanted: str | None) -> P:
    """The point meant by the text after '@' of an address; None means the latest. points: ascending by number.

    A label names the newest point that bears it; a time, the newest point not after it (UTC where it names no zone).
    Raises NotFound.
    """
    if not points:
        raise NotFound("the disk has no point", subject=disk)
    if wanted is None or wanted == LATEST:
        return points[-1]
    if wanted.isascii() and wanted.isdecimal():
        number = wanted.lstrip("0")  # as text: there is no end to what a user may type
        for point in points:
            if str(point.point) == number:
                return point
        first, last = points[0].point, points[-1].point
        they = f"its only point is {first}" if first == last else f"its points are {first} to {last}"
        raise NotFound(f"the disk has no point {wanted[:40]}", subject=disk, hint=they)
    labelled = [point for point in points if wanted in point.labels]
    if labelled:
        return labelled[-1]
    moment = _moment(wanted)
    if moment is None:
        raise NotFound(
            f"{wanted!r} is no label of this disk, no number and no time",
            subject=disk,
            hint="latest, a number, a label, or a time: 2026-01-31, yesterday, 2026-01-31T22:00:00Z",
        )
    before = [point for point in points if point.time <= moment]
    if not before:
        oldest = min(points, key=lambda point: point.time)
        raise NotFound(
            f"the disk has no point as old as {moment.isoformat(timespec='seconds')}",
            subject=disk,
            hint=f"its oldest is point {oldest.point} of {oldest.time.isoformat(timespec='seconds')}",
        )
    return max(before, key=lambda point: (point.time, point.point))


def _moment(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def instant(text: str, *, now: datetime, zone: tzinfo) -> datetime | None:
    """The last instant that a date or a time means, None for other text. now: aware; zone: whose calendar it is."""
    if text in (TODAY, YESTERDAY):
        today = now.astimezone(zone).date()
        return _end_of(today - timedelta(days=text == YESTERDAY), zone)
    try:
        if date_parts := _DATE.fullmatch(text):
            year, month, day = (int(part or 0) for part in date_parts.groups())
            first = date(year, month, day or 1)
            return _end_of(first if day else _last_day(first), zone)
        if time_parts := _TIME.fullmatch(text):
            seconds, fraction, offset = time_parts.groups()
            moment = datetime.fromisoformat(text.upper())
            if offset is None:
                moment = moment.replace(tzinfo=zone, fold=1)  # of an hour that comes twice, the second
            if fraction is not None or (seconds and offset):
                return moment
            step = timedelta(seconds=1) if seconds else timedelta(minutes=1)
            return (moment.astimezone(UTC) + step) - _TICK
    except (ValueError, OverflowError):  # no such day; the ends of the calendar
        pass
    return None


def _last_day(first: date) -> date:
    return (first + timedelta(days=31)).replace(day=1) - timedelta(days=1)


def _end_of(day: date, zone: tzinfo) -> datetime:
    if day == date.max:
        return datetime.max.replace(tzinfo=UTC)
    following = day + timedelta(days=1)
    return datetime(following.year, following.month, following.day, tzinfo=zone).astimezone(UTC) - _TICK


def check_label(label: str) -> str:
    """Raises InvalidInput for a label that could be taken for a point's number, a time, or the end of an address."""
    if not label or len(label.encode()) > 100 or not label.isprintable() or label != label.strip():
        raise InvalidInput(f"{label!r} cannot be a label", hint="printable text of at most 100 bytes")
    if label in RESERVED or label[0].isdigit() or "@" in label or "::" in label:
        raise InvalidInput(
            f"{label!r} cannot be a label",
            hint=f"it may not be {', '.join(sorted(RESERVED))}, begin with a digit, or hold '@' or '::'",
        )
    return label
