"""Where a user's programs keep what they remember: the XDG base directories."""

from __future__ import annotations

import os
from pathlib import Path

SYSTEM_STATE = Path("/var/lib/snapchain")
"""Where an installed nightly run of root keeps its state, whatever its environment says."""


def state_dir() -> Path:
    """$XDG_STATE_HOME/snapchain, by default ~/.local/state/snapchain."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "snapchain"


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/snapchain, by default ~/.cache/snapchain."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snapchain"
