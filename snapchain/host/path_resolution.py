"""The way from the root to a file, link by link, and with whose rights root goes it.

Root meets directories of other users, who may swap any name in them at any moment.  The rule:

    /  var  lib  nova  instances  disk        on the way from the root, the first directory that somebody else
    root........ nova >>>>>>>>>>>>>>>>        than root may write to decides: from there on, with the rights of nova

- An owner other than root is that somebody.  In a directory of root's it is the group, or everybody, with write access.
  A sticky directory protects the entries of each user: root's are trusted, others are used with their owner's rights.
- Symbolic links are followed here, one at a time, with the rights in force where they lie.
- Two different such users on one path are refused: each could use root against the other.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import Unsupported
from snapchain.host.os_errors import os_errors
from snapchain.host.rights import EVERYBODY, Rights, acting_as
from snapchain.host.writers import is_root, is_shared_by_sticky, two_users, writer_of

LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags for a descriptor that only says which file it is."""
_MOST_LINKS = 40
"""As many as Linux follows in one name."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """The target of a path.

    real: without links, as far as it exists
    chosen_by: the user whose link leads here from outside their own directories; None where root chose it, where this
    process is not root, and for a place below the same user's directories
    """

    real: Path
    chosen_by: Rights | None

    def check_may_be_changed(self, path: Path) -> None:
        """Raises Unsupported where root is about to change a file that another user's link leads to."""
        if self.chosen_by is not None:
            raise Unsupported(
                f"a symbolic link of {self.chosen_by} leads to {self.real}, which root does not change for them",
                subject=path,
                hint="name the file itself, if that is the one you mean",
            )


@dataclass(slots=True)
class Walked:
    """The position of a walk. fd: an O_PATH descriptor; parts: its path without links; missing: the rest is missing."""

    fd: int
    parts: list[str]
    rights: Rights | None
    links: int
    missing: bool

    @property
    def real(self) -> Path:
        return Path("/" + "/".join(self.parts))


def resolve(path: Path, *, strict: bool = False) -> Resolved:
    """Follow all links of a path: for root as `Directory.open` does, for other users by `os.path.realpath`.

    strict: the path must exist. Raises OSError, and Unsupported as `Directory.open`.
    """
    if not is_root():
        return Resolved(Path(os.path.realpath(path, strict=strict)), None)
    walked = walk(path, follow=True)
    os.close(walked.fd)
    if walked.missing and strict:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if walked.rights is None or not walked.links:
        return Resolved(walked.real, None)
    direct = walk(walked.real.parent, follow=True)
    os.close(direct.fd)
    return Resolved(walked.real, None if direct.rights == walked.rights else walked.rights)


def real_path(path: Path) -> Path:
    """The target of a path, for comparing names. Raises SnapchainError where it cannot be found out.

    To change a file, or to create one beside it, use `place_to_change`.
    """
    with os_errors(path):
        return resolve(path).real


def real_name(path: str | Path) -> str:
    """As `real_path` with root's own rights, for comparing names only; the path itself where links change meanwhile."""
    try:
        return os.path.realpath(path)
    except OSError:
        return os.path.abspath(path)  # noqa: PTH100 - a hot path


def place_to_change(path: Path, *, strict: bool = False) -> Path:
    """The target of a path, for writing there or beside it: every verb that changes an image calls this.

    strict: the path must exist. Raises SnapchainError; Unsupported where another user's link leads root there.
    """
    with os_errors(path):
        found = resolve(path, strict=strict)
    found.check_may_be_changed(path)
    return found.real


def walk(path: Path, *, follow: bool) -> Walked:
    """Open every part of a path. The last may be any kind of file, or missing: then fd is its parent."""
    rest = list(reversed((Path.cwd() / path).parts[1:]))
    at = Walked(os.open("/", LOOK | os.O_DIRECTORY), [], None, links=0, missing=False)
    with ExitStack() as acting:
        try:
            at.rights = entered(at.fd, path, None, acting)
            while rest:
                name = rest.pop()
                try:
                    below = os.open(name, LOOK | (0 if follow else os.O_DIRECTORY), dir_fd=at.fd)
                except FileNotFoundError:
                    if not follow:
                        raise
                    for each in (name, *reversed(rest)):
                        _step(at.parts, each)
                    at.missing = True
                    break
                try:
                    status = os.fstat(below)
                    if stat.S_ISLNK(status.st_mode):
                        at.rights = _entered_link(at.fd, status, at.rights, acting)
                        rest.extend(reversed(_follow(at, os.readlink("", dir_fd=below), path)))
                        continue
                    if rest and not stat.S_ISDIR(status.st_mode):
                        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
                    at.fd, below = below, at.fd
                    _step(at.parts, name)
                finally:
                    os.close(below)
                if stat.S_ISDIR(status.st_mode):
                    at.rights = entered(at.fd, path, at.rights, acting)
        except BaseException:
            os.close(at.fd)
            raise
    return at


def _step(parts: list[str], name: str) -> None:
    """Append a name, or remove the last one for `..`."""
    if name != "..":
        parts.append(name)
    elif parts:
        parts.pop()


def _follow(at: Walked, target: str, path: Path) -> list[str]:
    """The parts of a link's target; an absolute one starts at the root again."""
    at.links += 1
    if at.links > _MOST_LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if target.startswith("/"):
        root = os.open("/", LOOK | os.O_DIRECTORY)
        os.close(at.fd)
        at.fd, at.parts = root, []
    return [each for each in target.split("/") if each not in ("", ".")]


def entered(fd: int, path: Path, rights: Rights | None, acting: ExitStack) -> Rights | None:
    """The rights in force from this directory on; this thread takes them on."""
    status = os.fstat(fd)
    if not is_root() or (status.st_uid == 0 and not status.st_mode & 0o022):
        return rights
    writer = writer_of(status, fd, path)
    if writer is None or writer == rights:
        return rights
    if rights is not None:
        raise two_users(path, [rights, writer])
    acting.enter_context(acting_as(writer))
    return writer


def _entered_link(fd: int, link: os.stat_result, rights: Rights | None, acting: ExitStack) -> Rights | None:
    """The rights in force behind a link. In a sticky directory of root's they are those of the link's owner."""
    if rights is not None or not is_root() or not is_shared_by_sticky(os.fstat(fd)):
        return rights
    if link.st_uid == 0 and link.st_nlink == 1:
        return None
    chooser = EVERYBODY if link.st_uid == 0 else Rights.of_user(link.st_uid)
    acting.enter_context(acting_as(chooser))
    return chooser
