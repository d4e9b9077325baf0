"""A witness that two QEMUs never run one guest at the same time, by monitors of the test's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.guest.machine import Monitor


class OneMaster:
    """Looks as long as the block lasts; at its end, raises AssertionError where two guests ran at once.

    sockets: called at each look: monitors that nobody else uses, of all QEMUs there are
    """

    def __init__(self, sockets: Callable[[], Sequence[Path]]) -> None:
        self._sockets, self._known = sockets, dict[Path, Monitor]()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.looks = 0
        self.seen: list[list[Path]] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        self._thread.join()
        for monitor in self._known.values():
            monitor.close()
        if error is None:
            assert not self.seen, f"two guests ran at once: {self.seen}"

    def _watch(self) -> None:
        while not self._ends.wait(0.02):
            self.looks += 1
            first = self._running()
            if len(first) > 1 and len(again := self._running() & first) > 1:  # else it was handed over in between
                self.seen.append(sorted(again))

    def _running(self) -> set[Path]:
        found = set()
        for path in self._sockets():
            with suppress(OSError, AssertionError, ValueError):  # it has just begun, or ended
                monitor = self._known.get(path) or Monitor(path, patience=2)
                self._known[path] = monitor
                if monitor.ask("query-status")["status"] == "running":
                    found.add(path)
                continue
            if (lost := self._known.pop(path, None)) is not None:
                lost.close()
        return found
