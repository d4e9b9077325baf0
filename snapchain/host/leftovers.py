"""What killed runs have left under temporary names, and what only looks like that."""

from __future__ import annotations

import fcntl
import os
import stat

from snapchain.errors import Busy
from snapchain.host.directory import Directory, same_file


def is_leftover(status: os.stat_result, *, finished: os.stat_result | None = None) -> bool:
    """Whether a file under a temporary name can be a run's of this user; for root, of any user.

    A link, a directory, a FIFO, a device and a second name of another file are none: no run of ours makes such a thing.
    finished: what has the final name; a run that was killed between giving that and taking the temporary one off has
    left two names of one file
    """
    if not stat.S_ISREG(status.st_mode) or os.geteuid() not in (0, status.st_uid):
        return False
    is_published = finished is not None and same_file(finished, status)
    return status.st_nlink == 1 or (status.st_nlink == 2 and is_published)


def remove_leftover(directory: Directory, name: str, *, final: str | None = None) -> bool:
    """Remove a file of a killed run; whether it was one. final: the name that it was to get.

    Raises Busy while a run has it locked (flock), and OSError.
    """
    try:
        if not is_leftover(directory.status(name), finished=_status(directory, final)):
            return False
        fd = directory.open_file(name)
    except FileNotFoundError:
        return False
    try:
        # What was opened, not what had the name before.
        status = os.fstat(fd)
        if not is_leftover(status, finished=_status(directory, final)):
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy("a run is at work on it", subject=directory.path / name, hint="wait for its end") from error
        except OSError:  # no locks here: it counts as in use
            return False
        return directory.remove(name, only=status)
    finally:
        os.close(fd)


def _status(directory: Directory, name: str | None) -> os.stat_result | None:
    if name is None:
        return None
    try:
        return directory.status(name)
    except FileNotFoundError:
        return None
