"""The command line: parse, plan, show, run, show. One file a verb; everything that matters happens in `snapchain.ops`.

Nothing heavy is imported here or at the top of a verb's file, so that `snapchain --help` answers at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType

from snapchain.cli import exits
from snapchain.errors import Interrupted

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (the table is in the README)."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        before = signal.signal(signal.SIGTERM, _terminate)
    except ValueError:  # called from a thread that is not the main one: signals are somebody else's
        before = None
    try:
        from snapchain.cli.verbs import app  # inside: a Ctrl-C while it loads gets a clean end too

        status = app(words, prog_name="snapchain", standalone_mode=False)
        sys.stdout.flush()  # a reader that has gone shows here, not in the interpreter's last breath
        return int(status or 0)
    except BaseException as error:  # noqa: BLE001 - the last handler: everything becomes words and an exit code
        return exits.tell(error, as_json="--json" in words)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Interrupted("SIGTERM")
