"""Who may write to a file or directory besides root: its owner; in root's own the group, listed users, or everybody."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from snapchain.errors import Unsupported
from snapchain.host.rights import EVERYBODY, Rights

_ACCESS_LIST = "system.posix_acl_access"
_ENTRY = struct.Struct("<HHI")
_ACL_USER, _ACL_GROUP_OWNER, _ACL_GROUP, _ACL_MASK, _ACL_WRITE = 0x02, 0x04, 0x08, 0x10, 0x02


def is_root() -> bool:
    """Whether this process has root's rights at the moment."""
    return os.geteuid() == 0


def is_shared_by_sticky(status: os.stat_result) -> bool:
    """Whether it is a directory of root's where other users may make names, and change only their own."""
    return status.st_uid == 0 and bool(status.st_mode & stat.S_ISVTX) and bool(status.st_mode & 0o022)


def writer_of(status: os.stat_result, fd: int, path: Path | None = None) -> Rights | None:
    """The user or group besides root that may change any name of a directory. Raises Unsupported for several."""
    if not is_root() or (status.st_uid == 0 and status.st_mode & stat.S_ISVTX):
        return None
    writers = writers_of(status, fd)
    if len(writers) > 1:
        raise two_users(path, writers)
    return writers[0] if writers else None


def writers_of(status: os.stat_result, fd: int) -> list[Rights]:
    """The users that may write to a file or directory: its owner; for root's, the group, listed users, or everybody."""
    if status.st_uid != 0:
        return [Rights.of_user(status.st_uid)]
    if status.st_mode & stat.S_IWOTH:
        return [EVERYBODY]
    return list(dict.fromkeys(_group_writers(status, fd))) if status.st_mode & stat.S_IWGRP else []


def _group_writers(status: os.stat_result, fd: int) -> Iterator[Rights]:
    """Users and groups that the group bits let write; in an access list these bits are the mask. Group 0 is root's."""
    entries = _access_list(fd)
    if not entries:
        entries = [(_ACL_GROUP_OWNER, _ACL_WRITE, 0)]
    mask = next((allowed for tag, allowed, _ in entries if tag == _ACL_MASK), _ACL_WRITE)
    for tag, allowed, number in entries:
        if not allowed & mask & _ACL_WRITE:
            continue
        if tag == _ACL_USER and number != 0:
            yield Rights.of_user(number)
        elif tag == _ACL_GROUP and number != 0:
            yield Rights.of_group(number)
        elif tag == _ACL_GROUP_OWNER and status.st_gid != 0:
            yield Rights.of_group(status.st_gid)


def _access_list(fd: int) -> list[tuple[int, int, int]]:
    """(tag, rights, id) of each entry of an access list; empty where there is no list."""
    with suppress(OSError):
        value = os.getxattr(f"/proc/self/fd/{fd}", _ACCESS_LIST)
        return [_ENTRY.unpack_from(value, at) for at in range(4, len(value) - _ENTRY.size + 1, _ENTRY.size)]
    return []


def two_users(path: Path | None, writers: Sequence[Rights]) -> Unsupported:
    """The error for two users that may change what one path leads to."""
    names = " and ".join(map(str, writers[:2]))
    return Unsupported(
        f"{names} may both change what this path leads to, and could use root against each other",
        subject=path,
        hint="run snapchain as one of them, or let one user own every directory of the path below root's",
    )
