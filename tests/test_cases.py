"""What people met with other tools, and what an attacker would try, as scripts that drive the command as a user would.

A script of tests/cases prints one line and exits 0 when all is well; `snapchain` is the one of this environment.
One of tests/cases/security exits 2 if it could not set up its attack, which proves nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "cases"
CASES = sorted(FOLDER.glob("[0-9]*.sh")) + sorted(FOLDER.glob("security/[0-9]*.sh"))
NEEDS_ROOT = re.compile(r"\b(mount|losetup|mkfs|asnobody)\b")
MINUTES = {"22-sender-catalogue-too-large", "62-s3-endless-answers"}


def _parameter(case: Path) -> object:
    marks = [pytest.mark.root] if NEEDS_ROOT.search(case.read_text()) else []
    marks += [pytest.mark.soak] if case.stem in MINUTES else []
    return pytest.param(case, marks=marks, id=str(case.relative_to(FOLDER).with_suffix("")))


@pytest.mark.parametrize("case", [_parameter(case) for case in CASES])
def test_case(case: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}:/usr/sbin:/sbin"
    done = subprocess.run(
        [case], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode == 2 and "no loop device" in done.stdout:
        pytest.skip("no loop device can be attached here")
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_cases() -> None:
    assert len(CASES) >= 12 + 16
