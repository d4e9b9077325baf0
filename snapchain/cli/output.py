"""Where a verb's results go: tables and pictures for a person, one JSON object for a program, both on stdout.

A verb hands over the plan or the report and a function that draws it; the same values make the JSON object, so the
two cannot differ.  Findings and failures go to stderr too, where --quiet does not hide them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import typer

from snapchain.cli import render, streams
from snapchain.cli.progress import Mode, Reporter
from snapchain.cli.render import UNBOUNDED
from snapchain.errors import OutputFailed

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.protocol import Destination
    from snapchain.model.traffic import Bill, Prices

T = TypeVar("T")
Draw = Callable[["Console", T], None]


class Output:
    """The output of one command. A context manager: at its end the progress bar is removed."""

    def __init__(
        self,
        *,
        json: bool,
        dry_run: bool = False,
        progress: Mode = Mode.AUTO,
        quiet: bool = False,
        password_file: Path | None = None,
        password_command: str | None = None,
    ) -> None:
        self.as_json = json
        self.dry_run = dry_run
        self.password_file = password_file
        self.password_command = password_command
        self._quiet = quiet
        self.on_event = Reporter(progress, quiet=quiet)
        self.prices: Prices | None = None
        self._places: list[Destination] = []

    def __enter__(self) -> Self:
        self.on_event.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.on_event.__exit__(kind, error, tb)

    def counts(self, place: Destination) -> None:
        """Say in the result what was asked of this destination, where it counts that. Raises as `prices_of`."""
        if place.traffic is None:
            return
        from snapchain.ops.prices import prices_of

        self.prices = prices_of(os.environ)
        self._places.append(place)

    def plan(self, plan: T, draw: Draw[T], *, problems: Draw[T] | None = None, status: int = 0) -> bool:
        """Show what would be done when the user asked for no more; True when that is so. Else as `show`."""
        if self.dry_run:
            self._write({"dry_run": True, "plan": plain(plan)}, plan, draw, problems, status, self._bills())
            self._end(status)
        return self.dry_run

    def show(
        self,
        found: T,
        draw: Draw[T],
        *,
        problems: Draw[T] | None = None,
        status: int = 0,
        draws_traffic: bool = False,
    ) -> None:
        """Show what was found by a command that changes nothing.

        problems: draws what is wrong in it, on stderr, even with --quiet
        status: the exit code, not 0 for a result with problems
        draws_traffic: whether the requests to the destination are also shown to a person, not only in JSON
        Raises OutputFailed.
        """
        self._write(plain(found), found, draw, problems, status, self._bills(), draws_traffic=draws_traffic)
        self._end(status)

    def report(self, report: T, draw: Draw[T], *, problems: Draw[T] | None = None, status: int = 0) -> None:
        """Show what was done; as `show`. Raises OutputFailed, with the fact that the work is done."""
        try:
            self._write(plain(report), report, draw, problems, status, self._bills(), draws_traffic=True)
        except OutputFailed as error:
            failed = OutputFailed(
                f"the work is done; only its report is lost: {error.message}",
                subject=error.subject,
                hint="do not repeat the command; `snapchain log` and `inspect` show the result",
            )
            failed.exit_code = status or failed.exit_code  # what went wrong in the work weighs more
            raise failed from error
        self._end(status)

    def row(self, value: T, draw: Draw[T]) -> None:
        """Show one of several results of a command that goes on: with --json one object a line. Raises OutputFailed."""
        self._write(plain(value), value, draw, None, 0)

    def _bills(self) -> list[Bill]:
        from snapchain.model.traffic import Bill

        counted = [(place.url, place.traffic) for place in self._places]
        return [Bill.of(url, traffic, self.prices) for url, traffic in counted if traffic is not None]

    def _write(
        self,
        row: Any,
        value: T,
        draw: Draw[T],
        problems: Draw[T] | None,
        status: int,
        bills: Sequence[Bill] = (),
        *,
        draws_traffic: bool = False,
    ) -> None:
        self.on_event.__exit__(None, None, None)
        if self.as_json:
            if isinstance(row, dict) and bills:
                row.setdefault("traffic", plain(bills))
            if isinstance(row, dict) and self.on_event.notes:
                row.setdefault("notices", list(self.on_event.notes))
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
            return
        try:
            if not self._quiet:
                draw(console(), value)
                if draws_traffic:
                    render.traffic(console(), bills)
                sys.stdout.flush()
        finally:
            if problems is not None:
                self._write_problems(value, problems, status)

    def _write_problems(self, value: T, problems: Draw[T], status: int) -> None:
        """What is wrong, on stderr, where the reader of stderr has not seen it in the report. Also if that is lost."""
        if not self._quiet and streams.same_place():
            return
        if not self._quiet and status and streams.is_piped_from_a_terminal():
            # The rows would most likely be on the terminal twice, but `| grep` may also have hidden them.
            sys.stderr.write(f"snapchain: exit code {status}: the report says what is wrong\n")
        else:
            problems(console(stderr=True), value)
        sys.stderr.flush()

    @staticmethod
    def _end(status: int) -> None:
        if status:
            raise typer.Exit(status)


def console(*, stderr: bool = False) -> Console:
    """The terminal on stdout or stderr; a file or a pipe has no end of the line."""
    from snapchain.cli.console import EscapingConsole

    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return EscapingConsole(stderr=stderr, width=None if is_terminal else UNBOUNDED)


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
