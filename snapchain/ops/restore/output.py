"""A new file that appears under its name only when it is whole.

It grows beside its place as `.NAME.snapchain-part-<random>`, made for it alone and locked (flock) as long as it grows.
So a second run, or the doctor, tells a file that is being written from one that a killed run has left. An extended
attribute of the file says what it was to hold and how far it had come: a run that is to write the same continues it,
any other removes it. What it continues is read back with the rest before it gets its name.
"""

from __future__ import annotations

import fcntl
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from snapchain.errors import Busy, Conflict, InvalidInput, SnapchainError, Unavailable
from snapchain.host import files
from snapchain.host.directory import Directory
from snapchain.host.locks import ImageLock
from snapchain.host.os_errors import os_errors
from snapchain.host.temporary_names import RESTORE, temporary_beside, temporary_of
from snapchain.image.pread import begin_writeback

WORTH = 32 << 20
"""Guest bytes: a run that was cut off before it had written so many is begun anew. So often progress is noted."""
_NOTE = "user.snapchain.restore"
_WHOLE = "whole"
_LONGEST_OFFSET = 19
_TRIES, _PAUSE = 40, 0.05
"""For the lock on a directory, which is held for a few calls only: then it is done without."""


@dataclass(slots=True)
class Effort:
    """What the files of one restore would cost to write again: guest bytes that this run or an earlier one wrote."""

    bytes: int = 0


class OutputFile:
    """A context manager; without `publish` the file is gone on leaving, unless it is worth to be continued.

    path: no symbolic link; name: by which it is known, which may be a link to it
    origin: equal only where every byte has the same place and the same source; None where nothing is continued
    effort: of all files that are continued or thrown away together
    standing: owner and mode that it gets, before those of a file that it replaces
    start: guest offset below which an earlier run has written everything; is_whole: whether it had finished the file
    """

    def __init__(
        self,
        path: Path,
        *,
        name: Path | None = None,
        origin: str | None = None,
        effort: Effort | None = None,
        standing: files.Standing = files.UNCHANGED,
    ) -> None:
        self.path = path
        self._standing = standing
        self._origin, self._effort = origin, effort or Effort()
        self._noted = self._since = self.start = 0
        self.is_whole = False
        self.name = path if name is None else name
        self._temporary = temporary_beside(path, purpose=RESTORE)
        self.fd = -1
        self._directory: Directory | None = None

    @property
    def growing(self) -> Path:
        """Its name until it is published."""
        return self._temporary

    def __enter__(self) -> Self:
        """Raises Busy when another run is writing the file."""
        with os_errors(self.path.parent):
            self._directory = directory = Directory.open(self.path.parent)
        try:
            with os_errors(self.path.parent):
                listed = directory.opened()
            # One run at a time looks and begins, so that of two that begin at once one sees the other.
            with _alone_in(listed) as alone:
                for part in parts_of(self.path) if alone else ():
                    if self.fd >= 0 or not self._continue(part):
                        remove_part(part)
                if self.fd < 0:
                    with os_errors(self.path):
                        self.fd = directory.create(self._temporary.name)
                    with suppress(OSError):  # a filesystem without locks: then the file counts as in use
                        fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.fd >= 0 and not self._is_worth_it(error):
            with os_errors(self.path):
                self._place.remove(self._temporary.name, only=os.fstat(self.fd))
        self._close()

    def note(self, offset: int, count: int) -> None:
        """All below guest offset `offset` is in the file, `count` bytes more than at the last call.

        Now and then the disk begins to write them, while the next ones are fetched.
        """
        self._effort.bytes += count
        self._since += count
        if self._since >= WORTH:
            self._since = 0
            begin_writeback(self.fd)
            self._note(str(max(offset, self.start)))

    def note_whole(self) -> None:
        """The file is finished and flushed."""
        self._note(_WHOLE)

    def _note(self, position: str) -> None:
        if self._origin is not None:
            with suppress(OSError):  # a filesystem without extended attributes: then nothing is continued
                os.setxattr(self.fd, _NOTE, f"{self._origin} {position}".encode())

    def _is_worth_it(self, error: BaseException | None) -> bool:
        """Whether the next run should continue the file: it was cut off, and is neither wrong nor out of room.

        A user who ends a command wants it gone: then twice as much must be there.
        """
        if error is None or self._origin is None:
            return False
        is_cut_off = isinstance(error, Unavailable) and error.subject != str(self.path)
        if isinstance(error, SnapchainError) and not is_cut_off:
            return False
        least = WORTH if is_cut_off else 2 * WORTH
        return self._effort.bytes >= least and _position(self.fd, self._origin) is not None

    def _continue(self, part: Path) -> bool:
        """Take up a file that an earlier run has left, if it was to hold the same. Raises Busy while it grows."""
        if self._origin is None:
            return False
        fd = _opened_part(self._place, part, writing=True)
        position = None if fd is None else _position(fd, self._origin)
        if fd is None:
            return False
        if position is None:
            os.close(fd)
            return False
        self.fd, self._temporary = fd, part
        self.is_whole = position == _WHOLE
        self.start = sys.maxsize if self.is_whole else int(position)
        self._effort.bytes += WORTH
        return True

    def check_can_stand_for(self, replaced: ImageLock) -> None:
        """Raises InvalidInput unless the owner and the group of a file that this one is to replace can be kept."""
        theirs = os.fstat(replaced.fd)
        if not self._can_have(theirs.st_uid, theirs.st_gid):
            raise InvalidInput(
                f"you cannot give the new file the owner {theirs.st_uid} and the group {theirs.st_gid} of the old one",
                subject=self.path,
                hint="run as root, or choose another name",
            )

    def check_can_be_given(self) -> None:
        """Raises InvalidInput unless the file can get the owner and the group that were asked for."""
        if not self._can_have(self._standing.uid, self._standing.gid):
            raise InvalidInput(
                f"you cannot give the new file to {self._standing.owner}",
                subject=self.path,
                hint="run as root, or leave out --owner",
            )

    def _can_have(self, uid: int, gid: int) -> bool:
        """Whether the file can get an owner and a group; -1: its own."""
        mine = os.fstat(self.fd)
        if uid in (-1, mine.st_uid) and gid in (-1, mine.st_gid):
            return True
        try:
            with self._place.changing(self.fd):
                os.fchown(self.fd, uid, gid)
                os.fchown(self.fd, mine.st_uid, mine.st_gid)
        except PermissionError:
            return False
        return True

    def publish(self, *, replaced: ImageLock | None) -> None:
        """Give the finished, synced file its name.

        replaced: a lock on the file that has the name now; the new one gets its owner, mode and labels
        Raises Conflict when another file has the name.
        """
        with os_errors(self.path):
            with suppress(OSError):
                os.removexattr(self.fd, _NOTE)
            if replaced is not None:
                files.copy_standing(replaced.fd, self.fd, subject=self.path, directory=self._place)
            files.give_standing(self.fd, self._standing, subject=self.path, directory=self._place)
            if replaced is not None or self._standing != files.UNCHANGED:
                os.fsync(self.fd)
            status = None if replaced is None else os.fstat(replaced.fd)
            try:
                self._place.give_name(self.fd, self._temporary.name, self.path.name, replacing=status)
            except FileExistsError as error:
                raise exists(self.path) from error
        self._close()

    @property
    def _place(self) -> Directory:
        assert self._directory is not None
        return self._directory

    def _close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        if self._directory is not None:
            self._directory.close()
        self.fd, self._directory = -1, None


