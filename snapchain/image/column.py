"""A numpy array that grows at its end without ever existing twice.

Chunks in a list that are joined at the end need twice their memory, and the allocator keeps the first half.  A large
block keeps its pages when it is resized (glibc's realloc moves mappings), so a column costs its length and the spare
part of its last step.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T", bound=np.generic)
_FIRST_STEP = 4096


class Column(Generic[T]):
    """Append batches, then take the whole array."""

    def __init__(self, dtype: type[T]) -> None:
        self._held: npt.NDArray[T] = np.empty(0, dtype)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, more: npt.NDArray[T]) -> None:
        """Add at the end."""
        length = self._length + len(more)
        if length > len(self._held):
            # No view of the array leaves this class before `take`, so there is nothing for numpy to check.
            self._held.resize(max(length, _FIRST_STEP, len(self._held) * 5 // 4), refcheck=False)
        self._held[self._length : length] = more
        self._length = length

    def sort(self) -> npt.NDArray[T]:
        """Sort in place; returns a view that is valid until the next append."""
        view = self._held[: self._length]
        view.sort()
        return view

    def take(self) -> npt.NDArray[T]:
        """The whole array; the column is empty afterwards."""
        held = self._held
        held.resize(self._length, refcheck=False)
        self._held, self._length = np.empty(0, held.dtype), 0
        return held
