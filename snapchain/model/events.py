"""What an operation says while it works: plain values, handed to one callback.

No operation prints.  The command line draws a bar from these, `--progress json` writes them as lines, a
Python caller may ignore them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Unit(StrEnum):
    """What a phase counts."""

    BYTES = "bytes"
    OBJECTS = "objects"
    LAYERS = "layers"


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` of the named phase, in `unit`; `total` is None where it is not known.

    done: counts what has arrived at the destination, not what was read or is on its way; it never falls
    """

    phase: str
    done: int
    total: int | None
    unit: Unit = Unit.BYTES


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that the user should know, and that does not stop the operation.

    about: the file or disk that `message` begins with, followed by a colon; '' where it names none so
    """

    message: str
    about: str = ""

    @classmethod
    def of(cls, about: object, words: str) -> Notice:
        """The note `words` about a file, a directory or a disk."""
        return cls(f"{about}: {words}", str(about))

    @classmethod
    def no_locks(cls, directory: object) -> Notice:
        """That the images of a directory cannot be locked."""
        return cls.of(directory, "this filesystem has no locks; make sure that no guest uses its images")

    @property
    def text(self) -> str:
        """The message without its subject: the same for each file of a chain, each disk of a night."""
        return self.message.removeprefix(f"{self.about}: ") if self.about else self.message

    def within(self, name: str) -> Notice:
        """The same about a part of `name`."""
        about = f"{name}: {self.about}" if self.about else name
        return Notice(f"{name}: {self.message}", about)


Event = Progress | Notice
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The callback of a caller who does not listen."""
