"""Where tests make their files: in memory, if this machine has room there, and on the disk in `make soak`.

A run makes and removes a million small files. On ext4 each removal waits for the journal, 1 ms and more while a second
worker is busy, which was a third of a run; in memory it takes 0.02 ms. What file systems do differently is tested on
ones that are mounted for it (tests/ops/test_full_disk.py, tests/host/test_file_systems.py), and all in `make soak`.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.exhaustive import EXHAUSTIVE

MEMORY = Path("/dev/shm")
ROOM = 4 << 30
"""Bytes that must be free there and in memory; a run takes a quarter of it at once."""


def use_memory() -> None:
    """Let pytest make its temporary directories in memory, where nobody has told it another place."""
    if not EXHAUSTIVE and _has_room():
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def _has_room() -> bool:
    try:
        found = os.statvfs(MEMORY)
        facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return False
    available = int(facts["MemAvailable"].split()[0]) << 10
    programs = not found.f_flag & os.ST_NOEXEC  # tests write some and run them
    return programs and os.access(MEMORY, os.W_OK) and min(found.f_bavail * found.f_frsize, available) >= ROOM
