"""What is sealed, read and shipped: one disk of this host, whatever keeps it.

An image that no guest has open (source/at_rest.py), or a disk of a running guest (guest/source.py): this is sealed
through its QEMU, and the layers below the active one are read as images at rest.  No use case locks, scans or seals by
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path
from typing import Protocol

from snapchain.image import ImageChain


class Scope(Enum):
    """How much of a chain is read."""

    ALL = "all"
    SEALED = "sealed"
    """All but the top, which a guest will go on writing to."""
    PAUSED = "paused"
    """All; a guest that is paused may have the top open."""


class Sealer(Protocol):
    """Makes the top of a chain a layer that nobody writes to any more, with a fresh overlay on it."""

    def seal(self) -> Path:
        """Do it; the file that is sealed now. Afterwards the chain has one file more. Raises Busy."""
        ...


class SetSealer(Protocol):
    """As Sealer, for all disks of a guest, at one instant."""

    def seal(self) -> Sequence[Path]:
        """Do it; the files that are sealed now, in the order of the disks. Raises Busy: then none is sealed."""
        ...


class Source(Sealer, Protocol):
    """One disk of this host. image: the path by which it is known, the top of its chain, in a format as of `scan`"""

    @property
    def image(self) -> Path: ...

    @property
    def image_format(self) -> str | None: ...

    def opened(self, scope: Scope = Scope.ALL) -> AbstractContextManager[ImageChain]:
        """Its chain, locked against writers as far as `scope` says; released at the end of the block.

        Raises Busy when somebody writes to it, InvalidInput when nothing of it is sealed and only that is meant.
        """
        ...

    def check_unchanged(self, chain: ImageChain) -> None:
        """Raises Conflict when an opened chain was written to since."""
        ...

    def check_not_given(self, chain: ImageChain) -> None:
        """Raises Conflict when the disk was given to another host."""
        ...

    def epoch(self, chain: ImageChain) -> int:
        """In which epoch this host writes the disk, as far as it is noted."""
        ...

    def note_epoch(self, epoch: int) -> None:
        """This host writes the disk in an epoch from now on, unless it does so in a newer one."""
        ...
