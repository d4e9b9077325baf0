"""A gate that workers pass to write, and that nobody passes any more once an error was raised."""

from __future__ import annotations

import threading
from types import TracebackType


class Gate:
    """Lets writes through until it is shut, and is shut only between writes.

    After an error nobody waits for workers that wait for a slow store, but none of them may write any more: the
    output is about to be closed, and its descriptor's number will be another file's.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._writing = 0
        self._shut = False

    def __enter__(self) -> bool:
        """True when the caller may write."""
        with self._changed:
            self._writing += 1
            return not self._shut

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._writing -= 1
            if self._shut:
                self._changed.notify_all()

    def shut(self) -> None:
        """Wait for the writes under way, and allow no more."""
        with self._changed:
            self._shut = True
            self._changed.wait_for(lambda: self._writing <= 0)
