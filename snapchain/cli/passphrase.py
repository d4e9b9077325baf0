"""Where the passphrase comes from: a file, a program, or SNAPCHAIN_PASSWORD; never a command-line argument.

An option beats the environment. Nothing is read or run until a repository turns out to be encrypted.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from snapchain.errors import InvalidInput

if TYPE_CHECKING:
    from snapchain.cli.output import Output


def source(file: Path | None, command: str | None, out: Output) -> Callable[[], str | None]:
    """A function that gives the passphrase when asked, or None when nobody has set one."""
    if file is not None and command is not None:
        raise InvalidInput("--password-file and --password-command are both given", hint="choose one of them")
    if file is not None:
        return lambda: _from_file(file, out)
    if command is not None:
        return lambda: _from_command(command)
    return lambda: os.environ.get("SNAPCHAIN_PASSWORD") or None


def _from_file(path: Path, out: Output) -> str:
    from snapchain.host import passphrases
    from snapchain.model.events import Notice

    return passphrases.from_file(path, on_notice=lambda words: out.on_event(Notice(words)))


def _from_command(command: str) -> str:
    from snapchain.host import passphrases

    try:
        argv = shlex.split(command)
    except ValueError as error:
        raise InvalidInput(f"not a command: {error}", subject=command) from error
    if not argv:
        raise InvalidInput("--password-command is empty")
    return passphrases.from_program(argv)
