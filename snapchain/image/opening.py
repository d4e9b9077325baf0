"""Opening an image file that may be hostile: read-only, no symbolic link followed, nothing but a file or block device.

Every directory of the path is opened with O_NOFOLLOW from the root on, and the file's type is checked before it is
opened for reading: a FIFO does not block, a character device is never touched, a swapped name is detected.  For root,
host/path_resolution.py decides the rights. A user who named the file, by a link or as the backing file of their image,
must be able to read it; otherwise root would show them other users' disks.
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
from snapchain.host.writers import writers_of


@dataclass(frozen=True, slots=True)
class NamedBy:
    """The user who named a file to be read. where: the name of the link or image that names it.

    beside: whether a file in the same directory is allowed that they could read if they could reach it
    is_owner: whether the link or image belongs to them; otherwise it is root's, and they may write to it
    """

    rights: Rights
    where: Path
    beside: bool = False
    is_owner: bool = True


def writers_to(fd: int, path: Path) -> tuple[NamedBy, ...]:
    """The users besides root that could have written an opened image; () where this process is not root."""
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

    Raises NotFound; `refusal` unless it is a regular file or block device; InvalidInput where access is denied;
    Unsupported where it is denied to the user who named the file.
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
