"""All verbs: importing a verb's file registers it, and the order here is the order in --help."""

# isort: off
from snapchain.cli.app import app
from snapchain.cli import (
    init,
    snapshot,
    ship,
    send,
    sync,
    receive,
    log,
    restore,
    merge,
    verify,
    gc,
    nightly,
    inspect,
    diff,
)
from snapchain.cli import serve_replica

# isort: on

__all__ = [
    "app",
    "diff",
    "gc",
    "init",
    "inspect",
    "log",
    "merge",
    "nightly",
    "receive",
    "restore",
    "send",
    "serve_replica",
    "ship",
    "snapshot",
    "sync",
    "verify",
]
