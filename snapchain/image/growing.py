"""A qcow2 file that is still being written, read by its planned layout, before it has a header and tables."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np

from snapchain.image.file import ImageFile
from snapchain.image.fingerprint import fingerprint_of
from snapchain.image.physical import Physical, PhysicalBuilder, RunBudget, Runs
from snapchain.image.qcow2.layout import Layout
from snapchain.model.extents import DATA, ZERO, Extents


class GrowingFile(ImageFile):
    """An ImageFile by its layout alone; it has no header yet. Bytes of DATA that are not written read as zeroes."""

    def __init__(self, path: Path, fd: int, layout: Layout) -> None:
        """fd: stays the caller's; a copy of it is held. Compressed clusters are not read."""
        self.path = self.real_path = path
        self.chosen_by = None
        self.format = "qcow2"
        self.header = None
        self._local = threading.local()
        self._fd = os.dup(fd)
        status = os.fstat(fd)
        self.fingerprint = fingerprint_of(status)
        self.device = (status.st_dev, status.st_ino)
        self.physical = _physical(layout, path)

    def shown_extents(self) -> Extents:
        """The extents of the layout: a hole in the file may be data that has not arrived yet."""
        return self.physical.extents()

    def became(self, finished: ImageFile) -> bool:
        """Whether the tables of the finished file lead to the bytes that were read here."""
        mine, theirs = self.physical, finished.physical
        if finished.device != self.device or mine.size != theirs.size or len(mine) != len(theirs):
            return False
        data = mine.kind == DATA
        return bool(
            np.array_equal(mine.start, theirs.start)
            and np.array_equal(mine.kind, theirs.kind)
            and np.array_equal(mine.host[data], theirs.host[data])
            and not theirs.stored.any()
        )


def _physical(layout: Layout, path: Path) -> Physical:
    extents = layout.extents
    zero = extents.val == ZERO
    runs = Runs.concatenated(
        Runs.plain(layout.guest, layout.guest + layout.length, kind=DATA, host=layout.host),
        Runs.plain(extents.at[zero], extents.ends[zero], kind=ZERO, host=-1),
    )
    # The header that the layout was made from has been checked, so its cost is bounded.
    builder = PhysicalBuilder(layout.size, budget=RunBudget(2 * len(runs) + 1), subject=path)
    builder.add(runs[np.argsort(runs.start, kind="stable")])
    return builder.finish()
