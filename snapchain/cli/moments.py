"""Times for people: local, to the minute; a table names the zone once, in its head. JSON has RFC 3339 in UTC.

What is printed can be pasted after the '@' of an address: a time without seconds means the end of its minute.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from snapchain.cli.time_zone import zone_name_of, zone_of
from snapchain.errors import InvalidInput


def moment(time: datetime, *, zone: bool = False) -> str:
    """'2026-11-30 22:15'; with its offset where that hour came twice, or, with `zone`, where it is not UTC.

    time: aware
    """
    here = zone_of(None)
    local = time.astimezone(here)
    wall = local.replace(tzinfo=None)
    twice = wall.replace(tzinfo=here, fold=0).utcoffset() != wall.replace(tzinfo=here, fold=1).utcoffset()
    named = twice or (zone and local.utcoffset() != timedelta(0))
    return f"{local.isoformat(sep=' ', timespec='minutes') if named else f'{wall:%Y-%m-%d %H:%M}'}"


def heading(title: str) -> str:
    """The title of a column of moments: 'time', or 'time (Europe/Berlin)' where the zone is not UTC."""
    return title if (name := _zone()) is None else f"{title} ({name})"


def _zone() -> str | None:
    here = zone_of(None)
    now = datetime.now(UTC)
    year = [now + timedelta(days=days) for days in (0, 91, 182, 273)]
    if all(time.astimezone(here).utcoffset() == timedelta(0) for time in year):
        return None
    try:
        return zone_name_of(None)
    except InvalidInput:  # a zone by rules alone
        return now.astimezone(here).tzname() or f"{now.astimezone(here):%z}"
