"""What a layer is read through: a disk up to that layer, whatever keeps it."""

from __future__ import annotations

from typing import Protocol

from snapchain.model.extents import Extents


class View(Protocol):
    """A disk as a guest sees it: an ImageChain, or a disk of a running guest. Offsets and sizes in bytes.

    size: virtual
    """

    @property
    def size(self) -> int: ...

    def resolve(self) -> Extents:
        """The composed map: DATA or more where it may hold data, less where it reads zero."""
        ...

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        """Fill `buffer` with what the guest sees from `offset` on. Thread-safe."""
        ...
