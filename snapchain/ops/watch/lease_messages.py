"""What the holder of a lease has to say: once when something changes, and as a report whenever it is asked."""

from __future__ import annotations

import threading

from snapchain.errors import SnapchainError
from snapchain.model.events import Notice, OnEvent
from snapchain.model.guest_state import GuestStanding, describe_takeover
from snapchain.ops.watch.run import LeaseState


class LeaseMessages:
    """guest: its name; faults: sentences, of places that do not renew the lease, and of this host"""

    def __init__(self, guest: str, on_event: OnEvent) -> None:
        self.guest = guest
        self._on_event = on_event
        self._lock = threading.Lock()
        self._faults: dict[str, str] = {}
        self._said: LeaseState = "none"

    @property
    def faults(self) -> tuple[str, ...]:
        """Those that last; from any thread."""
        with self._lock:
            return tuple(f"{place}: {words}" for place, words in self._faults.items())

    def fault(self, place: str, error: Exception | str | None) -> None:
        """error: None where the place, or this host, is in order again"""
        words = None if error is None else _without_subject(error, place)
        with self._lock:
            before = self._faults.pop(place, None)
            if words is not None:
                self._faults[place] = words
        if words is not None and words != before:
            self._on_event(Notice(f"lease of {self.guest or 'the guest'}: {place}: {words}"))

    def say(self, state: LeaseState, taken: GuestStanding | None) -> None:
        """taken: how the guest stands where another host has it"""
        if state == self._said:
            return
        words = {
            "none": "there is none",
            "held": "held" if self._said == "none" else "renewed again; the guest continues",
            "paused": "not renewed in time: the guest is stopped until a renewal succeeds",
            "taken": "" if taken is None else f"{describe_takeover(taken)}; the guest is stopped here",
        }
        self._said = state
        self._on_event(Notice(f"lease of {self.guest}: {words[state]}"))


def _without_subject(error: Exception | str, place: str) -> str:
    """The error, whose sentence follows the name of the place."""
    is_about = isinstance(error, SnapchainError) and str(error.subject) == place
    return error.message if is_about and isinstance(error, SnapchainError) else str(error)
