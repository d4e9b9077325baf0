"""A tree of new files, written below one new name of one directory: nothing outside of it is ever touched.

Names come from elsewhere and are hostile.  Each is one component (`Directory` refuses others), is made by exclusive
creation, and directories are entered by descriptor without following links.  So a symbolic link of the tree leads
nowhere while the tree is written, and no name can be taken twice.

Files are for their owner only.  Set-id bits are never set: anybody on this host could run such a file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from snapchain.host.directory import Directory

SKIPPED = frozenset({errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EEXIST, errno.EPERM, errno.ENOTSUP})
"""Errors of one name, which a file system cannot have, or has already; others are of the whole tree."""
_NOT_KEPT = SKIPPED | {errno.EACCES, errno.ENOSPC, errno.E2BIG, errno.ERANGE}
_PERMISSIONS = 0o777


@dataclass(frozen=True, slots=True)
class Marks:
    """What a file keeps besides its bytes; None and nothing stay as they are made. times: (atime, mtime), ns"""

    mode: int | None = None
    owner: tuple[int, int] | None = None
    times: tuple[int, int] | None = None
    attributes: Mapping[str, bytes] = field(default_factory=dict)


class NewTree:
    """A context manager. Paths are tuples of names below `top`; () is the top itself. Methods raise OSError.

    not_kept: which kinds of marks could not be set: owner, mode, times, attributes
    """

    def __init__(self, top: Path) -> None:
        self.not_kept: set[str] = set()
        self._above = Directory.open(top.parent)
        self._name = top.name
        # The directories from the top to the one that was used last, with what they get when they are left.
        self._open: list[tuple[str, Directory, Marks]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._leave(0)
        self._above.close()

    def make_directory(self, path: Sequence[str], marks: Marks) -> None:
        """Its marks are set when what it holds has been written."""
        parent, name = self._parent(path)
        parent.make_directory(name)
        self._open.append((name, parent.open_directory(name), marks))

    def create(self, path: Sequence[str]) -> NewFile:
        """A new file."""
        parent, name = self._parent(path)
        return NewFile(self, parent, name, parent.create(name))

    def make_symlink(self, path: Sequence[str], target: str, marks: Marks) -> None:
        """A symbolic link, which may lead anywhere."""
        parent, name = self._parent(path)
        parent.make_symlink(name, target)
        self._mark(marks, parent, name)

    def make_link(self, path: Sequence[str], first: Sequence[str]) -> None:
        """A second name of a file that was written here."""
        parent, name = self._parent(path)
        if not first:
            raise FileNotFoundError(errno.ENOENT, "no such file")
        above: Directory = self._above
        opened: list[Directory] = []
        try:
            for each in (self._name, *first[:-1]):
                above = above.open_directory(each)
                opened.append(above)
            above.link_into(first[-1], parent, name)
        finally:
            for directory in opened:
                directory.close()

    def finish(self) -> None:
        """All is written: set the marks of the directories that are still open."""
        self._leave(0)

    def _parent(self, path: Sequence[str]) -> tuple[Directory, str]:
        """The directory of a path, and its last name. Directories that are not above it are left."""
        names = (self._name, *path)
        common = 0
        while common < min(len(self._open), len(names) - 1) and self._open[common][0] == names[common]:
            common += 1
        self._leave(common)
        for name in names[common:-1]:
            above = self._open[-1][1] if self._open else self._above
            self._open.append((name, above.open_directory(name), Marks()))
        return (self._open[-1][1] if self._open else self._above), names[-1]

    def _leave(self, keep: int) -> None:
        while len(self._open) > keep:
            name, directory, marks = self._open.pop()
            try:
                parent = self._open[-1][1] if self._open else self._above
                if marks.attributes:
                    self._set("attributes", lambda: _set_attributes(directory.opened(), marks.attributes))  # noqa: B023
                self._mark(marks, parent, name)
                if (mode := marks.mode) is not None:
                    self._set("mode", lambda: directory.set_own_mode(mode & _PERMISSIONS))  # noqa: B023
                if (times := marks.times) is not None:
                    self._set("times", lambda: parent.set_times(name, times))  # noqa: B023
            finally:
                directory.close()

    def _mark(self, marks: Marks, parent: Directory, name: str) -> None:
        """Set the owner and times of an entry itself, also of a link."""
        if (owner := marks.owner) is not None:
            self._set("owner", lambda: parent.set_owner(name, owner))
        if (times := marks.times) is not None:
            self._set("times", lambda: parent.set_times(name, times))

    def _set(self, what: str, work: object) -> None:
        assert callable(work)
        try:
            work()
        except OSError as error:
            if error.errno not in _NOT_KEPT:
                raise
            self.not_kept.add(what)


class NewFile:
    """A file that is being written from its start on; it is removed unless `finish` is called."""

    def __init__(self, tree: NewTree, parent: Directory, name: str, fd: int) -> None:
        self._tree, self._parent, self._name, self._fd = tree, parent, name, fd
        self._size = 0

    def write(self, pieces: Iterable[bytes | int]) -> None:
        """Bytes, and holes as numbers of bytes. Raises also what `pieces` raises."""
        for piece in pieces:
            if isinstance(piece, int):
                self._size += piece
                os.lseek(self._fd, self._size, os.SEEK_SET)
                continue
            left = memoryview(piece)
            while left:
                left = left[os.write(self._fd, left) :]
            self._size += len(piece)

    def finish(self, marks: Marks) -> None:
        """All its bytes are written."""
        fd = self._fd
        os.ftruncate(fd, self._size)
        with self._parent.changing(fd):
            if (owner := marks.owner) is not None:
                self._tree._set("owner", lambda: os.fchown(fd, *owner))  # noqa: SLF001 - the two are one thing
            if marks.attributes:
                self._tree._set("attributes", lambda: _set_attributes(fd, marks.attributes))  # noqa: SLF001
            if (mode := marks.mode) is not None:
                self._tree._set("mode", lambda: os.fchmod(fd, mode & _PERMISSIONS))  # noqa: SLF001
            if (times := marks.times) is not None:
                self._tree._set("times", lambda: os.utime(fd, ns=times))  # noqa: SLF001
        self._close()

    def remove(self) -> None:
        """It is not to be, as far as it was not finished."""
        if self._fd >= 0:
            self._parent.remove(self._name, only=os.fstat(self._fd))
            self._close()

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1


def _set_attributes(fd: int, attributes: Mapping[str, bytes]) -> None:
    """Those of users only: others mean rights on this host."""
    for name, value in attributes.items():
        if not name.startswith("user."):
            continue
        if "\0" in name:
            raise OSError(errno.EINVAL, "no attribute can have this name")
        os.setxattr(fd, name, value)
