"""Try again what failed for a passing reason, with growing, jittered pauses.

botocore already repeats single requests for some seconds; this is for outages of minutes, and for other stores.
Only Unavailable is tried again, and not its subclass Refused.  Every call but `create` may simply be repeated.  A
`create` whose reply was lost may have had its effect: when its repetition finds the name taken, the object is read,
and is ours when its bytes are.  So what is created must differ from what any other writer would create, by a nonce
or by being named after its content.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from snapchain.errors import NotFound, Unavailable
from snapchain.objects.store import Data, ObjectInfo, ObjectStore, Refused, StoreWrapper, joined

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Backoff:
    """How often and how long: pause n is drawn between half and all of `first * 2**n`, at most `longest`.  Seconds."""

    attempts: int = 6
    first: float = 0.5
    longest: float = 30.0

    def pause(self, failures: int) -> float:
        """Seconds to wait after that many failures (from 1)."""
        whole = min(self.longest, self.first * 2.0 ** (failures - 1))
        return whole * random.uniform(0.5, 1.0)  # noqa: S311


class RetryingStore(StoreWrapper):
    """A store that outlasts passing failures of `inner`."""

    def __init__(
        self,
        inner: ObjectStore,
        *,
        backoff: Backoff = Backoff(),
        sleep: Callable[[float], None] = time.sleep,
        told: Callable[[Unavailable, float], None] | None = None,
    ) -> None:
        """`told` hears of each failure and of the pause that follows, from the thread in which it happened."""
        super().__init__(inner)
        self._backoff = backoff
        self._sleep = sleep
        self._told = told

    def put(self, name: str, data: Data) -> None:
        self._repeated(lambda: self.inner.put(name, data))

    def create(self, name: str, data: Data) -> bool:
        body = joined(data)
        failures = 0
        while True:
            try:
                made = self.inner.create(name, body)
                return made or (failures > 0 and self._is_ours(name, body))
            except Unavailable as error:
                failures += 1
                self._pause(error, failures)

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        return self._repeated(lambda: self.inner.get(name, offset=offset, length=length))

    def size(self, name: str) -> int | None:
        return self._repeated(lambda: self.inner.size(name))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """A listing that breaks off starts again, and leaves out what it has given already."""
        last = ""
        failures = 0
        listing: Iterator[ObjectInfo] | None = None
        while True:
            try:
                listing = self.inner.list(prefix) if listing is None else listing
                info = next(listing, None)
            except Unavailable as error:
                failures += 1
                self._pause(error, failures)
                listing = None
                continue
            if info is None:
                return
            if info.name > last:
                last = info.name
                failures = 0
                yield info

    def list_dirs(self, prefix: str) -> Iterator[str]:
        return iter(self._repeated(lambda: sorted(self.inner.list_dirs(prefix))))

    def delete(self, name: str) -> None:
        self._repeated(lambda: self.inner.delete(name))

    def _is_ours(self, name: str, body: bytes) -> bool:
        try:
            return self.get(name) == body
        except NotFound:  # gone again: whoever deleted it saw it
            return False

    def _repeated(self, call: Callable[[], Result]) -> Result:
        failures = 0
        while True:
            try:
                return call()
            except Unavailable as error:
                failures += 1
                self._pause(error, failures)

    def _pause(self, error: Unavailable, failures: int) -> None:
        """Wait, or raise `error` when it is no use or was the last attempt's."""
        if isinstance(error, Refused) or failures >= self._backoff.attempts:
            raise error
        pause = self._backoff.pause(failures)
        if self._told is not None:
            self._told(error, pause)
        self._sleep(pause)
