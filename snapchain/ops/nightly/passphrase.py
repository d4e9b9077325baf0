"""Where a destination's passphrase comes from: a file, a program, or a variable of the environment."""

from __future__ import annotations

import os
from collections.abc import Callable

from snapchain.errors import InvalidInput
from snapchain.host.files import read_small
from snapchain.host.processes import run
from snapchain.ops.nightly.config import Destination

_SECONDS = 60.0
_CAP = 64 << 10
_DEFAULT = "SNAPCHAIN_PASSWORD"


def source(destination: Destination) -> Callable[[], str]:
    """A function that gives the passphrase when asked. It raises InvalidInput where nobody has set one."""
    if (path := destination.password_file) is not None:
        # Secrets are often links: systemd's credentials, Kubernetes' mounts.
        return lambda: _first_line(read_small(path.resolve(), cap=_CAP), subject=str(path))
    if (argv := destination.password_command) is not None:
        # The whole environment: a password manager finds its agent and its home there.
        return lambda: _first_line(run(argv, timeout=_SECONDS, env=dict(os.environ)).stdout, subject=argv[0])
    name = destination.password_env or _DEFAULT
    return lambda: _variable(name)


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise InvalidInput(
            f"the repository is encrypted, and the variable {name} with its passphrase is not set",
            hint="set it, or let the destination name its password_file, password_command or password_env",
        )
    return value


def _first_line(text: bytes, *, subject: str) -> str:
    try:
        line = text.decode().partition("\n")[0].rstrip("\r")
    except UnicodeDecodeError as error:
        raise InvalidInput("the passphrase is not UTF-8 text", subject=subject) from error
    if not line:
        raise InvalidInput("the passphrase there is empty", subject=subject)
    return line
