"""Does a test notice when a promise is broken? Each line that keeps one is changed, and its tests must turn red.

    python -m tests.mutations [WORD ...]     only those whose file, change or tests hold one of the words

The work is done in a temporary copy of the checkout. Tests are seen green there before anything is changed, so that a
red one means that the change was noticed. Exit code 1 names each change that no test noticed, and each line that is
no longer in its file: there the promise has moved, and its entry in tests/mutations.toml must follow it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_suffix(".toml")
NOT_COPIED = (".git", ".venv", ".*_cache", ".cache", ".hypothesis", "__pycache__", "build", "dist", "demo-work")
FAILED = 1
"""Exit code of pytest when tests failed; others mean that none was run, or not to its end."""


@dataclass(frozen=True)
class Mutation:
    """One change. file: below snapchain/; old: text that stands there once; loses: what a user loses by it."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    loses: str

    def __str__(self) -> str:
        return f"{self.file}: {self.loses}"

    def has(self, words: Sequence[str]) -> bool:
        text = " ".join([self.file, self.old, self.new, self.loses, *self.tests])
        return not words or any(word in text for word in words)


def mutations() -> list[Mutation]:
    """The table, in its order."""
    entries = tomllib.loads(TABLE.read_text())["mutation"]
    return [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def mutated(source: str, mutation: Mutation) -> str:
    """The changed source. Raises ValueError unless the old text stands there exactly once."""
    count = source.count(mutation.old)
    if count != 1:
        raise ValueError(f"the old text is there {count} times, not once: {mutation.old.strip()}")
    return source.replace(mutation.old, mutation.new)


def run(copy: Path, tests: Sequence[str]) -> tuple[int, str]:
    """(pytest's exit code, its last words) for these tests in the copy."""
    argv = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", "--basetemp", str(copy.parent / "pt")]
    # One profile and one seed: what is green before the change is green for the same examples after it.
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_PROFILE": "ci",
    }
    done = subprocess.run([*argv, *tests], cwd=copy, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout[-2000:] + done.stderr[-500:]


def survives(copy: Path, mutation: Mutation) -> str:
    """Why the change counts as not noticed; empty when its tests turn red."""
    path = copy / "snapchain" / mutation.file
    try:
        source = path.read_text()
        path.write_text(mutated(source, mutation))
    except (OSError, ValueError) as error:
        return str(error)
    try:
        code, words = run(copy, mutation.tests)
    finally:
        path.write_text(source)
    if code == FAILED:
        return ""
    return "no test noticed it" if code == 0 else f"pytest ended with {code}:\n{words}"


def main(words: Sequence[str]) -> int:
    """The number of changes that were not noticed, at most 1."""
    chosen = [mutation for mutation in mutations() if mutation.has(words)]
    with tempfile.TemporaryDirectory(prefix="snapchain-mutations-") as name:
        copy = Path(name) / "copy"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
        code, said = run(copy, sorted({test for mutation in chosen for test in mutation.tests}))
        if code:
            print(f"The tests are not green before any change (pytest ended with {code}):\n{said}")
            return 1
        survivors = 0
        for mutation in chosen:
            reason = survives(copy, mutation)
            survivors += bool(reason)
            print(f"{'SURVIVED' if reason else 'noticed '}  {mutation}{': ' if reason else ''}{reason}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} changes turned a test red")
    return int(bool(survivors) or not chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
