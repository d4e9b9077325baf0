"""The limit of open files: raised for us, not for what we start."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIMITED = "ulimit -Sn 256; exec "
RAISED = """
from snapchain.host import process_limits
from snapchain.host.processes import run
process_limits.raise_limit()
print(process_limits.limit(), run(["sh", "-c", "ulimit -Sn"]).stdout.decode().strip())
files = [open("/dev/null") for _ in range(400)]
print(run(["echo", "started"]).stdout.decode().strip())
"""


def said(script: str, *, limits: str = LIMITED) -> list[str]:
    done = subprocess.run(
        ["sh", "-c", limits + '"$0" -c "$1"', sys.executable, script], check=True, capture_output=True, text=True
    )
    return done.stdout.split()


def test_raised_to_the_hard_limit_and_not_inherited() -> None:
    ours, inherited, started = said(RAISED)
    assert int(ours) > 400
    assert (inherited, started) == ("256", "started")


def test_every_command_raises_it() -> None:
    script = "from snapchain.cli import main; main(['--version']); from snapchain.host.process_limits import limit; "
    assert int(said(script + "print(limit())")[-1]) > 256


@pytest.mark.parametrize("hard", ["-n 200", "-Hn 300"])
def test_never_above_the_hard_limit(hard: str) -> None:
    script = "from snapchain.host import process_limits; process_limits.raise_limit(); print(process_limits.limit())"
    assert said(script, limits=f"ulimit -Sn 100; ulimit {hard}; exec ") == [hard.split()[1]]
