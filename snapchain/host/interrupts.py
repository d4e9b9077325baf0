"""Ctrl-C, SIGTERM and SIGHUP held back until a process that was started is known to the code that ends it.

A KeyboardInterrupt may be raised anywhere, also in the middle of starting a program: then nobody has it yet to end it.
And one that is raised in a callback of fork (logging has one) is printed and forgotten, so that Ctrl-C has no effect.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def held_back() -> Iterator[None]:
    """A signal that comes during the block takes effect at its end. Outside of the main thread none ever does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What was installed by other means than Python's cannot be put back.
    before = {number: handler for number in _NUMBERS if (handler := signal.getsignal(number)) is not None}
    came: list[int] = []
    try:
        for number in before:
            signal.signal(number, lambda number, _frame: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
