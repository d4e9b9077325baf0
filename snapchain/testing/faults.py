"""A store that fails where a test says: before or after the effect, by lying, by being slow, or for good.

    FaultStore(inner, [On(3, Fault.LOST_REPLY)])                       the third call of all
    FaultStore(inner, [On(1, Fault.UNAVAILABLE, operation="create", prefix="points/")])
    FaultStore(inner, crash_at=4)                                      dies at the fifth moment

Crash moments are numbered from 0: each put, create and delete has one before its effect and one after it.  A Crash is
a BaseException and makes every later call crash too, as for a killed process.  `crash_points` goes through all of them.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, TypeAlias, TypeVar

from snapchain.errors import Unavailable
from snapchain.objects.store import Data, ObjectInfo, ObjectStore, StoreWrapper

Operation: TypeAlias = Literal["put", "create", "get", "size", "list", "list_dirs", "delete"]
Result = TypeVar("Result")
MUTATING = frozenset({"put", "create", "delete"})


class Crash(BaseException):
    """The process died here."""


class Fault(enum.Enum):
    """What goes wrong with a call."""

    UNAVAILABLE = "503: no effect, and the caller is told"
    LOST_REPLY = "the effect happens, and the caller is told that it did not"
    TAKEN = "412 about one's own write: create has its effect and says False"
    TRUNCATED = "get gives the first half"
    BIT_FLIP = "get gives one bit wrong, in the middle"
    DELAY = "the call happens later, by the fault's seconds"


@dataclass(frozen=True, slots=True)
class On:
    """Fault for the `nth` (from 1) of the calls with this operation (None: any) on names with this prefix."""

    nth: int
    fault: Fault
    operation: Operation | None = None
    prefix: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Call:
    """One call that arrived, in order of arrival."""

    operation: Operation
    name: str


class FaultStore(StoreWrapper):
    """A store with faults.  `calls` is what arrived so far, and `moments` how many crash moments passed."""

    def __init__(
        self,
        inner: ObjectStore,
        faults: Sequence[On] = (),
        *,
        crash_at: int | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(inner)
        self.calls: list[Call] = []
        self.moments = 0
        self._faults = tuple(faults)
        self._crash_at = crash_at
        self._sleep = sleep
        self._lock = threading.Lock()
        self._dead = False

    def put(self, name: str, data: Data) -> None:
        self._suffering("put", name, lambda: self.inner.put(name, data))

    def create(self, name: str, data: Data) -> bool:
        made, faults = self._suffering("create", name, lambda: self.inner.create(name, data))
        return made and Fault.TAKEN not in faults

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        body, faults = self._suffering("get", name, lambda: self.inner.get(name, offset=offset, length=length))
        if Fault.TRUNCATED in faults:
            body = body[: len(body) // 2]
        if Fault.BIT_FLIP in faults and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 0x10]) + body[middle + 1 :]
        return body

    def size(self, name: str) -> int | None:
        return self._suffering("size", name, lambda: self.inner.size(name))[0]

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._suffering("list", prefix, lambda: self.inner.list(prefix))[0]

    def list_dirs(self, prefix: str) -> Iterator[str]:
        return self._suffering("list_dirs", prefix, lambda: self.inner.list_dirs(prefix))[0]

    def delete(self, name: str) -> None:
        self._suffering("delete", name, lambda: self.inner.delete(name))

    def _suffering(self, operation: Operation, name: str, effect: Callable[[], Result]) -> tuple[Result, set[Fault]]:
        """(the result of the call, faults that its caller must apply to it)."""
        met = self._arrived(operation, name)
        faults = {on.fault for on in met}
        for on in met:
            if on.fault is Fault.DELAY:
                self._sleep(on.seconds)
        if Fault.UNAVAILABLE in faults:
            raise Unavailable("injected: the server is overloaded", subject=name)
        if operation in MUTATING:
            self._moment()
        result = effect()
        if operation in MUTATING:
            self._moment()
        if Fault.LOST_REPLY in faults:
            raise Unavailable("injected: the reply was lost", subject=name)
        return result, faults

    def _arrived(self, operation: Operation, name: str) -> tuple[On, ...]:
        """Take note of a call; the faults that it meets."""
        with self._lock:
            if self._dead:
                raise Crash
            self.calls.append(Call(operation, name))
            return tuple(fault for fault in self._faults if self._is_met(fault))

    def _is_met(self, fault: On) -> bool:
        """Whether the newest call is the one that `fault` is for."""
        matching = [call for call in self.calls if _matches(fault, call)]
        return _matches(fault, self.calls[-1]) and len(matching) == fault.nth

    def _moment(self) -> None:
        """A moment at which the process may die."""
        with self._lock:
            if self._dead or self.moments == self._crash_at:
                self._dead = True
                raise Crash
            self.moments += 1


def _matches(fault: On, call: Call) -> bool:
    return fault.operation in {None, call.operation} and call.name.startswith(fault.prefix)


def crash_points(
    begin: Callable[[], ObjectStore], job: Callable[[ObjectStore], object], limit: int = 10_000
) -> Iterator[tuple[int, ObjectStore]]:
    """Run `job` on a store from `begin`, dying at moment 0, then afresh at moment 1, and so on until it survives.

    Gives (moment, the inner store as it was left) after each death.  The caller checks what is left, and runs the job
    again on it.  Raises AssertionError after `limit` deaths.
    """
    for moment in count():
        assert moment < limit, f"the job is not done after {limit} crash moments"
        inner = begin()
        try:
            job(FaultStore(inner, crash_at=moment))
        except Crash:
            yield moment, inner
        else:
            return
