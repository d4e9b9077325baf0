"""Names by which a directory is known to be part of a replica, for all that must not take its files for anybody's.

ROOT/snapchain-replica.json        makes ROOT a replica
ROOT/DISK/catalogue.json           makes DISK the directory of a disk: its layers lie there
ROOT/DISK/active/web1.qcow2        the overlay of a guest, which stands on the newest layer
"""

from __future__ import annotations

from pathlib import Path

MARKER, CATALOGUE, ACTIVE = "snapchain-replica.json", "catalogue.json", "active"


def is_disk(directory: Path) -> bool:
    """Whether the layers of a disk at a replica lie there."""
    return (directory / CATALOGUE).is_file() and (directory.parent / MARKER).is_file()


def layers_of(directory: Path) -> Path | None:
    """Where the layers lie on which overlays in this directory stand; None where it holds no overlays of a replica."""
    return directory.parent if directory.name == ACTIVE and is_disk(directory.parent) else None