def exists(path: Path) -> Conflict:
    """The error for an output that is there already."""
    return Conflict("it exists already", subject=path, hint="choose another name, or say --force to replace it")


def parts_of(path: Path) -> list[Path]:
    """Files that runs are writing, or have left, which were to become `path`."""
    return files.temporaries(path, purpose=RESTORE)


def meant_for(part: Path) -> Path | None:
    """What an unfinished file was to become, by its name; None for a name that is no unfinished file's."""
    found = temporary_of(part)
    return found.target if found is not None and found.purpose == RESTORE else None


def is_part(part: Path, status: os.stat_result) -> bool:
    """Whether an unfinished file was made by a run of this user, by its type and owner.

    A second name of another file is none, but for the name that it was about to lose when it had got its final one.
    """
    target = meant_for(part)
    if target is None or not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        return False
    return status.st_nlink == 1 or (status.st_nlink == 2 and _is(target, status))


def remove_part(part: Path) -> bool:
    """Remove an unfinished file of a killed run. Returns whether it was one. Raises Busy while a run writes it."""
    with files.directory_of(part) as directory:
        fd = _opened_part(directory, part)
        if fd is None:
            return False
        try:
            # Not where it got its final name before it was locked here.
            return directory.remove(part.name, only=os.fstat(fd))
        finally:
            os.close(fd)


def written_before(path: Path, origin: str) -> int:
    """Guest offset below which an earlier run has written all that a file of this origin is to hold."""
    for part in parts_of(path):
        try:
            with files.directory_of(part) as directory:
                fd = directory.open_file(part.name)
        except (OSError, InvalidInput):
            continue
        try:
            position = _position(fd, origin) if is_part(part, os.fstat(fd)) else None
        finally:
            os.close(fd)
        if position is not None:
            return sys.maxsize if position == _WHOLE else int(position)
    return 0


def _opened_part(directory: Directory, part: Path, *, writing: bool = False) -> int | None:
    """A locked descriptor of an unfinished file of a killed run; None for what is none. Raises Busy."""
    try:
        fd = directory.open_file(part.name, writing=writing)
    except (OSError, InvalidInput):  # gone, a link, a socket, another user's: no run of ours is to be waited for
        return None
    try:
        if not is_part(part, os.fstat(fd)):
            os.close(fd)
            return None
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise Busy("another snapchain is writing it", subject=meant_for(part), hint="wait for it") from error
    except OSError:  # no locks here: it counts as in use
        os.close(fd)
        return None
    return fd


def _position(fd: int, origin: str) -> str | None:
    """How far a file of this origin has come; None for another file."""
    try:
        said, _, position = os.getxattr(fd, _NOTE).decode("ascii", "replace").partition(" ")
    except OSError:
        return None
    is_sound = position == _WHOLE or (position.isdecimal() and len(position) < _LONGEST_OFFSET)
    return position if said == origin and is_sound else None


def _is(path: Path, status: os.stat_result) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino)


@contextmanager
def _alone_in(directory: int) -> Iterator[bool]:
    """Whether no other run looks for unfinished files in a directory, or begins one, during the block."""
    alone = False
    for _ in range(_TRIES):
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            time.sleep(_PAUSE)
            continue
        except OSError:  # no locks here
            pass
        break
    try:
        yield alone
    finally:
        if alone:
            fcntl.flock(directory, fcntl.LOCK_UN)
