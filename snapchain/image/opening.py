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
from snapchain.host.directory import Directory, check_readable, writers_of
from snapchain.host.os_errors import REMEDIES, denied, denied_to
from snapchain.host.rights import DeniedToOther, Rights


@dataclass(frozen=True, slots=True)
class NamedBy:
    """Who has named a file that is to be read. where: the link or the image that does it, by its own name.

    beside: whether a file in the same directory may be named that they could read if they could come there
    is_owner: whether it is theirs; else it is root's, and they may write to it
    """

    rights: Rights
    where: Path
    beside: bool = False
    is_owner: bool = True


def writers_to(fd: int, path: Path) -> tuple[NamedBy, ...]:
    """Who could have written what an opened image says, besides root; () where this process is not root."""
    if os.geteuid() != 0:
        return ()
    status = os.fstat(fd)
    is_roots = status.st_uid == 0
    return tuple(NamedBy(each, path, beside=True, is_owner=not is_roots) for each in writers_of(status, fd))


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
            is_roots = os.fstat(fd).st_uid == 0
            for each in named_by:
                # In a directory of theirs, a file may be QEMU's while or since it ran on it. Root's was never theirs.
                if is_roots or each.rights != directory.rights:
                    _check_named(path, fd, subject, each)

        return directory.open_file(path.name, subject=subject, refusal=refusal, check=check)


def _check_named(path: Path, fd: int, subject: object, named_by: NamedBy) -> None:
    is_beside = named_by.beside and named_by.where.parent == path.parent
    try:
        check_readable(None if is_beside else path, fd, rights=named_by.rights)
    except DeniedToOther as error:
        who, where = named_by.rights, named_by.where
        whose = "to whom that belongs" if named_by.is_owner else "who may write to that"
        remedy = f"let root own {where}" if named_by.is_owner else f"let nobody but root write to {where}"
        raise Unsupported(
            f"{where} leads root to this file, which {who}, {whose}, cannot read",
            subject=subject,
            hint=f"let {who} read it, or {remedy} if you trust what it says",
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
