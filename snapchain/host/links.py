"""Follow the symbolic links of a name one by one, and find out whether other users control one of them.

In a directory that other users may write to, a link is their choice of a file, not the caller's.  The kernel refuses
to follow it where `fs.protected_symlinks` is set and the directory is sticky; a file that is to be replaced or
overwritten needs more care than that.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import InvalidInput, Unsupported
from snapchain.host.os_errors import os_errors

_MOST = 40
"""Links that Linux follows in one name."""
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class Followed:
    """The file behind a name.

    path: without links, also where it is not there yet; the name as it was given where its last part is no link
    by_link: whether the last part of the name is a link; exposed: whether others may choose what the name leads to
    """

    path: Path
    by_link: bool
    exposed: bool


def follow(path: Path) -> Followed:
    """Follow all links of a name. Raises InvalidInput for a loop, Unsupported for a link that another user planted."""
    with os_errors(path):
        return _follow(path)


def others_may_write(directory: os.stat_result) -> bool:
    """Whether other users than this one and root can put files into a directory."""
    return bool(directory.st_mode & _OTHERS) or directory.st_uid not in (0, os.geteuid())


def _follow(path: Path) -> Followed:
    rest = list(reversed(path.absolute().parts[1:]))
    here = Path("/")
    links, exposed = 0, False
    while rest:
        name = rest.pop()
        if name == "..":
            here = here.parent
            continue
        try:
            found = (here / name).lstat()
        except FileNotFoundError:
            here = here.joinpath(name, *reversed(rest))
            break
        if not stat.S_ISLNK(found.st_mode):
            here /= name
            continue
        links += 1
        if links > _MOST:
            raise InvalidInput("its symbolic links form a loop", subject=path, hint="name the file itself")
        directory = here.stat()
        _check_owner(here / name, found, directory)
        exposed = exposed or others_may_write(directory)
        target = Path((here / name).readlink())
        here = Path("/") if target.is_absolute() else here
        rest.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
    by_link = path.is_symlink()
    return Followed(here if by_link else path, by_link, exposed)


def _check_owner(link: Path, found: os.stat_result, directory: os.stat_result) -> None:
    """As the kernel's fs.protected_symlinks judges links, but in directories that are not sticky as well."""
    if directory.st_mode & stat.S_IWOTH and found.st_uid not in (0, os.geteuid(), directory.st_uid):
        raise Unsupported(
            "another user made this symbolic link, in a directory that everybody may write to",
            subject=link,
            hint="name the file behind it, or choose a directory of your own",
        )
