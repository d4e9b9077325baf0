"""Programs that the administrator of this host has put into a directory, for what comes to it from elsewhere.

    /etc/snapchain/arrival.d/10-firewall before|after|aborted        SNAPCHAIN_GUEST=web1 ...

They run in the order of their names, with the rights of whoever is logged in.  Nothing that comes through a stream
names a program: it gives facts only.  So a file counts only where nobody else can have written it.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from snapchain.errors import InvalidInput
from snapchain.host.directory import Directory
from snapchain.host.hooks import run_hook
from snapchain.host.os_errors import os_errors
from snapchain.host.private import is_own

ARRIVAL = Path("/etc/snapchain/arrival.d")
"""For a guest that comes to this host while it runs."""
_SECONDS = 60.0


def run_site_hooks(directory: Path, when: str, facts: Mapping[str, object]) -> None:
    """Run all of them to their ends; none where there is no such directory. when: their argument, and SNAPCHAIN_HOOK

    Raises ToolFailed for the first that fails or takes over a minute, InvalidInput for one that others may change.
    """
    for program in _programs(directory):
        run_hook(when, [str(program), when], facts, timeout=_SECONDS)


def _programs(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    found = []
    with os_errors(directory), Directory.open(directory) as place:
        for name in sorted(place.names()):
            status = place.status(name)
            if name.startswith(".") or not stat.S_ISREG(status.st_mode) or not status.st_mode & 0o111:
                continue
            if not is_own(place, status):
                raise InvalidInput(
                    "another user may have written it",
                    subject=directory / name,
                    hint="let it and its directory belong to root, and be writable by nobody else",
                )
            found.append(directory / name)
    return found
