"""A stack of opened image files, root first: what the guest sees, and which file holds it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from types import TracebackType
from typing import Self

from snapchain.errors import InvalidInput
from snapchain.image.file import ImageFile
from snapchain.model.extents import DATA, Extents, fold


class ImageChain:
    """Opened files, root first. A context manager; a view made by `at` closes nothing."""

    def __init__(self, files: Sequence[ImageFile], *, owned: bool = True) -> None:
        """From at least one file; `owned` ones are closed with the chain."""
        self.files: tuple[ImageFile, ...] = tuple(files)
        self._owned = owned

    @property
    def top(self) -> ImageFile:
        """The file that the guest writes to."""
        return self.files[-1]

    @property
    def size(self) -> int:
        """Virtual size of the top, bytes."""
        return self.top.size

    def at(self, upto: int) -> ImageChain:
        """The chain as it was when file number `upto` was its top; shares the descriptors."""
        return ImageChain(self.files[: upto + 1], owned=False)

    def resolve(self, *, upto: int | None = None) -> Extents:
        """The composed map; DATA is the number of the owning file."""
        if upto is None or upto == len(self.files) - 1:
            return self._resolved
        return self.at(upto).resolve()

    @cached_property
    def _resolved(self) -> Extents:
        return fold(file.extents.owned_by(number) for number, file in enumerate(self.files))

    def changed(self) -> tuple[ImageFile, ...]:
        """The files that were modified or replaced since the scan."""
        return tuple(file for file in self.files if file.changed())

    def read_into(self, offset: int, buffer: memoryview, *, resolved: Extents | None = None) -> None:
        """Fill `buffer` with what the guest sees from `offset` on; `resolved` saves computing the map. Thread-safe.

        Errors as ImageFile.read_into.
        """
        view = buffer.cast("B")
        extents = self._resolved if resolved is None else resolved
        if not 0 <= offset <= offset + len(view) <= extents.size:
            raise InvalidInput(f"bytes {offset}+{len(view)} are outside the image", subject=self.top.path)
        run = int(extents.at.searchsorted(offset, side="right")) - 1
        last = len(extents.at) - 1
        done = 0
        while done < len(view):
            end = int(extents.at[run + 1]) if run < last else extents.size
            part = view[done : end - offset]
            owner = int(extents.val[run])
            if owner >= DATA:
                self.files[owner].read_into(offset + done, part)
            else:
                part[:] = bytes(len(part))
            done += len(part)
            run += 1

    def close(self) -> None:
        """Close the files, unless this is a view."""
        if self._owned:
            for file in self.files:
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
