"""What a server exports: points by their names, each opened once for all of its clients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Self

from snapchain.errors import NotFound
from snapchain.nbd.handshake import Described
from snapchain.nbd.reading import Reading


@dataclass(frozen=True, slots=True)
class Export:
    """A point that is served.

    opens: a context manager that gives its Reading
    stays: it is open as long as the server, else while a client reads it
    block_status: clients may ask which ranges hold data
    """

    name: str
    size: int
    description: str
    opens: Callable[[], AbstractContextManager[Reading]]
    stays: bool = True
    block_status: bool = True


class Exports:
    """The exports of a server, each opened once for all its clients. A context manager. Thread-safe."""

    def __init__(self, exports: Sequence[Export]) -> None:
        self._exports = {each.name: each for each in exports}
        self._lock = threading.Lock()
        self._opened: dict[str, _Opened] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for each in self._exports.values():
                if each.stays:
                    stack.enter_context(self.open(each.name))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def end(self) -> None:
        """End all waiting for a store: whoever waits gets Unavailable."""
        with self._lock:
            opened = [each.reading for each in self._opened.values()]
        for reading in opened:
            if reading is not None:
                reading.end()

    def names(self) -> Sequence[str]:
        """As Offer."""
        return list(self._exports)

    def describe(self, name: str) -> Described:
        """As Offer."""
        found = self._named(name)
        return Described(found.name, found.size, found.description, found.block_status)

    def open(self, name: str) -> OpenedExport:
        """As Offer. The caller closes what is returned."""
        export = self._named(name)
        with self._lock:
            opened = self._opened.setdefault(export.name, _Opened())
            opened.users += 1
        try:
            with opened.lock:
                if opened.reading is None:
                    opened.reading = opened.stack.enter_context(export.opens())
        except BaseException:
            self._leave(export.name)
            raise
        return OpenedExport(export.name, opened.reading, lambda: self._leave(export.name))

    def _leave(self, name: str) -> None:
        with self._lock:
            opened = self._opened[name]
            opened.users -= 1
            if opened.users:
                return
            del self._opened[name]
        opened.stack.close()

    def _named(self, name: str) -> Export:
        found = self._exports.get(name)
        if found is None and not name and len(self._exports) == 1:
            return next(iter(self._exports.values()))
        if found is None:
            raise NotFound(f"there is no export {name!r}")
        return found


class _Opened:
    """users: who has it open; lock: held while it is being opened"""

    def __init__(self) -> None:
        self.users = 0
        self.lock = threading.Lock()
        self.stack = ExitStack()
        self.reading: Reading | None = None


@dataclass(frozen=True, slots=True)
class OpenedExport:
    """An export that somebody has open; a context manager."""

    name: str
    reading: Reading
    leave: Callable[[], None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
