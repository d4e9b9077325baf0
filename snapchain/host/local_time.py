"""This machine's time zone, with its summer time."""

from __future__ import annotations

import os
from datetime import UTC, datetime, tzinfo
from functools import lru_cache
from pathlib import Path
from zoneinfo import ZoneInfo

LOCALTIME = Path("/etc/localtime")


def local_zone(rules: Path = LOCALTIME) -> tzinfo:
    """The zone of TZ or of /etc/localtime, with its rules: the offset of today is not that of last winter."""
    try:
        if name := os.environ.get("TZ", "").removeprefix(":"):
            return ZoneInfo(name)
        found = rules.stat()
        return _read(rules, found.st_ino, found.st_mtime_ns)
    except (OSError, ValueError, LookupError):  # TZ may also say "CET-1CEST", which ZoneInfo does not read
        return datetime.now().astimezone().tzinfo or UTC


@lru_cache(maxsize=4)
def _read(rules: Path, _inode: int, _mtime_ns: int) -> tzinfo:
    """The zone in a file, which is read again when it was replaced: a table of 10,000 rows asks for each of them."""
    with rules.open("rb") as file:
        return ZoneInfo.from_file(file, key=None)
