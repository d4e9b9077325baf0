"""Raise the limit of open files of this process as far as the system allows.

Every file of a chain is opened, and locked by a descriptor of its own; several disks at once soon need more than the
soft limit of 1024 that most systems begin with.  That limit is kept low for programs that call select(2); we do not,
and raise it to the hard limit.  Programs that we start begin with what we began with.
"""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

_MOST = 1 << 20
"""More is of no use, and some kernels have no limit at all."""
_LIMIT = resource.RLIMIT_NOFILE
_began_with: int | None = None


def raise_limit() -> None:
    """Raise the soft limit of this process to the hard one. Where that is refused, it stays as it is."""
    global _began_with  # noqa: PLW0603 - a limit of the process is one
    soft, hard = resource.getrlimit(_LIMIT)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(_LIMIT, (wanted, hard))
    except (OSError, ValueError):
        return
    _began_with = _began_with or soft


def for_children() -> list[str]:
    """Options of prlimit(1) that give a program the soft limit that this process began with.

    Not set between fork and exec: there the files of this process are still open, more than that limit may allow.
    """
    return [] if _began_with is None else [f"--nofile={_began_with}:"]


def limit() -> int:
    """How many files may be open at once."""
    soft = resource.getrlimit(_LIMIT)[0]
    return _MOST if soft == resource.RLIM_INFINITY else soft


# --- Hardening: a process that holds keys gives away neither its memory nor files that everybody may write to.
#
# core files    limit 0, inherited by child processes
# dumps         not dumpable, so that a core dump handler gets nothing. Only with CAP_SYS_PTRACE (root): without it,
#               other snapchain processes of the same user could not see which files this process has open, and a
#               filesystem without locks offers no other way to see that
# new files     never writable by everybody, whatever umask the caller set
#
# These settings apply to all threads.

_PR_SET_DUMPABLE = 4
_CAP_SYS_PTRACE = 1 << 19
_EVERYBODY_WRITES = 0o002


def harden() -> None:
    """Apply it to this process. It cannot be undone."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if _capabilities() & _CAP_SYS_PTRACE:
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    os.umask(os.umask(0o077) | _EVERYBODY_WRITES)


def _capabilities() -> int:
    """The effective ones. 0 where /proc does not tell."""
    try:
        for line in Path("/proc/self/status").read_bytes().splitlines():
            if line.startswith(b"CapEff:"):
                return int(line.split()[1], 16)
    except OSError:
        pass
    return 0
