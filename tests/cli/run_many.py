"""Runs many command lines, each in a forked child of one warm process, so that starting Python is paid once.

    run_many.py COMMANDS.json RESULTS.json

COMMANDS: a list of argument lists.  RESULTS: for each its pid, exit code, processor time, peak memory, and output.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def warm() -> None:
    """Import what the verbs import, so that children do not."""
    import snapchain.destination.address
    import snapchain.ops.init
    import snapchain.ops.inspect
    import snapchain.ops.ship.run  # noqa: F401
    from snapchain.cli.app import command
    from snapchain.cli.verbs import VERBS

    for name in VERBS:
        command(name)


def child(words: list[str], out: int, err: int) -> None:
    from snapchain.cli import main

    os.dup2(out, 1)
    os.dup2(err, 2)
    status = 99
    try:
        status = main(words)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def one(words: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            child(words, out.fileno(), err.fileno())
        _, status, usage = os.wait4(pid, 0)
        out.seek(0)
        err.seek(0)
        return {
            "pid": pid,
            "exit_code": os.waitstatus_to_exitcode(status),
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_bytes": usage.ru_maxrss * 1024,
            "stdout": out.read().decode(),
            "stderr": err.read().decode(),
        }


if __name__ == "__main__":
    warm()
    commands = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([one(words) for words in commands]))
