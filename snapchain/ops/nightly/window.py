"""The hours in which work may be begun: "22:00-06:00", by the wall clock of a named time zone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta, tzinfo

_TEXT = re.compile(r"([01]\d|2[0-3]):([0-5]\d)\s*-\s*([01]\d|2[0-3]):([0-5]\d)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Window:
    """From `start` to `end`, which lies on the next day when it is not the later one."""

    start: time
    end: time

    @classmethod
    def parse(cls, text: str) -> Window:
        """Raises ValueError."""
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise ValueError(f'"{text}" is no window: write it like "22:00-06:00"')
        hour, minute, end_hour, end_minute = map(int, match.groups())
        start, end = time(hour, minute), time(end_hour, end_minute)
        if start == end:
            raise ValueError(f'"{text}" is no window: leave it out if any hour will do')
        return cls(start, end)

    def closes(self, now: datetime, zone: tzinfo) -> datetime | None:
        """When the window that is open at `now` closes, in UTC; None when it is shut."""
        today = now.astimezone(zone).date()
        for day in (today - timedelta(days=1), today):
            # Through UTC: subtracting local times would miss that the clocks were changed in between.
            opened = datetime.combine(day, self.start, zone).astimezone(UTC)
            last = day if self.end > self.start else day + timedelta(days=1)
            closed = datetime.combine(last, self.end, zone).astimezone(UTC)
            if opened <= now < closed:
                return closed
        return None

    def __str__(self) -> str:
        return f"{self.start:%H:%M}-{self.end:%H:%M}"
