"""Where a verb's results go: tables and pictures for a person, one JSON object for a program, both on stdout.

A verb hands over the plan or the report and a function that draws it; the same values make the JSON object, so the
two can never tell different stories.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from snapchain.cli.progress import Mode, Reporter

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


class Output:
    """One command's voice. A context manager: the progress bar is gone when it ends, however it ends."""

    def __init__(
        self, *, as_json: bool, dry_run: bool = False, progress: Mode = Mode.AUTO, quiet: bool = False
    ) -> None:
        self.as_json = as_json
        self.dry_run = dry_run
        self._quiet = quiet
        self.on_event = Reporter(progress, quiet=quiet)

    def __enter__(self) -> Self:
        self.on_event.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.on_event.__exit__(kind, error, tb)

    def plan(self, plan: T, draw: Callable[[Console, T], None]) -> bool:
        """Show what would be done when the user asked for no more; True when that is so."""
        if self.dry_run:
            self._show({"dry_run": True, "plan": plain(plan)}, plan, draw)
        return self.dry_run

    def report(self, report: T, draw: Callable[[Console, T], None]) -> None:
        """Show what was done or found."""
        self._show(plain(report), report, draw)

    def _show(self, row: Any, value: T, draw: Callable[[Console, T], None]) -> None:
        self.on_event.__exit__(None, None, None)
        if self.as_json:
            sys.stdout.write(json.dumps(row) + "\n")
        elif not self._quiet:
            draw(console(), value)


def console() -> Console:
    """The terminal on stdout; lines are never folded when it is a file or a pipe."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 10_000
    return Console(width=width, highlight=False, soft_wrap=not sys.stdout.isatty())


def plain(value: Any) -> Any:
    """The value as JSON has it: sizes as ints, paths as text, times in UTC with a Z, bytes in hexadecimal."""
    dump = getattr(value, "model_dump", None)
    if dump is not None:
        return dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Sequence | set | frozenset):
        return [plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no JSON form")
