"""The calendar by which points are kept: a time zone by name, or this machine's with its summer time."""

from __future__ import annotations

import os
from datetime import UTC, tzinfo
from pathlib import Path

from snapchain.errors import InvalidInput

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
            f"{name!r} is no time zone that this machine knows", hint="such as Europe/Berlin, or UTC"
        ) from error


def zone_name_of(name: str | None) -> str:
    """The name by which another host knows that zone, by default this machine's.

    Raises InvalidInput for one that is not known here, and where this machine's has no name.
    """
    if name is not None:
        zone_of(name)
        return name
    said = os.environ.get("TZ", "").removeprefix(":")
    if not said and _LOCALTIME.is_symlink():
        said = os.path.realpath(_LOCALTIME).rpartition("/zoneinfo/")[2]
    if not said and not _LOCALTIME.exists():
        return "UTC"
    try:
        zone_of(said or None)
        if said:
            return said
    except InvalidInput:
        pass
    raise InvalidInput("this machine's time zone has no name that another host would know", hint="say --time-zone")


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
