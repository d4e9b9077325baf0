"""Numbers and times as people write and read them: 64M, 1.5 GiB, 2 min 5 s, 2026-11-30 22:15.

K, M, G, T are powers of 1024, as in qemu-img; a JSON object never holds anything but plain bytes and seconds.
Times are local, to the minute; a table names the zone once, in its head. A printed time can be pasted after the '@' of
an address: a time without seconds means the end of its minute. JSON has RFC 3339 in UTC.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

from snapchain.errors import InvalidInput
from snapchain.model.quantities import parse_size as parse_size  # noqa: PLC0414 - for the verbs, beside `size`


def parse_share(text: str) -> float:
    """0.05 of '5%' or of '0.05'; a share above nothing and up to all. Raises InvalidInput."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise InvalidInput(f"not a share: {text!r}", hint="write it like 5%")
    return share


def size(count: int | None) -> str:
    """'1.5 GiB'; '?' for None: unknown."""
    if count is None:
        return "?"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: float) -> str:
    """'0.3 s', '2 min 5 s', '1 h 10 min'."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def age(seconds: float) -> str:
    """'40 min', '26 h', '9 d': one number and its unit, for columns; never more than is true."""
    for limit, length, unit in ((60, 1, "s"), (3600, 60, "min"), (3 * 86400, 3600, "h")):
        if seconds < limit:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds // 86400)} d"


_LOCALTIME = Path("/etc/localtime")


def zone_of(name: str | None) -> tzinfo:
    """The zone of this name, by default the machine's. Raises InvalidInput for one that is not known here."""
    from zoneinfo import ZoneInfo

    if name is None:
        return _local()
    if name == "UTC":  # also where there is no database of zones
        return UTC
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, LookupError) as error:
        raise InvalidInput(
            f"{name!r} is not a time zone of this machine", hint="such as Europe/Berlin, or UTC"
        ) from error


def zone_name_of(name: str | None) -> str:
    """The name by which another host knows that zone, by default this machine's.

    Raises InvalidInput for one that is not known here, and where this machine's has no name.
    """
    if name is not None:
        zone_of(name)
        return name
    found = os.environ.get("TZ", "").removeprefix(":")
    if not found and _LOCALTIME.is_symlink():
        found = os.path.realpath(_LOCALTIME).rpartition("/zoneinfo/")[2]
    if not found and not _LOCALTIME.exists():
        return "UTC"
    try:
        zone_of(found or None)
        if found:
            return found
    except InvalidInput:
        pass
    raise InvalidInput("this machine's time zone has no name that another host knows", hint="name one with --time-zone")


def named_zone(name: str | None) -> tzinfo:
    """The zone of that name, by default this machine's, under the name that other hosts have for it, if it has one.

    Raises InvalidInput for a name that is not known here.
    """
    try:
        return zone_of(zone_name_of(name))
    except InvalidInput:
        return zone_of(name)


def _local() -> tzinfo:
    from snapchain.host.local_time import local_zone

    return local_zone(_LOCALTIME)


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
