"""A bound for requests to a server: one that makes no progress for long is given up.

botocore bounds each wait for a byte, and then repeats the request; a server that accepts and never answers, or that
sends one byte every ten seconds, would hold a command for minutes.  So each request runs in a thread of its own, which
is given up after ANSWER_WITHIN seconds without progress, retries included.  Progress is what `Watch.progress` reports:
a part of the body that was sent, or received.

A server that was silent once is not asked again for COOLING seconds: the clean-up after the first error must not wait
as long as the error itself.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from snapchain.errors import Unavailable

ANSWER_WITHIN = 32.0
COOLING = 30.0
"""Seconds."""
_SMALL = 1 << 20
"""Bytes of a body that is sent at once."""
_LONG = 0.6
"""The share of the limit after which a timeout that botocore reports counts as silence."""
_HINT = "check the server, the network and the firewall, then run the command again"

Result = TypeVar("Result")


class Silent(Unavailable):
    """The server did not answer, and was given up."""


class Watch:
    """The time of a request's last progress."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.moved = clock()

    def progress(self) -> None:
        """Something was sent or received: the wait begins anew."""
        self.moved = self._clock()


class Patience:
    """One server's. host: named in errors; limit: seconds without progress. Thread-safe."""

    def __init__(self, host: str, *, limit: float = ANSWER_WITHIN, clock: Callable[[], float] = time.monotonic) -> None:
        self._host = host
        self._limit = limit
        self._clock = clock
        self._closed_until = -1.0

    def within(self, request: Callable[[Watch], Result], *, subject: str) -> Result:
        """What `request` returns or raises.

        Raises Silent when it makes no progress, or when another request found the server silent a moment ago.
        """
        if self._clock() < self._closed_until:
            raise self._silent("did not answer a moment ago, and is not asked again yet", subject)
        watch = Watch(self._clock)
        running = _Running(request, watch)
        while not running.done.wait(max(0.0, watch.moved + self._limit - self._clock())):
            if self._clock() >= watch.moved + self._limit:
                self.give_up()
                raise self._silent(
                    f"accepts requests and does not answer: no progress for {self._limit:.0f} s", subject
                )
        if isinstance(running.error, Exception) and self._clock() - watch.moved > _LONG * self._limit:
            from botocore.exceptions import ConnectionError as Connection, HTTPClientError

            if isinstance(running.error, HTTPClientError | Connection):
                self.give_up()
        return running.outcome()

    def give_up(self) -> None:
        """Ask nothing for COOLING seconds: the server was silent for long."""
        self._closed_until = self._clock() + COOLING

    def _silent(self, words: str, subject: str) -> Silent:
        return Silent(f"{self._host} {words}", subject=subject, hint=_HINT)


class _Running(Generic[Result]):
    """A request in a thread of its own. Daemonic: the process may end while the request still waits."""

    def __init__(self, request: Callable[[Watch], Result], watch: Watch) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None
        self._request, self._watch = request, watch
        self._result: list[Result] = []
        threading.Thread(target=self._run, name="s3 request", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result.append(self._request(self._watch))
        except BaseException as error:  # noqa: BLE001 -- handed to the thread that waits
            self.error = error
        finally:
            self.done.set()

    def outcome(self) -> Result:
        if self.error is not None:
            raise self.error
        return self._result[0]


class WatchedBody(io.BytesIO):
    """A request's body, which reports to its watch that more was sent.

    Not while it is hashed, before it is sent; and not from the third attempt on: a server that takes the body and
    never answers would else be waited for as often as the request is repeated.
    """

    def __init__(self, body: bytes, watch: Watch) -> None:
        super().__init__(body)
        self._watch = watch
        self._attempts = 0
        self._small = len(body) <= _SMALL

    def begin_attempt(self) -> None:
        """From here on it is read to be sent."""
        self._attempts += 1

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if data and 1 <= self._attempts <= (1 if self._small else 2):
            self._watch.progress()
        return data
