"""What an operation says while it works: plain values, handed to one callback.

No operation prints.  The command line draws a bar from these, `--progress json` writes them as lines, a
Python caller may ignore them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` bytes of the named phase; `total` is None where nobody knows it."""

    phase: str
    done: int
    total: int | None


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that the user should know, and that does not stop the operation."""

    message: str


Event = Progress | Notice
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The callback of a caller who does not listen."""
