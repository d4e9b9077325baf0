"""One step after the other, each of which may fail or find that there is no time left, without ending the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from snapchain.errors import Busy, Conflict, Diverged
from snapchain.ops.nightly.plan import CutOffError
from snapchain.ops.nightly.report import Fault, Outcome
from snapchain.source.ownership import GivenAwayError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Attempt(Generic[T]):
    """How a step ended; value: what it gave, only when all went well."""

    outcome: Outcome
    value: T | None = None


class Steps:
    """Collects what went wrong, what was left, and to whom the disk was given."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.left: list[str] = []
        self.moved_to: str | None = None
        self._outcomes: list[Outcome] = []
        self._interrupted = False

    @property
    def outcome(self) -> Outcome:
        """The outcome of all steps together."""
        return Outcome.worst(self._outcomes)

    def count(self, outcome: Outcome) -> None:
        """A step was done, with this outcome."""
        self._outcomes.append(outcome)

    def note(self, step: str, error: Exception) -> None:
        """Record a fault outside of any attempt. The same words are one fault."""
        self.add(Fault.of(step, error))

    def add(self, fault: Fault) -> None:
        """The same of what is a fault already."""
        if fault not in self.faults:
            self.faults.append(fault)
            self._outcomes.append(Outcome.FAILED)

    def attempt(
        self, step: str, action: Callable[[], T], *, tries: int = 1, busy: Outcome = Outcome.FAILED
    ) -> Attempt[T]:
        """Do it. tries: in all, when another snapchain was faster; busy: what a Busy counts as."""
        done = self._attempt(step, action, tries, busy)
        self._outcomes.append(done.outcome)
        return done

    def _attempt(self, step: str, action: Callable[[], T], tries: int, busy: Outcome) -> Attempt[T]:
        for number in range(1, tries + 1):
            try:
                return Attempt(Outcome.OK, action())
            except CutOffError as error:
                self.left.append(f"{step}: {error}")
                return Attempt(Outcome.LEFT)
            except KeyboardInterrupt:
                if not self._interrupted:  # the innermost step tells most
                    self.left.append(f"{step}: the run was interrupted in the middle of it")
                    self._outcomes.append(Outcome.LEFT)
                self._interrupted = True
                raise
            except GivenAwayError as error:
                self.moved_to = f"{error.mark.destination}::{error.mark.disk}"
                return Attempt(Outcome.MOVED)
            except Exception as error:  # noqa: BLE001 - whatever is wrong here, the other steps and disks have their turn
                if isinstance(error, Conflict) and not isinstance(error, Diverged) and number < tries:
                    continue
                self.faults.append(Fault.of(step, error))
                return Attempt(busy if isinstance(error, Busy) else Outcome.FAILED)
        raise AssertionError("the loop returns")
