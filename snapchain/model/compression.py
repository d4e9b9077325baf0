"""How hard new blobs are compressed, and when it is worth more.

`auto` spends processor time that would otherwise wait for the store. The measure is the share of the time in which the
workers had packs ready and the store was still busy with earlier ones:

    share of waiting   1.0  ____________________________
                            twice in a row: a level up
                       0.2  ____________________________
                            as it is
                       0.02 ____________________________
                            a level down: the processor is the limit
                       0.0
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from snapchain.errors import InvalidInput


class Compression(StrEnum):
    """What a user may ask for."""

    AUTO = "auto"
    FAST = "fast"
    DEFAULT = "default"
    MAX = "max"


LEVELS = {Compression.FAST: 1, Compression.DEFAULT: 3, Compression.MAX: 15}
"""Of zstd. docs/decisions/0148-how-hard-a-repository-compresses.md has what each one costs and saves."""
STEPS = (1, 3, 5, 7, 9)
"""The levels of `auto`, which begins with the first one."""
_WAITING, _IDLE = 0.2, 0.02
_TWICE = 2


@dataclass(frozen=True, slots=True)
class Effort:
    """Where `auto` stands. step: place in STEPS; waited: packs in a row that waited for the store."""

    step: int = 0
    waited: int = 0

    @property
    def level(self) -> int:
        """Of zstd."""
        return STEPS[self.step]


def next_effort(effort: Effort, *, waited: float, elapsed: float) -> Effort:
    """The effort after another pack was filled.

    waited: seconds that this pack waited until the store took it; elapsed: seconds since the pack before it
    """
    share = waited / elapsed if elapsed > 0 else 0.0
    if share < _IDLE:
        return Effort(max(effort.step - 1, 0))
    if share < _WAITING:
        return replace(effort, waited=0)
    if effort.waited + 1 < _TWICE:
        return replace(effort, waited=effort.waited + 1)
    return Effort(min(effort.step + 1, len(STEPS) - 1))


def parse_compression(text: str) -> Compression:
    """Raises InvalidInput for another word."""
    try:
        return Compression(text)
    except ValueError:
        raise InvalidInput(f"unknown compression {text!a}", hint=", ".join(Compression)) from None
