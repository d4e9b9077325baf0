"""Files that are complete or absent.

A new file is created under a temporary name, owner-only, never over another file and never through a symbolic
link, in an open directory (directory.py defines with which rights).  It is published in the order that
survives a power loss: its bytes, then its name, then the directory.  After a failed fsync the file is not
trusted again (the kernel has dropped the pages).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from snapchain.errors import Busy, InvalidInput
from snapchain.host.directory import MOST_MODE, Directory, same_file
from snapchain.host.os_errors import os_errors
from snapchain.host.rights import group_name, group_number, user_name, user_number
from snapchain.host.temporary_names import NEW, temporary_beside, temporary_of

# Extended attributes that belong to a file's place, not to its bytes: labels, access lists, user attributes.
_ACCESS_LIST = "system.posix_acl_access"
_KEPT_ATTRIBUTES = ("security.selinux", _ACCESS_LIST, "user.")
_NO_ATTRIBUTES = {errno.ENOTSUP, errno.ENODATA, errno.EPERM, errno.EACCES}


@contextmanager
def directory_of(path: Path) -> Iterator[Directory]:
    """The directory of a file, pinned for the length of a `with` block; errors name the file."""
    with os_errors(path), Directory.open(path.parent) as directory:
        yield directory


def open_or_make(path: Path) -> int:
    """A descriptor, for reading and writing, of a lock file, which is created where it does not exist."""
    with directory_of(path) as directory:
        try:
            return directory.create(path.name)
        except FileExistsError:
            return directory.open_file(path.name, writing=True)


def make_directories(path: Path, *, mode: int, whatever_the_umask: bool = False) -> None:
    """Make a directory and its missing parents; an existing one keeps its mode."""
    with os_errors(path):
        if not path.parent.exists():
            make_directories(path.parent, mode=mode, whatever_the_umask=whatever_the_umask)
        with Directory.open(path.parent) as above:
            try:
                above.make_directory(path.name, mode=mode, whatever_the_umask=whatever_the_umask)
            except FileExistsError:
                Directory.open(path).close()  # raises where it is no directory


def move_aside(path: Path, name: str) -> None:
    """Rename a file within its directory, replacing any file of the new name."""
    with directory_of(path) as directory:
        directory.rename(path.name, name)


def open_file(path: Path, *, writing: bool = False) -> int:
    """A descriptor of a regular file or a block device; anything else, and a symbolic link, is refused."""
    with directory_of(path) as directory:
        return directory.open_file(path.name, writing=writing)


def temporaries(path: Path, *, purpose: str) -> list[Path]:
    """Files beside `path` under names of `temporary_beside`: of running or killed commands."""
    with directory_of(path) as directory:
        return [path.with_name(name) for name in temporary_names(directory, path.name, purpose=purpose)]


def temporary_names(directory: Directory, name: str, *, purpose: str) -> list[str]:
    """As `temporaries`, of a file `name` in a directory."""
    wanted = temporary_of(temporary_beside(directory.path / name, purpose=purpose))
    hidden = (each for each in directory.names() if each.startswith("."))
    return [each for each in hidden if temporary_of(directory.path / each) == wanted]


def remove_temporaries(path: Path, *, purpose: str) -> None:
    """Remove files that killed runs left under names of `temporary_beside`. Only while no other run works there."""
    with directory_of(path) as directory:
        names = temporary_names(directory, path.name, purpose=purpose)
        for name in names:
            with suppress(Busy):  # no run works here: another program keeps it locked
                remove_leftover(directory, name, final=path.name)
        if names:
            directory.sync()


def fsync_file(path: Path) -> None:
    """Flush a file's bytes and size to the disk, also those written by other processes."""
    fd = open_file(path)
    try:
        with os_errors(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def fsync_dir(path: Path) -> None:
    """Flush a directory's names to the disk."""
    with os_errors(path), Directory.open(path) as directory:
        directory.sync()


def rename(source: Path, target: Path) -> None:
    """Rename within one directory, durably. The source's bytes must be on the disk already."""
    with directory_of(target) as directory:
        directory.rename(source.name, target.name)
        directory.sync()


def remove(path: Path) -> None:
    """Remove a name, durably. Idempotent."""
    with directory_of(path) as directory:
        directory.remove(path.name)
        directory.sync()


def write_atomically(path: Path, data: bytes, *, mode: int = 0o600, whatever_the_umask: bool = False) -> None:
    """Replace a small file's bytes: a reader, or a crash, sees either the old or the new bytes."""
    with directory_of(path) as directory:
        write_in(directory, path.name, data, mode=mode, whatever_the_umask=whatever_the_umask)


def write_in(
    directory: Directory,
    name: str,
    data: bytes,
    *,
    mode: int = 0o600,
    whatever_the_umask: bool = False,
    prepare: Callable[[int], None] = lambda _fd: None,
) -> None:
    """As `write_atomically`, in a directory that is open already. Raises OSError.

    prepare: called with the new file's descriptor before the file gets its name
    """
    temporary = temporary_beside(directory.path / name, purpose=NEW).name
    fd = directory.create(temporary, mode=mode)
    try:
        with os.fdopen(fd, "wb") as file:
            if whatever_the_umask:
                with directory.changing(fd):
                    os.fchmod(fd, mode & MOST_MODE)
            file.write(data)
            file.flush()
            prepare(fd)
            os.fsync(fd)
        directory.rename(temporary, name)
        directory.sync()
    except BaseException:
        with suppress(OSError):
            directory.remove(temporary)
        raise


def read_small(path: Path, *, cap: int = 1 << 20) -> bytes:
    """The bytes of a small file, never of a symbolic link. Raises InvalidInput for more than `cap` bytes."""
    with directory_of(path) as directory:
        return read_in(directory, path.name, cap=cap)


def read_in(
    directory: Directory, name: str, *, cap: int = 1 << 20, check: Callable[[int], None] | None = None
) -> bytes:
    """As `read_small`, in a directory that is open already. Also raises OSError. check: as of Directory.open_file."""
    with os.fdopen(directory.open_file(name, check=check), "rb") as file:
        data = file.read(cap + 1)
    if len(data) > cap:
        raise InvalidInput(f"larger than the {cap} bytes that it may have", subject=directory.path / name)
    return data


def set_mode(path: Path, mode: int) -> None:
    """Set the read and write bits of a file's mode; all other bits stay."""
    with directory_of(path) as directory:
        fd = directory.open_file(path.name)
        try:
            now = os.fstat(fd)
            with directory.changing(fd):
                os.fchmod(fd, mode & MOST_MODE | now.st_mode & 0o7777 & ~MOST_MODE)
            os.fsync(fd)
        finally:
            os.close(fd)


def copy_standing(source: int, target: int, *, subject: object, directory: Directory | None = None) -> str | None:
    """Give `target` the owner, the mode and the labels of `source`, which it will replace. Both are descriptors.

    A guest's process runs as its own user, under its own SELinux label; a file that it may not open is as
    good as lost.  The owner is set first: chown clears the mode's set-id bits.  The access list comes last, since
    chmod changes it; a default list from the directory is removed where the old file has none.  No execute bit is
    set.
    subject: the file that errors name
    directory: the directory of both; None where root's rights need no limit
    Returns a sentence about what could not be set, where no user loses access. Raises InvalidInput where one would.
    """
    with os_errors(subject):
        standing, mine = os.fstat(source), os.fstat(target)
        with nullcontext() if directory is None else directory.changing(target):
            return _give_standing(source, standing, target, mine, subject)


def _give_standing(
    source: int, standing: os.stat_result, target: int, mine: os.stat_result, subject: object
) -> str | None:
    lost = None
    if (mine.st_uid, mine.st_gid) != (standing.st_uid, standing.st_gid):
        try:
            os.fchown(target, standing.st_uid, standing.st_gid)
        except PermissionError as error:
            lost = _not_given(subject, standing, mine, error)
    kept = [name for name in os.listxattr(source) if name.startswith(_KEPT_ATTRIBUTES)]
    if _ACCESS_LIST not in kept and _ACCESS_LIST in os.listxattr(target):
        os.removexattr(target, _ACCESS_LIST)
    os.fchmod(target, standing.st_mode & MOST_MODE)
    for name in kept:
        _copy_attribute(source, target, name)
    return lost


@dataclass(frozen=True, slots=True)
class Standing:
    """Owner and mode that a new file is to get. owner: as it was asked for; -1 and None leave what it has."""

    owner: str = ""
    uid: int = -1
    gid: int = -1
    mode: int | None = None


UNCHANGED = Standing()


def standing_of(owner: str | None, mode: str | None) -> Standing:
    """What USER[:GROUP] and an octal mode say. Raises InvalidInput for an unknown account, and for execute bits."""
    uid = gid = -1
    if owner is not None:
        user, separator, group = owner.partition(":")
        uid = user_number(user)
        gid = group_number(group) if separator else -1
    if mode is None:
        return Standing(owner or "", uid, gid)
    bits = int(mode, 8) if re.fullmatch("[0-7]{1,4}", mode) else None
    if bits is None or bits & ~MOST_MODE:
        raise InvalidInput(
            f"--mode {mode!a} is no mode of an image", hint="three octal digits of read and write bits, such as 0640"
        )
    return Standing(owner or "", uid, gid, bits)


def give_standing(target: int, standing: Standing, *, subject: object, directory: Directory) -> None:
    """Give a new file, by its descriptor, the owner and the mode. The owner is set first: chown clears set-id bits."""
    if standing == UNCHANGED:
        return
    with os_errors(subject), directory.changing(target):
        if (standing.uid, standing.gid) != (-1, -1):
            os.fchown(target, standing.uid, standing.gid)
        if standing.mode is not None:
            os.fchmod(target, standing.mode & MOST_MODE)


def check_standing(standing: os.stat_result, mine: os.stat_result, *, subject: object) -> None:
    """Raises as `copy_standing` would for the owner and the group, and changes nothing."""
    is_same = (standing.st_uid, standing.st_gid) == (mine.st_uid, mine.st_gid)
    is_own = standing.st_uid == mine.st_uid == os.geteuid()
    if not is_same and os.geteuid() and not (is_own and standing.st_gid in (os.getegid(), *os.getgroups())):
        _not_given(subject, standing, mine, None)


def _not_given(
    subject: object, standing: os.stat_result, mine: os.stat_result, error: PermissionError | None
) -> str | None:
    """The effect when owner or group cannot be set. The group matters where the mode gives it extra rights."""
    group = group_name(standing.st_gid)
    if standing.st_uid != mine.st_uid:
        raise InvalidInput(
            f"the new file cannot get the owner of the old one, {user_name(standing.st_uid)}",
            subject=subject,
            hint="run as root, or as that user",
        ) from error
    if (standing.st_mode >> 3) & 0o7 != standing.st_mode & 0o7:
        raise InvalidInput(
            f"the new file cannot get the group of the old one, {group}, which the guest may need",
            subject=subject,
            hint=f"run as root, or as a member of the group {group}",
        ) from error
    return f"its group is now {group_name(mine.st_gid)}, not {group}; its mode gives the group no extra rights"


def _copy_attribute(source: int, target: int, name: str) -> None:
    try:
        value = os.getxattr(source, name)
        os.setxattr(target, name, value)
    except OSError as error:
        if error.errno not in _NO_ATTRIBUTES:
            raise


def identity_of(path: Path | None) -> tuple[int, int] | None:
    """(device, inode) of the file that a path leads to; None where there is none, or it cannot be seen."""
    if path is None:
        return None
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write to the directory's filesystem."""
    with os_errors(directory), Directory.open(directory) as opened:
        room = os.fstatvfs(opened.fd)
    return room.f_bavail * room.f_frsize


# --- Temporary files that killed runs left behind, told apart from other users' files.


def is_leftover(status: os.stat_result, *, finished: os.stat_result | None = None) -> bool:
    """Whether a file under a temporary name can be from a run of this user; for root, of any user.

    Never a link, a directory, a FIFO, a device, or a second name of another file: no run makes these.
    finished: the status of the final name; a run killed between adding that name and removing the temporary one
    leaves two names of one file
    """
    if not stat.S_ISREG(status.st_mode) or os.geteuid() not in (0, status.st_uid):
        return False
    is_published = finished is not None and same_file(finished, status)
    return status.st_nlink == 1 or (status.st_nlink == 2 and is_published)


def remove_leftover(directory: Directory, name: str, *, final: str | None = None) -> bool:
    """Remove a file of a killed run. Returns whether it was one. final: its intended name.

    Raises Busy while a run has it locked (flock), and OSError.
    """
    try:
        if not is_leftover(directory.status(name), finished=_status(directory, final)):
            return False
        fd = directory.open_file(name)
    except FileNotFoundError:
        return False
    try:
        # Of the opened file: the name may have been swapped.
        status = os.fstat(fd)
        if not is_leftover(status, finished=_status(directory, final)):
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy("a run is at work on it", subject=directory.path / name, hint="wait for its end") from error
        except OSError:  # no locks on this filesystem: treat it as in use
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


# --- Files without a name: what does not fit into memory, for the length of one command.


def temporary_directory() -> Path:
    """Where files without a name are: TMPDIR, by default /tmp."""
    return Path(tempfile.gettempdir())


def anonymous_file() -> IO[bytes]:
    """A new file that nobody else can open; it is gone when it is closed. Raises what the directory raises."""
    place = temporary_directory()
    with os_errors(place):
        return tempfile.TemporaryFile(dir=place)
