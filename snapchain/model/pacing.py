"""How fast a live merge may go so that its guest does not feel it: a rule over the latency of the guest's own I/O.

speed     as long as the latency stays near what it was before the merge: a step more each time
|  /|  /|  /|
| / | / | / |     above (1 + SLACK) times that: at once down to the half, or further by how much it is above
|/  |/  |/        never below the floor, so that the merge ends
"""

from __future__ import annotations

from dataclasses import dataclass

SLACK = 0.25
"""By how much the latency may rise before the merge slows down."""
FLOOR = 4 << 20
"""Bytes a second: 15 GiB in an hour."""
CEILING = 4 << 30
_STEP = 8 << 20
_FEWEST = 4
"""Operations of the guest that tell its latency; one flush alone would not."""
_NOISE_NS = 500_000
"""Half a millisecond: differences below that are not felt, and are the scheduler's as often as the disk's."""


@dataclass(frozen=True, slots=True)
class Work:
    """I/O of a guest since its start, or between two looks: operations, and nanoseconds spent in them."""

    operations: int
    nanoseconds: int

    def since(self, before: Work) -> Work:
        """What came after `before`; nothing where the counters began anew meanwhile."""
        return Work(max(0, self.operations - before.operations), max(0, self.nanoseconds - before.nanoseconds))

    @property
    def latency(self) -> float | None:
        """Mean nanoseconds of an operation; None where there were too few to tell."""
        return self.nanoseconds / self.operations if self.operations >= _FEWEST else None


def next_speed(
    speed: int, latency: float | None, *, baseline: float | None, floor: int = FLOOR, ceiling: int = CEILING
) -> int:
    """The speed to go on with, in bytes a second.

    latency: of the guest since the last change, nanoseconds; None where it did too little to tell
    baseline: of the guest without the merge; None where it is not known, and nothing is compared

    Between floor and ceiling; never higher for a higher latency.
    """
    if latency is None:
        # Nobody is there to feel it.
        wanted = speed * 2
    elif baseline is None or latency <= baseline * (1 + SLACK) + _NOISE_NS:
        wanted = speed + _STEP
    else:
        wanted = int(speed * min(0.5, (baseline * (1 + SLACK) + _NOISE_NS) / latency))
    return max(floor, min(ceiling, wanted))
