"""All verbs: importing a verb's file registers it, and the order here is the order in --help."""

# isort: off
from snapchain.cli.app import app
from snapchain.cli import init, snapshot, ship, send, receive, log, restore, merge, hold, release, verify, gc, nightly
from snapchain.cli import inspect, diff, doctor, serve_replica

# isort: on

__all__ = [
    "app", "diff", "doctor", "gc", "hold", "init", "inspect", "log", "merge", "nightly", "receive", "release",
    "restore", "send", "serve_replica", "ship", "snapshot", "verify",
]  # fmt: skip
