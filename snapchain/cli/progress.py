"""Events of an operation, on stderr: a bar for a person, JSON lines for a program, nothing for a log file.

auto   a bar with bytes, rate and time left when stderr is a terminal, else only notices
json   one object a line: {"event": "progress", "phase", "done", "total", "unit", "rate", "eta"}
none   not even notices

A repeated note, about another file or disk, is only counted; the count is printed at the end.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from snapchain.cli.quantities import size
from snapchain.host.terminal import printable

if TYPE_CHECKING:
    from snapchain.model.events import Event

# Often enough to look alive, rare enough to cost nothing.
_INTERVAL_SECONDS = 0.5
_MOST_NOTES = 1000


class Mode(StrEnum):
    """What `--progress` may say."""

    AUTO = "auto"
    JSON = "json"
    NONE = "none"


class Phase:
    """How far one phase is and how fast it goes: seconds since its first event, units since then."""

    def __init__(self, done: int) -> None:
        self.began = time.monotonic()
        self.at_start = done
        self.shown_at = 0.0

    def rate(self, done: int) -> float:
        """Units a second since the phase began."""
        return (done - self.at_start) / max(time.monotonic() - self.began, 1e-6)


class Reporter:
    """The `on_event` of every verb: a context manager, callable from any thread.

    notes: the messages of the notices so far, each once, also where they are not shown
    """

    def __init__(self, mode: Mode, *, quiet: bool) -> None:
        self._mode = Mode.NONE if quiet and mode is Mode.AUTO else mode
        self._lock = threading.Lock()
        self._phases: dict[str, Phase] = {}
        self._notices: Counter[str] = Counter()
        self.notes: dict[str, None] = {}
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None
            for text, count in self._notices.items():
                if count > 1:
                    sys.stderr.write(f"snapchain: note: {count} times: {_beginning(text)}\n")
            self._notices.clear()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if hasattr(event, "message") and len(self.notes) < _MOST_NOTES:
            self.notes[event.message] = None
        if self._mode is Mode.NONE:
            return
        with self._lock:
            if hasattr(event, "message"):  # a Notice; importing its class would slow down every start
                self._notice(event)
            elif self._mode is Mode.JSON:
                self._line(event)
            elif sys.stderr.isatty():
                self._draw(event)

    def _notice(self, notice: Any) -> None:
        if self._mode is Mode.JSON:
            _write({"event": "notice", "message": notice.message})
            return
        self._notices[notice.text] += 1
        if self._notices[notice.text] > 1:
            return  # the same about another file or disk: only counted
        line = f"snapchain: note: {printable(notice.message)}"
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            sys.stderr.write(f"{line}\n")

    def _line(self, event: Any) -> None:
        phase = self._phases.setdefault(event.phase, Phase(event.done))
        now = time.monotonic()
        if now - phase.shown_at < _INTERVAL_SECONDS and event.done != event.total:
            return
        phase.shown_at = now
        rate = phase.rate(event.done)
        left = None if event.total is None or rate <= 0 else (event.total - event.done) / rate
        _write(
            {
                "event": "progress",
                "phase": event.phase,
                "done": event.done,
                "total": event.total,
                "unit": event.unit.value,
                "rate": round(rate),
                "eta": None if left is None else round(left, 1),
            }
        )

    def _draw(self, event: Any) -> None:
        if self._bar is None:
            self._bar = _bar()
            self._bar.start()
        phase = self._phases.setdefault(event.phase, Phase(event.done))
        task = self._tasks.get(event.phase)
        if task is None:
            self._drop_finished()
            task = self._tasks[event.phase] = self._bar.add_task(printable(event.phase), total=event.total, amount="")
        words = amount(event, phase.rate(event.done))
        self._bar.update(task, completed=event.done, total=event.total, amount=words)

    def _drop_finished(self) -> None:
        """A night of a thousand disks has thousands of phases; the terminal shows the running ones."""
        for task in self._bar.tasks:
            if task.finished:
                self._bar.update(task.id, visible=False)


def amount(event: Any, rate: float) -> str:
    """'12.0 MiB of 30.0 MiB, 5.0 MiB/s' or '3 of 17 objects'."""
    if event.unit.value != "bytes":
        return f"{event.done}{'' if event.total is None else f' of {event.total}'} {event.unit.value}"
    of = "" if event.total is None else f" of {size(event.total)}"
    return f"{size(event.done)}{of}, {size(int(rate))}/s"


def _beginning(text: str) -> str:
    """The first words of a note: enough to find the full text above."""
    words = printable(text).split(" ")
    return " ".join(words[: min(6, max(1, len(words) - 1))]) + " ..."


def _bar() -> Any:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    from snapchain.cli.console import EscapingConsole

    return Progress(
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
        console=EscapingConsole(stderr=True),
        transient=True,
        expand=True,
    )


def _write(row: dict[str, Any]) -> None:
    sys.stderr.write(json.dumps(row) + "\n")
    sys.stderr.flush()
