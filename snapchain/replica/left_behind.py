"""What a guest left in a replica when it went to another host, once it is back: files that hold nothing of their own.

    epoch 2   runs here, on active/vda-2.qcow2
    epoch 3   moved away: that file was marked and made read-only
    epoch 4   back, on active/vda-4.qcow2: what it wrote in epoch 2 lies in the layers below, or in that file

Only what was given to the very host that now gave it back: if another one took the guest over in between, at an older
point, these files may hold the only copy of what came after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from snapchain.errors import SnapchainError
from snapchain.host import files
from snapchain.host.locks import ImageLock, LockMode
from snapchain.image import scan
from snapchain.replica import names
from snapchain.replica.handover import check_unused
from snapchain.replica.store import ReplicaDisk
from snapchain.source.notes import Notes

_WRITE_BITS = 0o222


def remove_left_behind(disk: ReplicaDisk) -> list[Path]:
    """Remove those files of a disk; what was removed. The guest runs here, and the disk is locked.

    A file on which another image depends, or that a program has open, stays.
    """
    catalogue = disk.read()
    if catalogue is None or catalogue.handover is None:
        return []
    active = disk.path(names.ACTIVE).resolve()
    notes, found = Notes(), []
    for path in sorted(active.glob("*.qcow2")):
        given = notes.of(path).given
        if (
            given is not None
            and given.word_of is None
            and given.confirmed
            and not given.taken_over
            and given.disk == disk.name
            and given.epoch == catalogue.handover.epoch - 1
            and not path.is_symlink()
            and not path.stat().st_mode & _WRITE_BITS
        ):
            found.append(path)
    removed = []
    for path in _tops_first(disk, found):
        with suppress(SnapchainError):
            check_unused(disk, path)
            with ImageLock(path, LockMode.WRITE):
                files.remove(path)
            removed.append(path)
    if removed:
        notes.sweep(active)
    return removed


def _tops_first(disk: ReplicaDisk, paths: list[Path]) -> Iterator[Path]:
    """Each before the file that it lies on."""
    depth = {}
    for path in paths:
        with suppress(SnapchainError), scan(path, format="qcow2", image_dirs=[disk.directory]) as chain:
            depth[path] = len(chain.files)
    yield from sorted(depth, key=lambda path: -depth[path])
