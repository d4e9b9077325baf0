"""The user's own programs around a run and around each disk, with the facts in their environment.

    SNAPCHAIN_HOOK=after SNAPCHAIN_DISK=web1/vda SNAPCHAIN_IMAGE=/images/web1.qcow2 SNAPCHAIN_OUTCOME=ok ...

An argument list, no shell. What a hook that takes too long has started is ended with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping

from snapchain.errors import ToolFailed
from snapchain.host.processes import run
from snapchain.ops.nightly.config import Hooks

_PREFIX = "SNAPCHAIN_"
_CAP = 64 << 10


def missing_programs(hooks: Hooks) -> Iterator[ToolFailed]:
    """Hooks whose program is not there, found out before it is needed."""
    for which in type(hooks).model_fields:
        argv = getattr(hooks, which)
        if isinstance(argv, tuple) and shutil.which(argv[0]) is None:
            yield ToolFailed(f"the {which} hook: not installed", argv=argv, status=127, stderr="", subject=argv[0])


class HookRunner:
    """Hooks of one run or of one disk. facts: lower-case name -> value, told to each of them."""

    def __init__(self, hooks: Hooks, facts: Mapping[str, object], *, on_notice: Callable[[str], None]) -> None:
        self._hooks, self._facts, self._on_notice = hooks, dict(facts), on_notice

    def run(self, which: str, **facts: object) -> None:
        """Run the hook `which` (a field of the configuration), if there is one.

        Raises ToolFailed when it fails or takes too long, unless such hooks are to be notes only.
        """
        argv = getattr(self._hooks, which)
        if argv is None:
            return
        told = {"hook": which, **self._facts, **facts}
        env = {_PREFIX + name.upper(): _text(value) for name, value in told.items() if value is not None}
        try:
            run(argv, timeout=self._hooks.timeout, env=env, output_cap=_CAP)
        except ToolFailed as error:
            failed = ToolFailed(
                f"the {which} hook: {error.message}",
                argv=error.argv,
                status=error.status,
                stderr=error.stderr,
                subject=argv[0],
                hint=error.hint,
            )
            if self._hooks.failing == "failure":
                raise failed from error
            self._on_notice(str(failed))


def _text(value: object) -> str:
    """One line without NUL: a variable cannot hold more."""
    return " ".join(str(value).replace("\0", "").split("\n"))
