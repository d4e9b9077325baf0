"""Spans of the calendar, written as restic writes them: `1y5m7d2h`.

y years, m months, w weeks, d days, h hours: in any order, each at most once.  `m` is months, never minutes.
Weeks are our own addition and count as 7 days.
"""

from __future__ import annotations

import re
from calendar import monthrange
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo

from snapchain.errors import InvalidInput

_PART = re.compile(r"([0-9]{1,7})([ymwdh])")
_BEGINNING = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Duration:
    """A span of the calendar; its length in seconds depends on where it ends."""

    years: int = 0
    months: int = 0
    days: int = 0
    hours: int = 0

    def before(self, moment: datetime, zone: tzinfo) -> datetime:
        """The moment that lies this long before another one, in UTC.

        Years, months and days go by the wall clock of `zone`, hours by the true clock.  A day that the month does
        not have becomes its last one: a month before 31 March is 28 or 29 February.
        """
        local = moment.astimezone(zone)
        months = local.year * 12 + local.month - 1 - self.years * 12 - self.months
        year, month = months // 12, months % 12 + 1
        if year < 1:
            return _BEGINNING
        day = min(local.day, monthrange(year, month)[1])
        try:
            wall = local.replace(year=year, month=month, day=day, fold=0) - timedelta(days=self.days)
            return wall.astimezone(UTC) - timedelta(hours=self.hours)
        except OverflowError:  # before the year 1
            return _BEGINNING

    def __str__(self) -> str:
        parts = ((self.years, "y"), (self.months, "m"), (self.days, "d"), (self.hours, "h"))
        return "".join(f"{number}{unit}" for number, unit in parts if number) or "0h"


def parse_duration(text: str) -> Duration:
    """`1y5m7d2h` as a Duration. Raises InvalidInput for anything else, and for no time at all."""
    parts = _PART.findall(text)
    numbers = {unit: int(number) for number, unit in parts}
    if "".join(number + unit for number, unit in parts) != text.strip() or len(numbers) != len(parts):
        raise InvalidInput("not a duration", subject=text, hint="write it like 1y5m7d2h: years, months, days, hours")
    if not any(numbers.values()):
        raise InvalidInput("a duration must be longer than nothing", subject=text, hint="write it like 7d or 12h")
    return Duration(
        years=numbers.get("y", 0),
        months=numbers.get("m", 0),
        days=numbers.get("w", 0) * 7 + numbers.get("d", 0),
        hours=numbers.get("h", 0),
    )
