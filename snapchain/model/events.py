"""What an operation says while it works: plain values, handed to one callback.

No operation prints.  The command line draws a bar from these, `--progress json` writes them as lines, a
Python caller may ignore them.
"""

from __future__ import annotations

import time
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


def counting(phase: str, total: int | None, on_event: OnEvent) -> Callable[[int], None]:
    """A callback for the bytes that were just done; it reports the Progress of a phase.

    total: None where it is not known; what is reported is never less than what is done
    """
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_event(Progress(phase, done, None if total is None else max(done, total)))

    return on_bytes


class ByteCount:
    """Bytes done of a total, reported now and then, and when all are done. Not thread-safe.

    total: 0 where it is not known; what is reported is never less than what is done
    report: called with (done, total)
    every: seconds between two reports; 0 reports each change
    """

    def __init__(
        self,
        total: int,
        report: Callable[[int, int], None],
        *,
        every: float = 0.3,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.done, self.total = 0, total
        self._report, self._every, self._clock = report, every, clock
        self._reported_at: float | None = None
        self._reported = -1

    def add(self, count: int) -> None:
        """So many bytes more are done."""
        self.reach(self.done + count)

    def reach(self, done: int, total: int | None = None) -> None:
        """So many bytes are done by now, of `total` if that has changed."""
        self.done, self.total = done, self.total if total is None else total
        now = self._clock()
        is_due = self._reported_at is None or now - self._reported_at >= self._every
        if is_due or self._reported < done == self.total:
            self._reported_at, self._reported = now, done
            self._report(done, max(done, self.total))
