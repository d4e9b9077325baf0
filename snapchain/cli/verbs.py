"""All verbs: importing a verb's file registers it, and the order here is the order in --help."""

# isort: off
from snapchain.cli.app import app
from snapchain.cli import init, snapshot, ship, log, restore, merge, hold, release, verify, gc, nightly, inspect, diff
from snapchain.cli import doctor

# isort: on

__all__ = [
    "app", "diff", "doctor", "gc", "hold", "init", "inspect", "log", "merge", "nightly", "release", "restore", "ship",
    "snapshot", "verify",
]  # fmt: skip
