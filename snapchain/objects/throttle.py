"""Keep a store's traffic below a rate, for `--limit-rate` (token bucket).

The unit is an object.  An object to be sent waits until its bytes are saved up, and is then sent at full speed.  So an
object is either in the store or not, and an interrupted shipment can list it.  A small object, such as that list,
waits for its own bytes only.  An object that is read is charged afterwards, since its size is not known before.  All
threads of a store share its two buckets, one a direction.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from snapchain.errors import InvalidInput
from snapchain.objects.store import Data, ObjectStore, StoreWrapper, buffers

BURST = 0.25
"""Seconds' worth of tokens that an idle bucket saves up."""


class TokenBucket:
    """Lets `rate` units pass a second on average.  It may go into debt, for which later callers wait."""

    def __init__(
        self,
        rate: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Raises InvalidInput for a rate that is not above zero."""
        if not rate > 0:
            raise InvalidInput(f"a rate must be above zero, not {rate}")
        self.rate = rate
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._tokens = rate * BURST
        self._filled = clock()
        self._saving: list[int] = []

    def save_up(self, amount: int) -> None:
        """Return when `amount` has been saved up, and take it."""
        with self._lock:
            self._saving.append(amount)
        try:
            while (wait := self._missing(amount) / self.rate) > 0:
                self._sleep(wait)
        finally:
            with self._lock:
                self._saving.remove(amount)

    def _missing(self, amount: int) -> float:
        """How many tokens are missing; when there are enough, 0, and they are taken."""
        with self._lock:
            now = self._clock()
            room = max(self.rate * BURST, *self._saving)
            self._tokens = min(room, self._tokens + (now - self._filled) * self.rate)
            self._filled = now
            missing = amount - self._tokens
            if missing > 1e-6:  # what is less is lost in the clock's last digits
                return missing
            self._tokens -= amount
            return 0.0

    def take(self, amount: int) -> None:
        """Return when `amount` may pass: at once without a debt, else when the debt is paid."""
        with self._lock:
            now = self._clock()
            self._tokens = min(self.rate * BURST, self._tokens + (now - self._filled) * self.rate)
            self._filled = now
            wait = max(0.0, -self._tokens / self.rate)
            self._tokens -= amount
        if wait > 0:
            self._sleep(wait)

    def charge(self, amount: int) -> None:
        """Take what has passed already."""
        with self._lock:
            self._tokens -= amount


class ThrottledStore(StoreWrapper):
    """A store whose `put`/`create` and whose `get` keep to rates in bytes a second; None is no limit."""

    def __init__(
        self,
        inner: ObjectStore,
        *,
        upload: float | None = None,
        download: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(inner)
        self._upload = None if upload is None else TokenBucket(upload, clock=clock, sleep=sleep)
        self._download = None if download is None else TokenBucket(download, clock=clock, sleep=sleep)

    def put(self, name: str, data: Data) -> None:
        self._before_sending(data)
        self.inner.put(name, data)

    def create(self, name: str, data: Data) -> bool:
        self._before_sending(data)
        return self.inner.create(name, data)

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if self._download is None:
            return self.inner.get(name, offset=offset, length=length)
        self._download.take(0)  # waits off the debt of those before
        body = self.inner.get(name, offset=offset, length=length)
        self._download.charge(len(body))
        return body

    def _before_sending(self, data: Data) -> None:
        if self._upload is not None:
            self._upload.save_up(sum(view.nbytes for view in buffers(data)))
