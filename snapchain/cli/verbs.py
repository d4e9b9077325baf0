"""All verbs: importing a verb's file registers it, and the order here is the order in --help."""

# isort: off
from snapchain.cli.app import app
from snapchain.cli import init, snapshot, ship, send, sync, receive, log, restore, merge, hold, release, verify, gc
from snapchain.cli import nightly, inspect, diff, doctor, serve_replica

# isort: on

__all__ = [
    "app", "diff", "doctor", "gc", "hold", "init", "inspect", "log", "merge", "nightly", "receive", "release",
    "restore", "send", "serve_replica", "ship", "snapshot", "sync", "verify",
]  # fmt: skip
