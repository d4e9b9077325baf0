"""By which other names this machine's mounts show a file: bind mounts, and a filesystem that is mounted twice."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

_ESCAPED = re.compile(rb"\\([0-7]{3})")
TABLE = Path("/proc/self/mountinfo")
_Mount = tuple[str, Path, Path]
"""The filesystem's number, which of its directories (or files) is shown, and where."""


def other_names(path: Path) -> list[Path]:
    """The other paths of a file or directory whose own path holds no symbolic links. [] where that cannot be told."""
    mounts = list(_mounts())
    # Of several mounts at one place the last one is seen.
    holding = [mount for mount in mounts if path.is_relative_to(mount[2])]
    if not holding:
        return []
    number, shown, at = max(reversed(holding), key=lambda mount: len(mount[2].parts))
    inside = shown / path.relative_to(at)
    names = [
        mounted / inside.relative_to(root)
        for filesystem, root, mounted in mounts
        if filesystem == number and inside.is_relative_to(root)
    ]
    return [name for name in dict.fromkeys(names) if name != path and _is_same(name, path)]


def _mounts() -> Iterator[_Mount]:
    try:
        lines = TABLE.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        fields = line.split()
        yield os.fsdecode(fields[2]), _path(fields[3]), _path(fields[4])


def _path(escaped: bytes) -> Path:
    return Path(os.fsdecode(_ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), escaped)))


def _is_same(name: Path, path: Path) -> bool:
    """Not so where another mount hides it, or it is not there."""
    try:
        return name.samefile(path)
    except OSError:
        return False
