"""Whether another round of seal and ship brings a cutover nearer, told from how much was left after each round.

    left after round   0      1     2     3
    a calm guest       20 G   2 G   90 M  8 M     enough
    a busy guest       20 G   6 G   7 G   9 G     it dirties faster than the link carries: stop

The rules are those by which XCP-ng's storage manager gives up a live coalesce (CoalesceTracker in its cleanup.py):
too many rounds, several without progress, or more than some share above the smallest ever left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from snapchain.errors import InvalidInput


class Verdict(Enum):
    """What to do next."""

    AGAIN = "again"
    ENOUGH = "enough"
    ROUNDS_USED = "rounds-used"
    NO_PROGRESS = "no-progress"
    GROWING = "growing"

    @property
    def ends(self) -> bool:
        """No further round."""
        return self is not Verdict.AGAIN


@dataclass(frozen=True, slots=True)
class Rules:
    """When to stop.

    rounds: of sealing, at most; stalled: rounds in a row that may leave no less than the one before
    growth: the share of the smallest ever left above which it is growing; grace: rounds before that counts
    """

    rounds: int = 20
    stalled: int = 3
    growth: float = 1.2
    grace: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.stalled < 0 or self.grace < 0 or self.growth < 1:
            raise InvalidInput("rules of convergence cannot be negative, and growth is at least 1")


def judge(left: Sequence[int], enough: int | None, rules: Rules) -> Verdict:
    """The verdict after the rounds so far.

    left: bytes left before the first round and after each one, oldest first
    enough: bytes that may be left at the end; None if nothing was measured yet: then only 0 is enough
    """
    if not left:
        return Verdict.AGAIN
    if left[-1] <= (enough or 0):
        return Verdict.ENOUGH
    done = len(left) - 1
    if done >= rules.rounds:
        return Verdict.ROUNDS_USED
    if _stalled(left) > rules.stalled:
        return Verdict.NO_PROGRESS
    if done > rules.grace and left[-1] > rules.growth * min(left):
        return Verdict.GROWING
    return Verdict.AGAIN


def _stalled(left: Sequence[int]) -> int:
    """How many of the newest rounds, in a row, left no less than the one before."""
    count = 0
    for before, after in zip(left[-2::-1], left[:0:-1], strict=True):
        if after < before:
            break
        count += 1
    return count
