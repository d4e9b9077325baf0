"""Thousands of mutated peers, stores, records and images, each in a process of its own: see __main__.py.

A failing case is told with the line that runs it alone. `make test` takes some dozens, `make soak` ten thousand.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.exhaustive import examples

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.sampled
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("kinds", "count"), [(("peers", "s3"), 12), (("stores", "records", "images"), 24)])
def test_hostile_input_ends_in_a_clear_error_or_the_right_bytes(
    kinds: tuple[str, ...], count: int, tmp_path: Path
) -> None:
    chosen = [word for kind in kinds for word in ("--kind", kind)]
    argv = [
        sys.executable,
        "-m",
        "tests.hostile",
        *chosen,
        "--corpus",
        "--seed",
        "1",
        "--keep",
        str(tmp_path / "world"),
    ]
    done = subprocess.run(
        [*argv, "--count", str(examples(count, times=288))], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5000:]
