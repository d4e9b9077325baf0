"""This machine's time zone, with its summer time."""

from __future__ import annotations

import os
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

LOCALTIME = Path("/etc/localtime")


def local_zone(rules: Path = LOCALTIME) -> tzinfo:
    """The zone of TZ or of /etc/localtime, with its rules: the offset of today is not that of last winter."""
    try:
        if name := os.environ.get("TZ", "").removeprefix(":"):
            return ZoneInfo(name)
        with rules.open("rb") as file:
            return ZoneInfo.from_file(file, key=None)
    except (OSError, ValueError, LookupError):  # TZ may also say "CET-1CEST", which ZoneInfo does not read
        return datetime.now().astimezone().tzinfo or UTC
