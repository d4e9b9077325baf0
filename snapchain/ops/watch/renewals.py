"""The threads that ask the two places about a lease, each again and again: one of them may not answer for minutes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from snapchain.destination.protocol import Destination
from snapchain.host.deadman import clock
from snapchain.model.guest_state import GuestStanding
from snapchain.model.lease import Lease
from snapchain.ops.watch.lease_places import LeasePlace


@dataclass(frozen=True, slots=True)
class News:
    """The answer of a place. sent: when it was asked to renew the lease, or to end it (`is_end`)"""

    lease: Lease
    place: LeasePlace
    sent: float
    answer: GuestStanding | Exception
    is_end: bool = False


Ask = Callable[[LeasePlace, Lease, Destination | None], tuple[News, Destination | None]]
"""Asks a place, which was opened before or not; with it, if it may be asked again as it was opened."""


class Renewals:
    """ask: raises nothing; goes_on: whether a lease is still to be renewed; ending: set where none is any more"""

    def __init__(
        self,
        ask: Ask,
        put: Callable[[News], None],
        *,
        interval: float,
        goes_on: Callable[[Lease], bool],
        ending: threading.Event,
    ) -> None:
        self._ask, self._put, self._interval = ask, put, interval
        self._goes_on, self._ending = goes_on, ending
        self._wake = threading.Event()
        self._threads: dict[LeasePlace, tuple[Lease, threading.Thread]] = {}

    def keep(self, place: LeasePlace, lease: Lease) -> None:
        """Have a thread that asks the place about this lease. Raises RuntimeError where none can be started."""
        asked, thread = self._threads.get(place, (None, None))
        if asked is lease and thread is not None and thread.is_alive():
            return
        thread = threading.Thread(target=self._go_on, args=(place, lease), name=f"lease {place.name}", daemon=True)
        self._threads[place] = (lease, thread)
        thread.start()

    def hurry(self) -> None:
        """Ask all places now, and not when it is time."""
        wake, self._wake = self._wake, threading.Event()
        wake.set()

    def _go_on(self, place: LeasePlace, lease: Lease) -> None:
        opened: Destination | None = None
        while not self._ending.is_set() and self._goes_on(lease):
            wake = self._wake
            news, opened = self._ask(place, lease, opened)
            self._put(news)
            wake.wait(max(0.0, news.sent + self._interval - clock()))
