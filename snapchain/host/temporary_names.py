"""Names of files that are not finished yet: `.NAME.PURPOSE-<random>`, beside the file NAME that they are to become."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

NEW = "new"
"""A small file that is replaced as a whole."""
MERGE = "merge"
SNAPSHOT = "snapshot"
RESTORE = "snapchain-part"
ACTIVE = "active"
"""The overlay at a replica into which a guest migrates."""

_RANDOM_BYTES = 4
_HEX = 2 * _RANDOM_BYTES
_LONGEST = 255
_NAME = re.compile(rf"\.(.+)\.(?:([a-z-]+)-[0-9a-f]{{{_HEX}}}|({RESTORE}))", re.DOTALL)
"""Restores of version 0.1 had no random digits."""


class Temporary(NamedTuple):
    """A parsed name. target: the file that it is to become; its name is cut where it was too long."""

    target: Path
    purpose: str


def temporary_beside(path: Path, *, purpose: str) -> Path:
    """An unused name in the directory of `path`, cut to 255 bytes."""
    import secrets  # inside: it loads OpenSSL, for which a command that only reads need not wait

    tail = f".{purpose}-{secrets.token_hex(_RANDOM_BYTES)}"
    name = path.name.encode()[: _LONGEST - 1 - len(tail)].decode(errors="ignore")
    return path.with_name(f".{name}{tail}")


def temporary_of(path: Path) -> Temporary | None:
    """The parts of a temporary name; None for another name."""
    found = _NAME.fullmatch(path.name)
    return None if found is None else Temporary(path.with_name(found[1]), found[2] or found[3])
