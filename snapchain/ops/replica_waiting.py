"""Telling a user that a replica makes them wait: the other side lives, and does not begin."""

from __future__ import annotations

from collections.abc import Callable

from snapchain.model.events import Notice, OnEvent
from snapchain.replica.endpoint import Endpoint


def waiting(endpoint: Endpoint, on_event: OnEvent) -> Callable[[], None]:
    """What to call at each sign of life that says nothing; it is told once."""
    told = False

    def tell() -> None:
        nonlocal told
        if not told:
            told = True
            on_event(Notice(f"{endpoint.url} makes us wait: another snapchain may be at work on that disk"))

    return tell
