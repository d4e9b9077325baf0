"""What a layer is read through: a disk up to that layer, whatever keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

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


@runtime_checkable
class ReadsPieces(Protocol):
    """A disk that reads several ranges together for less than one by one: those of a store that is far away."""

    def read_pieces(self, pieces: Sequence[tuple[int, memoryview]], /) -> None:
        """Fill each (offset, buffer), ascending and apart. Thread-safe."""
        ...


class _Reads(Protocol):
    def read_into(self, offset: int, buffer: memoryview, /) -> None: ...


def read_pieces(view: _Reads, pieces: Sequence[tuple[int, memoryview]]) -> None:
    """Fill each (offset, buffer), ascending and apart, together where the view can do that. Errors as the view's."""
    if isinstance(view, ReadsPieces):
        view.read_pieces(pieces)
        return
    for offset, buffer in pieces:
        view.read_into(offset, buffer)
