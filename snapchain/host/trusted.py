"""Small files that decide which programs run: believed only where nobody but this user and root can write them.

Whoever can write to a configuration runs programs as the user who reads it, and chooses what that user overwrites.
So its own mode counts, and each directory by which it could be replaced, as sshd judges its configuration.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from snapchain.errors import InvalidInput
from snapchain.host.directory import Directory, resolve, writer_of
from snapchain.host.os_errors import os_errors
from snapchain.host.rights import EVERYBODY, Rights

_REMEDY = "let only yourself or root own it, and write to it and its directory; whoever can write to it runs programs"


def read_trusted(path: Path, *, cap: int = 1 << 20) -> bytes:
    """The bytes of such a file; links are followed.

    Raises InvalidInput where somebody else can write or replace it, or it is larger, and what reading a file raises.
    """
    with os_errors(path):
        found = resolve(path, strict=True)
        with Directory.open(found.real.parent) as directory:
            fd = directory.open_file(found.real.name, subject=path)
            with os.fdopen(fd, "rb") as file:
                writer = found.chosen_by or _who_else(directory, fd)
                if writer is not None:
                    raise InvalidInput(f"{writer} can write or replace this file", subject=path, hint=_REMEDY)
                data = file.read(cap + 1)
    if len(data) > cap:
        raise InvalidInput(f"larger than the {cap} bytes that it may have", subject=path)
    return data


def _who_else(directory: Directory, fd: int) -> Rights | None:
    """Whoever besides this user and root can write to an open file of a directory, or put another in its place."""
    status, place = os.fstat(fd), os.fstat(directory.fd)
    if os.geteuid() == 0:
        return writer_of(status, fd) or directory.rights_of_file(status)
    for each in (status, place):
        if each.st_uid not in (0, os.geteuid()):
            return Rights.of_user(each.st_uid)
    is_protected = place.st_mode & stat.S_ISVTX
    if status.st_mode & stat.S_IWOTH or (place.st_mode & stat.S_IWOTH and not is_protected):
        return EVERYBODY
    return None
