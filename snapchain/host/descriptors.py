"""Raise the limit of open files of this process as far as the system allows.

Every file of a chain is opened, and locked by a descriptor of its own; several disks at once soon need more than the
soft limit of 1024 that most systems begin with.  That limit is kept low for programs that call select(2); we do not,
and raise it to the hard limit.  Programs that we start begin with what we began with.
"""

from __future__ import annotations

import resource

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
