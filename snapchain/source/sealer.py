"""Sealing the top of a chain, whoever uses it: what `sync` asks for before each round.

Today the image must be at rest.  A guest that runs is sealed through its monitor: another class of this protocol.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from snapchain.errors import Conflict
from snapchain.host.directory import open_behind
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.os_errors import os_errors
from snapchain.image.fingerprint import settle
from snapchain.model.events import OnEvent, ignore
from snapchain.model.fingerprint import Fingerprint
from snapchain.source import sealing as snapshot


class Sealer(Protocol):
    """Makes the top of a chain a layer that nobody writes to any more, with a fresh overlay on it."""

    def seal(self) -> Path:
        """Do it; the file that is sealed now. Afterwards the chain has one file more. Raises Busy."""
        ...


class OfflineSealer:
    """A Sealer of an image that no guest has open; the overlay comes in its place, under its path."""

    def __init__(
        self, image: Path, *, format: str | None = None, image_dirs: Sequence[Path] = (), on_event: OnEvent = ignore
    ) -> None:
        self._image, self._format, self._image_dirs, self._on_event = image, format, image_dirs, on_event

    def plan(self) -> snapshot.SnapshotPlan:
        """What `seal` would do. Raises what `snapshot.plan` raises."""
        return snapshot.plan(self._image, image_format=self._format, image_dirs=self._image_dirs)

    def seal(self) -> Path:
        """Raises Busy when somebody has the image open, and what `snapshot.plan` raises."""
        return snapshot.run(self.plan(), on_event=self._on_event).sealed


class SetSealer(Protocol):
    """As Sealer, for all disks of a guest, at one instant."""

    def seal(self) -> Sequence[Path]:
        """Do it; the files that are sealed now, in the order of the disks. Raises Busy: then none is sealed."""
        ...


class SealerOfOne:
    """The SetSealer of a guest with one disk."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    def seal(self) -> Sequence[Path]:
        """As the sealer."""
        return [self._sealer.seal()]


class OfflineSet:
    """A SetSealer of images that no guest has open: at rest, all instants are one, which is seen to."""

    def __init__(self, sealers: Sequence[OfflineSealer]) -> None:
        self._sealers = sealers

    def seal(self) -> Sequence[Path]:
        """Raises Busy when somebody has an image open, Conflict when one was written to before all were sealed.

        Then those that are sealed are no moment of the guest; the next run seals all once more.
        """
        planned = [sealer.plan() for sealer in self._sealers]
        with ExitStack() as locks:
            for each in planned:
                locks.enter_context(ImageLock(each.source, LockMode.WRITE))
            before = [_mark(each.source) for each in planned]
        sealed = [sealer.seal() for sealer in self._sealers]
        for path, mark in zip(sealed, before, strict=True):
            now = _mark(path)
            # The ctime does not count: sealing has moved it.
            if (now.inode, now.size, now.mtime_ns) != (mark.inode, mark.size, mark.mtime_ns):
                raise Conflict(
                    "it was written to while the other disks of its guest were being sealed",
                    subject=path,
                    hint="shut the guest down, and run it again",
                )
        return sealed


def _mark(path: Path) -> Fingerprint:
    with os_errors(path):
        fd = open_behind(path)
        try:
            return settle(fd)
        finally:
            os.close(fd)
