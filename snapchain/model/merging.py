"""Merges of layers: the strategies, the choice between them by exact bytes, and a merge as every plan shows it.

new-file   what survives goes into a new file, shared or copied; the inputs are not written to
absorb     the uppermost input takes in what the lower ones show through it, in its own file
commit     the lowest input takes in what the upper ones hold, and then the path of the uppermost
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

_NEARLY = 1.05
"""A new file leaves its inputs whole until the switch: that is worth some bytes."""


class Strategy(Enum):
    """How the result is made."""

    NOTHING = "nothing"
    NEW = "new-file"
    ABSORB = "absorb"
    COMMIT = "commit"

    @property
    def writes_inputs(self) -> bool:
        """Whether it changes one of the inputs in place, so that nobody may read them meanwhile."""
        return self in {Strategy.ABSORB, Strategy.COMMIT}


def cheapest(moved: dict[Strategy, int], needed: dict[Strategy, int], *, free: int) -> Strategy:
    """Of the ways that are possible: bytes that each moves, and room that each takes; `free`: room that there is.

    Where none has room, the one that needs least (which `run` then refuses with the number).
    """
    fits = [way for way in moved if needed[way] <= free]
    if not fits:
        return min(moved, key=lambda way: needed[way])
    best = min(fits, key=lambda way: moved[way])
    if Strategy.NEW in fits and moved[Strategy.NEW] <= moved[best] * _NEARLY:
        return Strategy.NEW
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRow:
    """One merge of a plan, wherever the layers are: files of a chain, of a replica, or records of a repository.

    layers: names, lowest first; the last one's name stays; method: of making the result
    bytes_to_move: shared with or copied into other files; bytes_to_free: overwritten data that goes
    needs_bytes: room that it takes meanwhile; seconds: that it will take; None where only totals are known
    """

    layers: tuple[str, ...]
    method: str
    bytes_to_move: int | None = None
    bytes_to_free: int | None = None
    needs_bytes: int | None = None
    seconds: float | None = None
    shares_extents: bool = False
