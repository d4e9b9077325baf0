"""Operating system errors become errors of snapchain's tree at one border.

`with os_errors(path): ...` maps an OSError by its number to what the caller should do: a name that is not
there, a request that cannot work, a resource that is short.  Anything else stays an `Unavailable`, with the
kernel's words.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, SnapchainError, Unavailable

_NOT_THERE = {errno.ENOENT, errno.ENXIO, errno.ENODEV}
_WRONG = {
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.ENOTEMPTY,
    errno.EXDEV,
    errno.EFBIG,
}
_FORBIDDEN = {errno.EACCES, errno.EPERM}
_FULL = {errno.ENOSPC, errno.EDQUOT}


def translated(error: OSError, subject: object = None) -> SnapchainError:
    """The error of snapchain's tree that says what an OSError says."""
    name = subject if subject is not None else error.filename
    words = (error.strerror or str(error) or type(error).__name__).lower()
    if error.errno in _NOT_THERE:
        return NotFound(words, subject=name)
    if error.errno in _FORBIDDEN:
        return InvalidInput(words, subject=name, hint="run as a user who may read and write it")
    if error.errno in _WRONG:
        return InvalidInput(words, subject=name)
    if error.errno in _FULL:
        return Unavailable(words, subject=name, hint="free some space on that filesystem, then run it again")
    if error.errno in (errno.EBUSY, errno.ETXTBSY):
        return Busy(words, subject=name)
    if error.errno == errno.EEXIST:
        return Conflict("it exists already", subject=name)
    return Unavailable(words, subject=name)


@contextmanager
def os_errors(subject: object = None) -> Iterator[None]:
    """Raise what `translated` makes of an OSError inside the block; `subject` names the file in the message."""
    try:
        yield
    except OSError as error:
        raise translated(error, subject) from error
