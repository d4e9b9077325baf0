"""All verbs by name, in the order of --help. Importing a verb's file registers it.

A command needs its own verb only; the parser of the other eighteen would be a tenth of its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

VERBS = (
    "init", "snapshot", "ship", "send", "sync", "migrate", "receive", "log", "restore", "merge", "hold", "release",
    "verify", "gc", "nightly", "inspect", "diff", "doctor", "serve-replica",
)  # fmt: skip


def load(words: Sequence[str] = ()) -> typer.Typer:
    """The application for a command line: with the verb that it begins with, else with all of them."""
    from snapchain.cli.app import app

    wanted = words[:1] if words and words[0] in VERBS else VERBS
    for verb in wanted:
        import_module(f"snapchain.cli.{verb.replace('-', '_')}")
    return app
