"""snapchain as a process of its own, in a session of its own: a test may cut it off, kill it, or read its report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def started(
    words: Sequence[object], *, environment: Mapping[str, str], inside: Sequence[object] = ()
) -> subprocess.Popen[str]:
    """Start it. inside: the words before the command that put it on a host"""
    return subprocess.Popen(
        [*map(str, inside), sys.executable, "-m", "snapchain", *map(str, words)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def reported(child: subprocess.Popen[str], *, seconds: float = 300) -> tuple[int, Any]:
    """Its exit code, and the JSON object that it prints."""
    with child:
        out, error = child.communicate(timeout=seconds)
    assert out, error
    return child.returncode, json.loads(out)
