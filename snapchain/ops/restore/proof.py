"""A file or device that was just written is read back, and its content id is counted.

Only this proves a point from a replica, since the other side may send anything.  Data from a repository was proven
before it was written; this proves that the right bytes are in the file, at the right places.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, Self

from snapchain.errors import Corrupt
from snapchain.host.path_resolution import real_path
from snapchain.image import ImageChain, ImageFile, scan
from snapchain.image.backing import Place
from snapchain.image.leaves import counted
from snapchain.image.physical import RunBudget
from snapchain.image.pread import pread_into
from snapchain.image.raw import SECTOR
from snapchain.model.content import Sum, content_id, empty_sum
from snapchain.model.extents import Extents
from snapchain.ops.restore.output import OutputFile


def _unheard(count: int) -> None:
    """Nobody listens to the progress of a proof."""


class ChainProof:
    """Counts a chain of new files, layer by layer, root first; a context manager.

    The files are opened by descriptor: none of them has the name yet that the next one records.
    """

    def __init__(self) -> None:
        self._files: list[ImageFile] = []
        self._total: Sum = empty_sum()
        self._stack = ExitStack()

    def add(
        self,
        output: OutputFile,
        *,
        size: int,
        format: Literal["qcow2", "raw"] = "qcow2",
        on_bytes: Callable[[int], None] = _unheard,
    ) -> str:
        """The content id that the chain shows with this finished file on top.

        size: of the disk, which a raw file rounds up; on_bytes: told how much was read since it was last told
        Raises Corrupt, Unavailable.
        """
        place = Place(output.path, real_path(output.growing))
        file = ImageFile(place, os.dup(output.fd), format=format, budget=RunBudget())
        self._files.append(self._stack.enter_context(file))
        view = ImageChain(self._files, owned=False)
        below = ImageChain(self._files[:-1], owned=False) if len(self._files) > 1 else None
        self._total = counted(file.extents, view, below, self._total, on_bytes=on_bytes)
        if -(-size // SECTOR) * SECTOR != -(-view.size // SECTOR) * SECTOR:
            raise Corrupt(f"the new file shows {view.size} bytes, of {size}", subject=output.path)
        return content_id(size, self._total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ending: object) -> None:
        self._stack.close()


def chain_content_id(path: Path, *, format: Literal["qcow2", "raw"], size: int) -> str | None:
    """Of an image that is there already, with all it lies on; None where it has not the size of the disk.

    Raises as `scan`.
    """
    with scan(path, format=format) as chain:
        if -(-size // SECTOR) * SECTOR != -(-chain.top.size // SECTOR) * SECTOR:
            return None
        total = empty_sum()
        for place, file in enumerate(chain.files):
            below = chain.at(place - 1) if place else None
            total = counted(file.extents, chain.at(place), below, total, on_bytes=_unheard)
        return content_id(size, total)


def raw_content_id(fd: int, extents: Extents, *, subject: object) -> str:
    """Of the first bytes of a raw file or device. extents: its map; what is no DATA there must be zero."""
    view = _Bytes(fd, extents, subject)
    return content_id(extents.size, counted(extents, view, None, empty_sum(), on_bytes=_unheard))


class _Bytes(ImageChain):
    """The bytes of a descriptor under a map that is known."""

    def __init__(self, fd: int, extents: Extents, subject: object) -> None:
        super().__init__((), owned=False)
        self._fd, self._extents, self._subject = fd, extents, subject

    @property
    def size(self) -> int:
        return self._extents.size

    def resolve(self, *, upto: int | None = None) -> Extents:  # noqa: ARG002 -- there is one layer
        return self._extents

    def read_into(
        self,
        offset: int,
        buffer: memoryview,
        *,
        resolved: Extents | None = None,  # noqa: ARG002 -- a file answers for itself
    ) -> None:
        pread_into(self._fd, buffer, offset=offset, subject=self._subject)
