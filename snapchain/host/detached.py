"""Processes that outlive us: each in a session of its own, without a terminal.

All other programs die with us (processes.py).  One of these undoes what we leave when we are killed, and shares a
descriptor with us; the other is the QEMU of a guest that has come to this host.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from snapchain.errors import Unavailable
from snapchain.host.os_errors import os_errors

_RUN = (
    "import sys; sys.path[:] = sys.argv[1].split(chr(0x1f)); from importlib import import_module; "
    "import_module(sys.argv[2]).main(int(sys.argv[3]), sys.argv[4])"
)
_SEPARATOR = "\x1f"
_THEIR_FD = 3
_PACKAGES = Path(__file__).resolve().parents[2]


def start_module(module: str, argument: str, *, fd: int, environment: Mapping[str, str] = os.environ) -> int:
    """Run `module.main(fd, argument)` in a new Python with a copy of `fd`, and no standard streams; its pid.

    It finds modules where this process does.  A path that is relative here would be another one there: it is left out.
    Raises Unavailable.
    """
    if not sys.executable:
        raise Unavailable("this Python does not know its own program, so it can start no second one")
    places = _SEPARATOR.join([*(path for path in sys.path if path.startswith("/")), str(_PACKAGES)])
    argv = [sys.executable, "-I", "-S", "-c", _RUN, places, module, str(_THEIR_FD), argument]
    nulls = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
    actions = [(os.POSIX_SPAWN_DUP2, fd, _THEIR_FD), *nulls]
    with os_errors(sys.executable):
        return os.posix_spawn(argv[0], argv, environment, file_actions=actions, setsid=True, setsigmask=())


def start_program(argv: list[str], *, log: Path, environment: dict[str, str]) -> int:
    """Run a program that goes on when we end: a session of its own, no input, its output appended to `log`; its pid.

    Raises what keeps it from being started.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    with os_errors(argv[0]):
        return os.posix_spawn(argv[0], argv, environment, file_actions=actions, setsid=True, setsigmask=())
