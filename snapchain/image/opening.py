"""Opening an image file that may be hostile: read-only, no symbolic link followed, nothing but a file or block device.

Every directory on the way is opened with O_NOFOLLOW from the root on, and the file's type is known before it is
opened for reading: a FIFO does not block us, a character device is never touched, a swapped name is noticed.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from snapchain.errors import InvalidInput, NotFound, SnapchainError, Unavailable
from snapchain.host.os_errors import REMEDIES, denied

_WALK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISLNK, "a symbolic link"),
)


def open_image(path: Path, *, subject: object, refusal: type[SnapchainError] = InvalidInput) -> int:
    """A descriptor of `path`, an absolute path without symbolic links (as os.path.realpath gives it).

    Raises NotFound, `refusal` for what is no regular file or block device, InvalidInput where access is denied.
    """
    try:
        return _open(path, subject, refusal)
    except OSError as error:
        raise _translated(error, path, subject, refusal) from error


def _open(path: Path, subject: object, refusal: type[SnapchainError]) -> int:
    directory = os.open("/", _WALK | os.O_DIRECTORY)
    try:
        for name in path.parts[1:-1]:
            below = os.open(name, _WALK | os.O_DIRECTORY, dir_fd=directory)
            os.close(directory)
            directory = below
        name = path.name or "."
        before = os.stat(name, dir_fd=directory, follow_symlinks=False)
        _check_kind(before, subject, refusal)
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    finally:
        os.close(directory)
    after = os.fstat(fd)
    if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino):
        os.close(fd)
        raise refusal("the file was replaced while it was being opened", subject=subject)
    return fd


def _check_kind(status: os.stat_result, subject: object, refusal: type[SnapchainError]) -> None:
    if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
        return
    kind = next((name for test, name in _KINDS if test(status.st_mode)), "something unknown")
    raise refusal(f"{kind}, not a regular file or block device", subject=subject)


def _translated(error: OSError, path: Path, subject: object, refusal: type[SnapchainError]) -> SnapchainError:
    named = "" if str(path) == str(subject) else f" ({path})"
    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return NotFound(f"no such file{named}", subject=subject)
    if error.errno in (errno.EACCES, errno.EPERM):
        return denied(subject, detail=named)
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG):
        return refusal(f"cannot be opened{named}: {error.strerror}", subject=subject)
    hint = REMEDIES.get(error.errno or 0)
    return Unavailable(f"cannot be opened{named}: {error.strerror}", subject=subject, hint=hint)
