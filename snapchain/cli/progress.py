"""Events of an operation, on stderr: a bar for a person, JSON lines for a program, nothing for a log file.

auto   a bar with bytes, rate and time left when stderr is a terminal, else only notices
json   one object a line: {"event": "progress", "phase": ..., "done": ..., "total": ..., "rate": ..., "eta": ...}
none   not even notices
"""

from __future__ import annotations

import json
import sys
import threading
import time
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from snapchain.ops.events import Event

# Often enough to look alive, rare enough to cost nothing.
_INTERVAL_SECONDS = 0.5


class Mode(StrEnum):
    """What `--progress` may say."""

    AUTO = "auto"
    JSON = "json"
    NONE = "none"


class Phase:
    """How far one phase is and how fast it goes: seconds since its first event, bytes since then."""

    def __init__(self, done: int) -> None:
        self.began = time.monotonic()
        self.at_start = done
        self.told = 0.0

    def rate(self, done: int) -> float:
        """Bytes a second since the phase began."""
        return (done - self.at_start) / max(time.monotonic() - self.began, 1e-6)


class Reporter:
    """The `on_event` of every verb: a context manager, callable from any thread."""

    def __init__(self, mode: Mode, *, quiet: bool) -> None:
        self._mode = Mode.NONE if quiet and mode is Mode.AUTO else mode
        self._lock = threading.Lock()
        self._phases: dict[str, Phase] = {}
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self._mode is Mode.NONE:
            return
        with self._lock:
            message = getattr(event, "message", None)
            if message is not None:
                self._notice(message)
            elif self._mode is Mode.JSON:
                self._line(event)
            elif sys.stderr.isatty():
                self._draw(event)

    def _notice(self, message: str) -> None:
        if self._mode is Mode.JSON:
            _write({"event": "notice", "message": message})
        elif self._bar is not None:
            self._bar.console.print(f"snapchain: note: {message}", markup=False, highlight=False)
        else:
            sys.stderr.write(f"snapchain: note: {message}\n")

    def _line(self, event: Any) -> None:
        phase = self._phases.setdefault(event.phase, Phase(event.done))
        now = time.monotonic()
        if now - phase.told < _INTERVAL_SECONDS and event.done != event.total:
            return
        phase.told = now
        rate = phase.rate(event.done)
        left = None if event.total is None or rate <= 0 else (event.total - event.done) / rate
        _write(
            {
                "event": "progress",
                "phase": event.phase,
                "done": event.done,
                "total": event.total,
                "rate": round(rate),
                "eta": None if left is None else round(left, 1),
            }
        )

    def _draw(self, event: Any) -> None:
        if self._bar is None:
            self._bar = _bar()
            self._bar.start()
        task = self._tasks.get(event.phase)
        if task is None:
            task = self._tasks[event.phase] = self._bar.add_task(event.phase, total=event.total)
        self._bar.update(task, completed=event.done, total=event.total)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _write(row: dict[str, Any]) -> None:
    sys.stderr.write(json.dumps(row) + "\n")
    sys.stderr.flush()
