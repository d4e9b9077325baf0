"""A list of copies from files of a chain into one new file, as numpy columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from snapchain.image.assemble.pieces import joined_runs
from snapchain.image.physical import Int32s, Int64s, Mask


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Columns of equal length. file: number in the chain; source, target: file offsets; length: bytes."""

    file: Int32s
    source: Int64s
    target: Int64s
    length: Int64s

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, chosen: Mask | Int64s | slice) -> Copies:
        return Copies(self.file[chosen], self.source[chosen], self.target[chosen], self.length[chosen])

    @property
    def bytes(self) -> int:
        """Of all copies together."""
        return int(self.length.sum())

    def moved(self, offset: int) -> Copies:
        """With all targets moved up."""
        return replace(self, target=self.target + offset)

    def joined(self) -> Copies:
        """Neighbours that go on in the file and in the target, as one."""
        first, length = joined_runs([self.file, self.target - self.source], self.source, self.length)
        return Copies(self.file[first], self.source[first], self.target[first], length)

    @staticmethod
    def none() -> Copies:
        """Nothing to copy."""
        nothing = np.empty(0, np.int64)
        return Copies(nothing.astype(np.int32), nothing, nothing, nothing)

    @staticmethod
    def concatenated(*parts: Copies) -> Copies:
        """One list after another."""
        return Copies(
            np.concatenate([part.file for part in parts]),
            np.concatenate([part.source for part in parts]),
            np.concatenate([part.target for part in parts]),
            np.concatenate([part.length for part in parts]),
        )
