"""What was just written to a file or device is read back, and the content id counted of what it shows.

A point that comes from a replica is believed only so: the other side may say anything.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from snapchain.image import ImageChain, ImageFile
from snapchain.image.backing import Place
from snapchain.image.physical import RunBudget
from snapchain.image.pread import pread_into
from snapchain.model.content import Sum, content_id, empty_sum
from snapchain.model.extents import Extents
from snapchain.ops.output import OutputFile
from snapchain.replica.leaves import counted


class ChainProof:
    """Counts a chain of new qcow2 files, layer by layer, root first; a context manager.

    The files are opened as they are, by descriptor: none of them has its name yet by which the next one knows it.
    """

    def __init__(self) -> None:
        self._files: list[ImageFile] = []
        self._total: Sum = empty_sum()
        self._stack = ExitStack()

    def add(self, output: OutputFile) -> str:
        """The content id that the chain shows with this finished file on top. Raises Corrupt, Unavailable."""
        place = Place(output.path, Path(os.path.realpath(output.growing)))
        file = ImageFile(place, os.dup(output.fd), format="qcow2", budget=RunBudget())
        self._files.append(self._stack.enter_context(file))
        view = ImageChain(self._files, owned=False)
        below = ImageChain(self._files[:-1], owned=False) if len(self._files) > 1 else None
        self._total = counted(file.extents, view, below, self._total, on_bytes=_unheard)
        return content_id(view.size, self._total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ending: object) -> None:
        self._stack.close()


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


def _unheard(count: int) -> None:
    """Nobody listens to the progress of a proof."""
