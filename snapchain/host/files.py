"""Files that are whole or not there.

A new file is made under a name of its own, owner-only, never over another and never through a symbolic
link.  It is published in the order that survives a power loss: its bytes, then its name, then the
directory.  After a failed fsync the file is not trusted again (the kernel has dropped the pages).
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
from contextlib import suppress
from pathlib import Path

from snapchain.errors import InvalidInput
from snapchain.host.os_errors import os_errors
from snapchain.host.temporary_names import NEW, temporary_beside, temporary_of

# Extended attributes that belong to a file's place, not to its bytes: labels, access lists, what a user noted.
_ACCESS_LIST = "system.posix_acl_access"
_KEPT_ATTRIBUTES = ("security.selinux", _ACCESS_LIST, "user.")
_NO_ATTRIBUTES = {errno.ENOTSUP, errno.ENODATA, errno.EPERM, errno.EACCES}


def open_new(path: Path, *, mode: int = 0o600) -> int:
    """Create a file that must not exist yet; a descriptor open for reading and writing.

    Raises Conflict when something has that name already, be it a dangling symbolic link.
    """
    with os_errors(path):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def temporaries(path: Path, *, purpose: str) -> list[Path]:
    """Files beside `path` under names of `temporary_beside`: of runs that are at work, or were killed."""
    wanted = temporary_of(temporary_beside(path, purpose=purpose))
    with os_errors(path.parent):
        return [entry for entry in path.parent.iterdir() if temporary_of(entry) == wanted]


def remove_temporaries(path: Path, *, purpose: str) -> None:
    """Remove what killed runs have left under names of `temporary_beside`. Only while no other run is at work there."""
    for entry in temporaries(path, purpose=purpose):
        remove(entry)


def fsync_file(path: Path) -> None:
    """Force a file's bytes and size to the disk, whoever wrote them."""
    with os_errors(path):
        _fsync(path, os.O_RDONLY | os.O_NOFOLLOW)


def fsync_dir(path: Path) -> None:
    """Force a directory's names to the disk."""
    with os_errors(path):
        _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file its name, replacing what has it: fsync the file, rename, fsync the directory."""
    fsync_file(temporary)
    rename(temporary, final)


def rename(source: Path, target: Path) -> None:
    """Rename within one directory, durably. The source's bytes must be on the disk already."""
    with os_errors(target):
        source.replace(target)
    fsync_dir(target.parent)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, durably. Raises Conflict when that name is taken."""
    with os_errors(target):
        os.link(source, target, follow_symlinks=False)
    fsync_dir(target.parent)


def remove(path: Path) -> None:
    """Remove a name, durably; fine when it is gone already."""
    with os_errors(path):
        path.unlink(missing_ok=True)
    fsync_dir(path.parent)


def write_atomically(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace a small file's bytes: a reader, or a crash, sees the old ones or the new ones."""
    temporary = temporary_beside(path, purpose=NEW)
    fd = open_new(temporary, mode=mode)
    try:
        with os_errors(path), os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_small(path: Path, *, cap: int = 1 << 20) -> bytes:
    """The bytes of a small file, no symbolic link. Raises InvalidInput when there are more than `cap`."""
    with os_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            data = file.read(cap + 1)
    if len(data) > cap:
        raise InvalidInput(f"larger than the {cap} bytes that it may have", subject=path)
    return data


def copy_standing(source: Path | int, target: Path | int, *, subject: object = None) -> str | None:
    """Give `target` the owner, the mode and the labels of `source`, whose place it will take. Paths, or descriptors.

    A guest's process runs as its own user, under its own SELinux label; a file that it may not open is as
    good as lost.  The owner is set first: chown clears the mode's set-id bits.  The access list comes last, since
    chmod changes it; one that the directory has given to the new file goes where the old file has none.
    subject: the file that errors name. Returns what could not be given, where nobody loses access by that. Raises
    InvalidInput where somebody would.
    """
    with os_errors(target if subject is None else subject):
        standing = os.stat(source)  # noqa: PTH116 - a descriptor, too
        mine = os.stat(target)  # noqa: PTH116
        lost = None
        if (mine.st_uid, mine.st_gid) != (standing.st_uid, standing.st_gid):
            try:
                os.chown(target, standing.st_uid, standing.st_gid)
            except PermissionError as error:
                lost = _not_given(source if subject is None else subject, standing, mine, error)
        kept = [name for name in os.listxattr(source) if name.startswith(_KEPT_ATTRIBUTES)]
        if _ACCESS_LIST not in kept and _ACCESS_LIST in os.listxattr(target):
            os.removexattr(target, _ACCESS_LIST)
        os.chmod(target, standing.st_mode & 0o7777)  # noqa: PTH101
        for name in kept:
            _copy_attribute(source, target, name)
    return lost


def check_standing(source: Path, target: Path) -> None:
    """Raises what `copy_standing` would raise for the owner and the group, and changes nothing."""
    with os_errors(target):
        standing, mine = source.stat(), target.stat()
    is_same = (standing.st_uid, standing.st_gid) == (mine.st_uid, mine.st_gid)
    is_own = standing.st_uid == mine.st_uid == os.geteuid()
    if not is_same and os.geteuid() and not (is_own and standing.st_gid in (os.getegid(), *os.getgroups())):
        _not_given(source, standing, mine, None)


def _not_given(
    subject: object, standing: os.stat_result, mine: os.stat_result, error: PermissionError | None
) -> str | None:
    """What it means that owner and group cannot be given. The group matters where the mode gives it other rights."""
    group = _group_name(standing.st_gid)
    if standing.st_uid != mine.st_uid:
        raise InvalidInput(
            f"the new file cannot get the owner of the old one, {_user_name(standing.st_uid)}",
            subject=subject,
            hint="run as root, or as that user",
        ) from error
    if (standing.st_mode >> 3) & 0o7 != standing.st_mode & 0o7:
        raise InvalidInput(
            f"the new file cannot get the group of the old one, {group}, which the guest may need",
            subject=subject,
            hint=f"run as root, or as a member of the group {group}",
        ) from error
    return f"its group is now {_group_name(mine.st_gid)}, not {group}; its mode gives the group no extra rights"


def _group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _copy_attribute(source: Path | int, target: Path | int, name: str) -> None:
    try:
        value = os.getxattr(source, name)
        os.setxattr(target, name, value)
    except OSError as error:
        if error.errno not in _NO_ATTRIBUTES:
            raise


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write to the directory's filesystem."""
    with os_errors(directory):
        room = os.statvfs(directory)
    return room.f_bavail * room.f_frsize
