"""What people met with other tools, each as a script that drives the command as they would.

A script of tests/cases prints one line and exits 0 when all is well; `snapchain` is the one of this environment.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CASES = sorted((Path(__file__).parent / "cases").glob("[0-9]*.sh"))
NEEDS_ROOT = re.compile(r"\b(mount|losetup|mkfs)\b")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.root] if NEEDS_ROOT.search(case.read_text()) else []) for case in CASES],
    ids=lambda case: case.stem,
)
def test_case(case: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}:/usr/sbin:/sbin"
    done = subprocess.run(
        [case], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_cases() -> None:
    assert len(CASES) >= 12
