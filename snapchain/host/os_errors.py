"""Translate operating system errors into errors of snapchain's tree, in one place.

`with os_errors(path): ...` maps an OSError by its number to the caller's options: a missing name, an impossible
request, a resource that is short.  Everything else becomes `Unavailable`, with the kernel's words.  Each shortage has
one remedy, whether this process, a store's directory or a child process meets it (`shortage_in` finds it in the
child's messages).

The subject is always a file that the user knows: for a temporary file, or for the note beside an image, the file that
the name refers to.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, SnapchainError, Unavailable
from snapchain.host.rights import DeniedToOther, Rights
from snapchain.host.temporary_names import temporary_of

_NOT_THERE = {errno.ENOENT, errno.ENXIO, errno.ENODEV}
_WRONG = {
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.ENOTEMPTY,
    errno.EXDEV,
}
_FORBIDDEN = {errno.EACCES, errno.EPERM}
REMEDIES: dict[int, str] = {
    errno.ENOSPC: "free some space on that file system (`df` tells the free space), then run the command again",
    errno.EDQUOT: "raise the quota or free some space, then run the command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or use a file system that holds larger files",
    errno.EROFS: "the file system is mounted read-only: look at the kernel log, then remount it",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit on open files (fs.file-max)",
}
"""What an operator does about a shortage or a limit."""
_OF_A_FILESYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


# Of a layer (source/notes.py): `.snapchain-layer-NAME-<inode>.json`.
_NOTE = re.compile(r"\.snapchain-layer-(.+)-\d+\.json", re.DOTALL)


def denied(subject: object, *, detail: str = "") -> InvalidInput:
    """The error for a file that this user may not use."""
    return InvalidInput(f"permission denied{detail}", subject=subject, hint="run as a user who may read and write it")


def denied_to(rights: Rights, subject: object) -> InvalidInput:
    """The error for a file that root does not use, because the user who may swap it has no access to it."""
    return InvalidInput(
        f"permission denied to {rights}, with whose rights root uses what they may replace",
        subject=subject,
        hint="give them access to it, or keep it in a directory that only root may write to",
    )


def translated(error: OSError, subject: object = None) -> SnapchainError:
    """The error of snapchain's tree for an OSError."""
    given = subject if subject is not None else error.filename
    name, is_temporary, note = _known_file(given)
    words = (error.strerror or str(error) or type(error).__name__).lower()
    if error.errno in _NOT_THERE:
        return NotFound(words, subject=name)
    if isinstance(error, DeniedToOther):
        return denied_to(error.rights, name)
    if error.errno in _FORBIDDEN:
        if is_temporary and note is None:
            hint = f"run as a user who may write to {Path(str(name)).parent}"
            return InvalidInput("permission denied: no file can be made beside it", subject=name, hint=hint)
        return denied(name, detail="" if note is None else f" for its note {note}")
    if error.errno in _WRONG:
        return InvalidInput(words, subject=name)
    if error.errno in REMEDIES:
        return Unavailable(words, subject=name, hint=REMEDIES[error.errno])
    if error.errno in (errno.EBUSY, errno.ETXTBSY):
        return Busy(words, subject=name)
    if error.errno == errno.EEXIST:
        return Conflict("it exists already", subject=name)
    return Unavailable(words, subject=name)


def shortage_in(words: str) -> OSError | None:
    """The shortage of a filesystem that a program's messages (in the C locale) report, else None."""
    for number in _OF_A_FILESYSTEM:
        if os.strerror(number) in words:
            return OSError(number, os.strerror(number))
    return None


def _known_file(path: object) -> tuple[object, bool, str | None]:
    """(the file that the user knows, whether the given path is a temporary file, the name of a note beside the file).

    A note is also replaced through a temporary file.
    """
    if not isinstance(path, str | Path):
        return path, False, None
    temporary = temporary_of(Path(path))
    known = path if temporary is None else temporary.target
    note = _NOTE.fullmatch(Path(known).name)
    if note is None:
        return known, temporary is not None, None
    return Path(known).with_name(note[1]), temporary is not None, note[0]


@contextmanager
def os_errors(subject: object = None) -> Iterator[None]:
    """A block that raises an OSError as `translated` returns it. subject: the file that the message names."""
    try:
        yield
    except OSError as error:
        raise translated(error, subject) from error
