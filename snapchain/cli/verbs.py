"""All verbs: importing a verb's file registers it, and the order here is the order in --help."""

# isort: off
from snapchain.cli.app import app
from snapchain.cli import init, snapshot, ship, restore

# isort: on

__all__ = ["app", "init", "restore", "ship", "snapshot"]
