"""Whether two chains read the same, by reading only where they could differ.

Two chains that stand on the same lower files need no look at what both take from those, nor at what both leave
zero.  So the proof of a merge costs what was merged, not the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from snapchain.image.chain import ImageChain
from snapchain.model.extents import DATA, pairwise

_PIECE = 4 << 20


def first_difference(
    old: ImageChain, new: ImageChain, *, shared: int, on_bytes: Callable[[int], None] = lambda _count: None
) -> int | None:
    """The first guest byte that reads otherwise, or None.

    shared: how many of the lowest files are the same files in both; on_bytes: told of each piece when it is compared.
    A difference in size counts as one at the end of the shorter. Errors as ImageChain.read_into.
    """
    if old.size != new.size:
        return min(old.size, new.size)
    maps = old.resolve(), new.resolve()
    mine, theirs = bytearray(_PIECE), bytearray(_PIECE)
    for start, stop in doubtful(old, new, shared=shared):
        for at in range(start, stop, _PIECE):
            count = min(_PIECE, stop - at)
            one, other = memoryview(mine)[:count], memoryview(theirs)[:count]
            old.read_into(at, one, resolved=maps[0])
            new.read_into(at, other, resolved=maps[1])
            if one != other:
                differs = np.frombuffer(one, np.uint8) != np.frombuffer(other, np.uint8)
                return at + int(differs.argmax())
            on_bytes(count)
    return None


def doubtful_bytes(old: ImageChain, new: ImageChain, *, shared: int) -> int:
    """How many bytes `first_difference` compares when it finds none."""
    return sum(stop - start for start, stop in doubtful(old, new, shared=shared))


def doubtful(old: ImageChain, new: ImageChain, *, shared: int) -> Iterator[tuple[int, int]]:
    """The ranges, ascending and apart, where two chains of one size could read differently."""
    at, left, right = pairwise(old.resolve(), new.resolve())
    zero = (left < DATA) & (right < DATA)
    same = (left == right) & (left >= DATA) & (left < shared)
    doubt = ~(zero | same)
    if not len(at):
        return
    fresh = np.flatnonzero(np.concatenate([[True], doubt[1:] != doubt[:-1]]))
    stops = np.append(at[fresh[1:]], old.size)
    chosen = doubt[fresh]
    yield from zip(at[fresh][chosen].tolist(), stops[chosen].tolist(), strict=True)
