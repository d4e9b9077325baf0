"""Whether a path is on a file system over a network: its client may show late what another machine has changed."""

from __future__ import annotations

import os
from pathlib import Path

from snapchain.host.os_errors import os_errors

_CACHES = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "afs", "coda", "davfs", "fuse")
_MOUNTS = Path("/proc/self/mountinfo")


def network_file_system(path: Path) -> str | None:
    """Its type, such as `nfs4`, where its client keeps names and attributes for a while; else None.

    Raises what looking at the path raises.
    """
    with os_errors(path):
        device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((kind for found, kind in map(_mount, lines) if found == number and _caches(kind)), None)


def _mount(line: str) -> tuple[str, str]:
    """Device number and type of a line of mountinfo; see proc_pid_mountinfo(5)."""
    before, _, after = line.partition(" - ")
    return before.split()[2], after.split(" ")[0]


def _caches(kind: str) -> bool:
    return kind.partition(".")[0] in _CACHES
