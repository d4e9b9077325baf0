"""From an exception to words on stderr (with --json one JSON object on stdout) and an exit code.

    snapchain: error: /images/a.qcow2: L1 table ends outside the file
    snapchain: hint: restore it from a point that verifies

Errors of the tree in `snapchain.errors` are expected, and never show a traceback. Any other exception is a bug in
snapchain and is reported as one; SNAPCHAIN_DEBUG=1 shows its traceback.

SIGTERM and SIGHUP end a command as Ctrl-C does: it cleans up, and prints what is left to resume. A SIGHUP that was
ignored when the command began stays ignored, as nohup(1) wants it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from snapchain.cli.streams import ReaderGone
from snapchain.errors import Interrupted, InvalidInput, OutputFailed, SnapchainError, ToolFailed
from snapchain.host.os_errors import translated
from snapchain.host.terminal import printable

BUG = 1
USAGE = InvalidInput.exit_code
INTERRUPTED = 130
BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE ended


def report(error: BaseException, *, as_json: bool, left_behind: str | None = None, verb: str = "") -> int:
    """Print an exception, and return the exit code.

    as_json: one object on stdout, else lines on stderr
    left_behind: the hint after an interrupt: what the command leaves, and how to continue
    verb: of the command line, for usage errors that do not name it themselves
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else BUG
    if isinstance(error, ReaderGone):
        return BROKEN_PIPE
    facts = _facts(error, left_behind, verb)
    if os.environ.get("SNAPCHAIN_DEBUG"):
        traceback.print_exception(error)
    if as_json:
        _write_json(facts)
    else:
        _write(
            facts,
            has_rows=isinstance(error, SnapchainError) and error.has_rows,
            stderr=error.stderr if isinstance(error, ToolFailed) else "",
        )
    return int(facts["exit_code"])


def _write_json(facts: dict[str, Any]) -> None:
    line = json.dumps({"error": facts}) + "\n"
    try:
        if facts["kind"] != OutputFailed.kind:
            sys.stdout.write(line)
            sys.stdout.flush()
            return
    except (ReaderGone, OutputFailed):
        pass
    sys.stderr.write(line)  # stdout is broken, and the error must not get lost
    sys.stderr.flush()


def _facts(error: BaseException, left_behind: str | None, verb: str) -> dict[str, Any]:
    if isinstance(error, OSError) and isinstance(error.filename, str):
        # The kernel's error about a file: usually another program moved or replaced it meanwhile.
        error = translated(error)
    if isinstance(error, SnapchainError):
        facts = _row(error.kind, error.message, error.exit_code, subject=error.subject, hint=error.hint)
        if isinstance(error, ToolFailed):
            facts |= {"argv": list(error.argv), "status": error.status, "stderr": error.stderr}
        return facts
    if isinstance(error, KeyboardInterrupt):
        return _row("interrupted", "interrupted", interrupted_code(), hint=left_behind)
    import typer  # inside: what is no error, or one of ours, can do without

    # Public names of typer that lead to its usage errors, whichever version keeps them in whichever module.
    if isinstance(error, typer.BadParameter.__mro__[1:3]):  # UsageError, ClickException
        return _usage(error, verb)
    if isinstance(error, typer.Abort):
        return _row("interrupted", "no more input", INTERRUPTED)
    message = f"this is a bug in snapchain: {type(error).__name__}: {error}"
    return _row("bug", message, BUG, hint="run it again with SNAPCHAIN_DEBUG=1 and report what it shows")


def _usage(error: Any, verb: str) -> dict[str, Any]:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else f"snapchain {verb}".rstrip()
    return _row("invalid-input", error.format_message(), USAGE, hint=f"{command} --help")


def _row(
    kind: str, message: str, exit_code: int, *, subject: str | None = None, hint: str | None = None
) -> dict[str, Any]:
    return {"kind": kind, "message": message, "subject": subject, "hint": hint, "exit_code": exit_code}


def _write(facts: dict[str, Any], *, has_rows: bool, stderr: str) -> None:
    subject = f"{printable(facts['subject'])}: " if facts["subject"] else ""
    word = "" if facts["kind"] == "interrupted" else "error: "
    first, *rest = map(printable, facts["message"].split("\n") if has_rows else [facts["message"]])
    lines = [f"snapchain: {word}{subject}{first}", *(f"    {line.strip()}" for line in rest)]
    # The message has the program's last line already.
    lines += [f"    {printable(line)}" for line in stderr.strip().splitlines() if line.strip() not in facts["message"]]
    if facts["hint"]:
        lines.append(f"snapchain: hint: {printable(facts['hint'])}")
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()


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


def interrupted_code() -> int:
    """The exit code of an interrupted command: 129 by SIGHUP, 130 by Ctrl-C or SIGTERM."""
    return _code


def _interrupt(number: int, _frame: FrameType | None) -> None:
    global _code  # noqa: PLW0603
    _code = _CODES[signal.Signals(number)]
    # A terminal that closes sends it twice, by the kernel and by the shell: the second must not cut the clean-up short.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise Interrupted(signal.Signals(number).name)
