"""Where the passphrase comes from: a file, a program, or SNAPCHAIN_PASSWORD; never a command-line argument.

An option beats the environment. Nothing is read or run until a repository turns out to be encrypted.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path

from snapchain.errors import InvalidInput

_SECONDS = 60.0
_LIMIT = 64 * 1024


def source(file: Path | None, command: str | None) -> Callable[[], str | None]:
    """A function that gives the passphrase when asked, or None when nobody has set one."""
    if file is not None and command is not None:
        raise InvalidInput("--password-file and --password-command are both given", hint="choose one of them")
    if file is not None:
        return lambda: _from_file(file)
    if command is not None:
        return lambda: _from_command(command)
    return lambda: os.environ.get("SNAPCHAIN_PASSWORD") or None


def _from_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return _first_line(file.read(_LIMIT), subject=str(path))
    except OSError as error:
        raise InvalidInput(f"the passphrase cannot be read: {error.strerror}", subject=path) from error


def _from_command(command: str) -> str:
    from snapchain.host.processes import run

    try:
        argv = shlex.split(command)
    except ValueError as error:
        raise InvalidInput(f"not a command: {error}", subject=command) from error
    if not argv:
        raise InvalidInput("--password-command is empty")
    # The whole environment: a password manager finds its agent, its display and its home there.
    done = run(argv, timeout=_SECONDS, env=dict(os.environ))
    return _first_line(done.stdout, subject=argv[0])


def _first_line(text: bytes, *, subject: str) -> str:
    try:
        line = text.decode().partition("\n")[0].rstrip("\r")
    except UnicodeDecodeError as error:
        raise InvalidInput("the passphrase is not UTF-8 text", subject=subject) from error
    if not line:
        raise InvalidInput("the passphrase there is empty", subject=subject)
    return line
