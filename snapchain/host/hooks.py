"""A user's own program at a step of an operation, with the facts in its environment.

    SNAPCHAIN_HOOK=after SNAPCHAIN_DISK=web1/vda SNAPCHAIN_IMAGE=/images/web1.qcow2 SNAPCHAIN_OUTCOME=ok ...

An argument list, no shell. What a hook that takes too long has started is ended with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence

from snapchain.errors import ToolFailed
from snapchain.host.processes import run

SECONDS = 300.0
"""How long a hook may take, unless the user says otherwise."""
_PREFIX = "SNAPCHAIN_"
_CAP = 64 << 10


def run_hook(which: str, argv: Sequence[str], facts: Mapping[str, object], *, timeout: float = SECONDS) -> None:
    """Run a hook to its end. which: its name; facts: lower-case name -> value, told to it; None is left out.

    Raises ToolFailed when it fails or takes too long.
    """
    told = {"hook": which, **facts}
    env = {_PREFIX + name.upper(): _text(value) for name, value in told.items() if value is not None}
    try:
        run(argv, timeout=timeout, env=env, output_cap=_CAP)
    except ToolFailed as error:
        raise ToolFailed(
            f"the {which} hook: {error.message}",
            argv=error.argv,
            status=error.status,
            stderr=error.stderr,
            subject=argv[0],
            hint=error.hint,
        ) from error


def missing(which: str, argv: Sequence[str]) -> ToolFailed | None:
    """The error for a hook whose program is not there, before it is needed."""
    if shutil.which(argv[0]) is not None:
        return None
    return ToolFailed(f"the {which} hook: not installed", argv=argv, status=127, stderr="", subject=argv[0])


def _text(value: object) -> str:
    """One line without NUL: a variable cannot hold more."""
    return " ".join(str(value).replace("\0", "").split("\n"))
