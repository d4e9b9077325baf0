"""SIGTERM and SIGHUP end a command as Ctrl-C does: it cleans up, and prints what is left to resume.

A SIGHUP that was ignored when the command began stays ignored, as nohup(1) wants it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from snapchain.errors import Interrupted

_CODES = {signal.SIGTERM: Interrupted.exit_code, signal.SIGHUP: 128 + signal.SIGHUP}
_code = Interrupted.exit_code


@contextmanager
def interrupting() -> Iterator[None]:
    """Raise Interrupted in the main thread for these signals during the block; other threads leave them alone."""
    global _code  # noqa: PLW0603 - a signal is the process's, not a caller's
    _code = Interrupted.exit_code
    before = {}
    try:
        for number in _CODES:
            handler = signal.getsignal(number)
            # What was installed by other means than Python's cannot be put back.
            if handler is not None and not (number == signal.SIGHUP and handler == signal.SIG_IGN):
                before[number] = signal.signal(number, _interrupt)
    except ValueError:  # called from a thread that is not the main one
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code() -> int:
    """Of a command that was interrupted: 129 by SIGHUP, 130 by Ctrl-C or SIGTERM."""
    return _code


def _interrupt(number: int, _frame: FrameType | None) -> None:
    global _code  # noqa: PLW0603
    _code = _CODES[signal.Signals(number)]
    # A terminal that closes sends it twice, by the kernel and by the shell: the second must not cut the clean-up short.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise Interrupted(signal.Signals(number).name)
