"""Opening an image file that may be hostile: read-only, no symbolic link followed, nothing but a file or block device.

Every directory on the way is opened with O_NOFOLLOW from the root on, and the file's type is known before it is
opened for reading: a FIFO does not block us, a character device is never touched, a swapped name is noticed.  For root,
host/directory.py says with whose rights; and whoever has named the file, by a link or as the backing file of an image
of theirs, must be able to read it: else root would show them the disks of others.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.host.directory import Directory, check_readable
from snapchain.host.os_errors import REMEDIES, denied, denied_to
from snapchain.host.rights import DeniedToOther, Rights


@dataclass(frozen=True, slots=True)
class NamedBy:
    """Who has named a file that is to be read. where: the link or the image that does it, by its own name.

    beside: whether a file in the same directory may be named that they could read if they could come there
    """

    rights: Rights
    where: Path
    beside: bool = False


def owner_of(fd: int, path: Path) -> tuple[NamedBy, ...]:
    """Who could have written what an opened image says; () for root and where this process is not root."""
    owner = os.fstat(fd).st_uid
    return () if owner == 0 or os.geteuid() != 0 else (NamedBy(Rights.of_user(owner), path, beside=True),)


def open_image(
    path: Path,
    *,
    subject: object,
    refusal: type[SnapchainError] = InvalidInput,
    named_by: Sequence[NamedBy] = (),
) -> int:
    """A descriptor of `path`, an absolute path without symbolic links (as `Place.of` gives it).

    Raises NotFound, `refusal` for what is no regular file or block device, InvalidInput where access is denied,
    Unsupported where it is denied to whoever has named the file.
    """
    try:
        return _open(path, subject, refusal, named_by)
    except OSError as error:
        raise _translated(error, path, subject, refusal) from error


def _open(path: Path, subject: object, refusal: type[SnapchainError], named_by: Sequence[NamedBy]) -> int:
    if not path.name:
        raise refusal("a directory, not a regular file or block device", subject=subject)
    with Directory.open(path.parent, follow=False) as directory:

        def check(fd: int) -> None:
            for each in named_by:
                _check_named(path, fd, subject, each)

        return directory.open_file(path.name, subject=subject, refusal=refusal, check=check)


def _check_named(path: Path, fd: int, subject: object, named_by: NamedBy) -> None:
    is_beside = named_by.beside and named_by.where.parent == path.parent
    try:
        check_readable(None if is_beside else path, fd, rights=named_by.rights)
    except DeniedToOther as error:
        raise Unsupported(
            f"{named_by.where} leads root to this file, which {named_by.rights}, to whom that belongs, cannot read",
            subject=subject,
            hint=f"let {named_by.rights} read it, or let root own {named_by.where} if you trust what it says",
        ) from error


def _translated(error: OSError, path: Path, subject: object, refusal: type[SnapchainError]) -> SnapchainError:
    named = "" if str(path) == str(subject) else f" ({path})"
    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return NotFound(f"no such file{named}", subject=subject)
    if isinstance(error, DeniedToOther):
        return denied_to(error.rights, subject)
    if error.errno in (errno.EACCES, errno.EPERM):
        return denied(subject, detail=named)
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG):
        return refusal(f"cannot be opened{named}: {error.strerror}", subject=subject)
    hint = REMEDIES.get(error.errno or 0)
    return Unavailable(f"cannot be opened{named}: {error.strerror}", subject=subject, hint=hint)
