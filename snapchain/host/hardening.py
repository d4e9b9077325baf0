"""What a process that holds keys keeps from others: its memory, and files that anybody may write to.

core files    limit 0, for the programs that it starts as well
dumps         not dumpable, so a program that takes core dumps from the kernel gets none, whatever its limit. Only with
              CAP_SYS_PTRACE (root): without it, other snapchain processes of the same user could no longer see
              which files this one has open, and on a filesystem without locks they see nothing else
new files     never writable by everybody, whatever the umask that the caller has left

All threads have all of this.
"""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

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
