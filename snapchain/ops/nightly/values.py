"""How values of the configuration are written: sizes, times, shares, the window, and names of disks.

"500G"  "1.5 TiB"     bytes; K, M, G and T are powers of 1024, with or without iB or B
"90s"  "10min"  "6h"  seconds; minutes are `min` and never `m`, which retention rules use for months
"5%"                  a share
"22:00-06:00"         the hours in which work may begin, by the wall clock of a named time zone
"{parent}/{stem}"     the name of a disk: of /images/web1/vda.qcow2 it is web1/vda
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta, tzinfo
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from snapchain.errors import InvalidInput
from snapchain.model.disk_name import check_disk_name
from snapchain.model.quantities import parse_size

_SECONDS = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", re.ASCII)
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%", re.ASCII)
_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)\s*-\s*([01]\d|2[0-3]):([0-5]\d)", re.ASCII)
_FIELD = re.compile(r"\{([^{}]*)\}")
_FIELDS = ("stem", "name", "parent", "host")
_GUEST_FIELDS = ("guest", "host")
_LENGTHS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def to_bytes(value: object) -> object:
    """Bytes of "500G"; numbers pass. Raises ValueError."""
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except InvalidInput as error:
        raise ValueError(f'"{value}" is not a size: {error.hint}') from error


def to_seconds(value: object) -> object:
    """Seconds of "10min"; numbers pass. Raises ValueError."""
    if not isinstance(value, str):
        return value
    match = _SECONDS.fullmatch(value.strip())
    if match is None:
        raise ValueError(f'"{value}" is not a duration: write seconds, or "90s", "10min", "6h", "2d"')
    return float(match[1]) * _LENGTHS[match[2]]


def to_share(value: object) -> object:
    """0.05 of "5%"; numbers pass. Raises ValueError."""
    if not isinstance(value, str):
        return value
    match = _SHARE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f'"{value}" is not a share: write it like "5%"')
    return float(match[1]) / 100


Bytes = Annotated[int, BeforeValidator(to_bytes)]
Seconds = Annotated[float, BeforeValidator(to_seconds)]
Share = Annotated[float, BeforeValidator(to_share)]


@dataclass(frozen=True, slots=True)
class Window:
    """From `start` to `end`, which lies on the next day when it is not the later one."""

    start: time
    end: time

    @classmethod
    def parse(cls, text: str) -> Window:
        """Raises ValueError."""
        match = _WINDOW.fullmatch(text.strip())
        if match is None:
            raise ValueError(f'"{text}" is not a window: write it like "22:00-06:00"')
        hour, minute, end_hour, end_minute = map(int, match.groups())
        start, end = time(hour, minute), time(end_hour, end_minute)
        if start == end:
            raise ValueError(f'"{text}" is not a window: leave it out to allow any hour')
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


def check_template(template: str) -> str:
    """Raises ValueError for a template with unknown fields."""
    return _checked(template, _FIELDS)


def check_guest_template(template: str) -> str:
    """The same for the name of a guest."""
    return _checked(template, _GUEST_FIELDS)


def _checked(template: str, fields: tuple[str, ...]) -> str:
    # Not str.format: its fields may look into objects.
    for field in _FIELD.findall(template):
        if field not in fields:
            known = ", ".join(f"{{{each}}}" for each in fields)
            raise ValueError(f'"{{{field}}}" is not a field of a name: known are {known}')
    if set("{}") & set(_FIELD.sub("", template)):
        raise ValueError(f'"{template}" has an unmatched brace')
    return template


def disk_name(template: str, image: Path) -> str:
    """The name that the template gives an image. Raises InvalidInput when no disk can be named so."""
    values = {"stem": image.stem, "name": image.name, "parent": image.parent.name, "host": socket.gethostname()}
    return check_disk_name(_FIELD.sub(lambda match: values[match[1]], template))


def guest_name(template: str, guest: str) -> str:
    """The name that the template gives a guest. Raises InvalidInput when no disk could be named below it."""
    values = {"guest": guest, "host": socket.gethostname()}
    name = _FIELD.sub(lambda match: values[match[1]], template)
    check_disk_name(f"{name}/x")
    return name
