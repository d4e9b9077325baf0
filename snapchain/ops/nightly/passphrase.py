"""Where a destination's passphrase comes from: a file, a program, or a variable of the environment.

A service gets the content of files as systemd's credentials, by the destination's name (systemd.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from snapchain.errors import InvalidInput
from snapchain.host import passphrases
from snapchain.ops.nightly.config import Destination

_DEFAULT = "SNAPCHAIN_PASSWORD"


def source(destination: Destination, *, on_notice: passphrases.OnNotice) -> Callable[[], str]:
    """A function that gives the passphrase when asked. It raises InvalidInput where nobody has set one."""
    configured = _configured(destination, on_notice)
    if destination.password_command is not None or destination.password_env is not None:
        return configured
    return lambda: _credential(destination.name, on_notice) or configured()


def _configured(destination: Destination, on_notice: passphrases.OnNotice) -> Callable[[], str]:
    if (path := destination.password_file) is not None:
        return lambda: passphrases.from_file(path, on_notice=on_notice)
    if (argv := destination.password_command) is not None:
        return lambda: passphrases.from_program(argv)
    name = destination.password_env or _DEFAULT
    return lambda: _variable(name)


def _credential(name: str, on_notice: passphrases.OnNotice) -> str | None:
    """The passphrase that systemd has handed over. None where it has none for this destination, or only a line end."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory or "/" in name:
        return None
    path = Path(directory) / name
    if not path.is_file() or path.stat().st_size <= 1:
        return None
    return passphrases.from_file(path, on_notice=on_notice)


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise InvalidInput(
            f"the repository is encrypted, and the variable {name} with its passphrase is not set",
            hint="set it, or let the destination name its password_file, password_command or password_env",
        )
    return value
