"""The user's own programs around a run and around each disk (host/hooks.py runs them)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from snapchain.errors import ToolFailed
from snapchain.host import hooks as programs
from snapchain.ops.nightly.config import Hooks


def missing_programs(hooks: Hooks) -> Iterator[ToolFailed]:
    """Hooks whose program is not there, found out before it is needed."""
    for which in type(hooks).model_fields:
        argv = getattr(hooks, which)
        if isinstance(argv, tuple) and (error := programs.missing(which, argv)) is not None:
            yield error


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
        try:
            programs.run_hook(which, argv, {**self._facts, **facts}, timeout=self._hooks.timeout)
        except ToolFailed as error:
            if self._hooks.failing == "failure":
                raise
            self._on_notice(str(error))
