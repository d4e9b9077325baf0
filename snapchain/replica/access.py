"""Read access to a replica besides its owner: nobody, or one group.

The mode of the replica's directory decides. Where it gives its group r-x and all others nothing, that group may read
the replica, such as the group as which QEMU runs.  Any other mode means nobody.

    what               for the owner alone     for a group, too
    directories        0700                    0750
    layers             0400                    0440
    records            0600                    0640
    a guest's overlay  0600                    0660
    .lock, .incoming   0600                    0600

The umask of the writer does not matter.
"""

from __future__ import annotations

import grp
import os
import stat
from contextlib import suppress
from dataclasses import dataclass

from snapchain.errors import InvalidInput, NotFound
from snapchain.host.directory import Directory

_RIGHTS = 0o7777 & ~(stat.S_ISGID | stat.S_ISVTX)
_READ, _OTHERS = 0o050, 0o007


@dataclass(frozen=True, slots=True)
class Access:
    """gid: of the group that may read, None for nobody."""

    gid: int | None = None

    @staticmethod
    def of(root: os.stat_result) -> Access:
        """As the mode of the replica's directory has it."""
        is_shared = root.st_mode & _READ == _READ and not root.st_mode & _OTHERS
        return Access(root.st_gid if is_shared else None)

    @property
    def directory(self) -> int:
        return 0o700 if self.gid is None else 0o750

    @property
    def layer(self) -> int:
        return 0o400 if self.gid is None else 0o440

    @property
    def record(self) -> int:
        return 0o600 if self.gid is None else 0o640

    @property
    def overlay(self) -> int:
        return 0o600 if self.gid is None else 0o660

    def give(self, fd: int, mode: int) -> None:
        """Set group and mode of an open file or directory. Its owner loses the group's access where he is no member.

        Raises OSError.
        """
        status = os.fstat(fd)
        if self.gid is not None and status.st_gid != self.gid and mode & 0o070:
            try:
                os.fchown(fd, -1, self.gid)
            except PermissionError:
                mode &= 0o700
        if stat.S_IMODE(status.st_mode) & _RIGHTS != mode:
            os.fchmod(fd, mode | stat.S_IMODE(status.st_mode) & stat.S_ISGID)


def group_number(group: str) -> int:
    """Of a group by name or number. Raises NotFound."""
    if group.isascii() and group.isdigit() and len(group) < 10:
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError) as error:
        raise NotFound("there is no such group", subject=ascii(group), hint="`getent group` lists them") from error


def share(root: Directory, gid: int) -> None:
    """Let a group read the replica in this directory from now on. Raises InvalidInput where that is not allowed."""
    fd = root.opened()
    try:
        os.fchown(fd, -1, gid)
        os.fchmod(fd, Access(gid).directory)
    except PermissionError as error:
        raise InvalidInput(
            "its group cannot be changed",
            subject=root.path,
            hint="run as root, or as its owner who is in that group",
        ) from error


def tighten_root(root: Directory, *, guests: bool) -> None:
    """Remove access that others should not have. guests: whether QEMU may need this directory as another user."""
    fd = root.opened()
    status = os.fstat(fd)
    wanted = Access.of(status).directory
    if guests:
        wanted |= status.st_mode & 0o011
    _tighten(fd, status, wanted)


def tighten(disk: Directory, access: Access, *, layers: tuple[str, ...], records: tuple[str, ...]) -> None:
    """The same for the directory of a disk, and files in it."""
    fd = disk.opened()
    with suppress(PermissionError):
        access.give(fd, access.directory)
    for names, mode in ((layers, access.layer), (records, access.record)):
        for name in names:
            with suppress(FileNotFoundError, PermissionError, InvalidInput):
                status = disk.status(name)
                is_given = access.gid in (None, status.st_gid) and stat.S_IMODE(status.st_mode) == mode
                if is_given or not stat.S_ISREG(status.st_mode):
                    continue
                file = disk.open_file(name)
                try:
                    with disk.changing(file):
                        access.give(file, mode)
                finally:
                    os.close(file)


def _tighten(fd: int, status: os.stat_result, wanted: int) -> None:
    # Missing rights are not added: the owner may have removed them.
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o777 & ~wanted:
        with suppress(PermissionError):  # another user's, or of a file system that has no modes
            os.fchmod(fd, mode & (wanted | 0o7000))
