"""The guest of a watch, opened by one thread at a time: a monitor of QEMU serves one client, and lets another wait.

    the thread of the rounds   opened()    waits for its turn, and keeps it for a whole shipment
    the holder of the lease    look()      takes its turn only when nobody has it
                               on_opened   sees the guest whenever one of both has opened it
                               closed      keeps the watch out while the guest is paused: resuming it needs the turn

libvirt serves several clients at once: nobody waits then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from snapchain.errors import Busy
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.guest.protocol import Guest
from snapchain.model.events import OnEvent, ignore


class GuestDoor:
    """on_opened: called with each guest that was opened, by the thread that did it; raises nothing

    closed: why the watch may not work with it now, a sentence, or None
    """

    def __init__(self, address: GuestAddress, *, on_event: OnEvent = ignore) -> None:
        self.address = address
        self.on_opened: Callable[[Guest], None] = lambda _guest: None
        self.closed: Callable[[], str | None] = lambda: None
        self._turn = threading.Lock() if address.qmp is not None else None
        self._on_event = on_event

    @contextmanager
    def opened(self) -> Iterator[Guest]:
        """Raises Busy while it is closed, and as `open_guest`."""
        with self.turn(None):
            if (why := self.closed()) is not None:
                raise Busy(why, subject=self.address.option)
            with open_guest(self.address, on_event=self._on_event) as guest:
                self.on_opened(guest)
                yield guest

    def look(self) -> None:
        """Let `on_opened` see the guest, unless another thread has opened it. Raises as `open_guest`."""
        with self.turn(0) as is_mine:
            if is_mine:
                with open_guest(self.address, on_event=self._on_event) as guest:
                    self.on_opened(guest)

    @contextmanager
    def turn(self, seconds: float | None) -> Iterator[bool]:
        """Whether nobody else opens the guest meanwhile. seconds: to wait for that, None: as long as it takes"""
        is_mine = self._turn is None or self._turn.acquire(timeout=-1 if seconds is None else max(seconds, 0))
        try:
            yield is_mine
        finally:
            if is_mine and self._turn is not None:
                self._turn.release()
