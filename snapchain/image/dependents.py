"""The images and domains that depend on a file: a search of directory trees and of libvirt's definitions.

    i1/disk.qcow2 ->+                      files: _base/img, which may be removed or written to
                    +-> _base/img          own:   i1/disk.qcow2, the disk that the command works on
    i2/disk.qcow2 ->+                      found: i2/disk.qcow2

Only headers are read, breadth first from the first root on.  Files that a found image names are read as well,
wherever they lie: an overlay here may have a backing file elsewhere, which uses a file of ours.  Files are
compared by device and inode, so links, hard links and bind mounts count as the file itself.

The search is bounded.  Unread directories are reported (`Dependents.incomplete`) and stop no command; otherwise another
user's unreadable directory would block every command for ever.  One exception: an unreadable image counts as a user of
every file that its owner could read (see `_may_depend_on`).
"""

from __future__ import annotations

import os
import stat
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import NamedTuple

from snapchain.errors import SnapchainError
from snapchain.host import libvirt
from snapchain.host.directory import Directory, open_behind
from snapchain.host.path_resolution import Resolved, real_name, resolve
from snapchain.host.rights import Rights, acting_as
from snapchain.host.terminal import encodable
from snapchain.image.references import mentions, named_files, recorded_names

MOST_ENTRIES = 200_000
MOST_SECONDS = 5.0
"""Bounds of the search: names, and seconds without the time for libvirt."""
_SMALLEST_IMAGE = 72
_NAMED = 3
_NOT_ENTERED = {"/proc", "/sys", "/dev", "/run/user"}
_SYSTEM = {"/bin", "/boot", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/sbin", "/usr", "/snap"}
"""The operating system's own directories, which hold no disks; entered only where one is named, or lies below it."""
_IMAGE_SUFFIXES = {".qcow2", ".qcow", ".img", ".raw", ".qed", ".vmdk", ".snap", ".overlay", ".base"}

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

Identity = tuple[int, int]


class _Tree(NamedTuple):
    """A directory to search. by: the user whose link leads there; None for root, and where this process is not root."""

    path: str
    by: Rights | None


class Kind(Enum):
    """How a file is used.

    CONTENT: an image or a domain reads it; LINK: a symbolic link, so another name
    UNREAD: an image that cannot be read and may depend on it
    DEFINITION: the disk's own domain records the file in its backing chain, and would not start without it
    """

    CONTENT = "content"
    LINK = "link"
    UNREAD = "unread"
    DEFINITION = "definition"


SEEN = (Kind.CONTENT, Kind.LINK, Kind.DEFINITION)
"""Kinds of proven users, not merely possible ones."""


@dataclass(frozen=True, slots=True)
class Dependent:
    """One user of a file. path: an image or link, or None; domain: libvirt's name, or None.

    description: a clause that names it, such as `/vm/i2/disk.qcow2 depends on it`
    by: the name of the file that it uses, links resolved; one of many where the file has hard links
    """

    path: Path | None
    domain: str | None
    description: str
    kind: Kind
    by: Path


@dataclass(frozen=True, slots=True)
class Dependents:
    """The result of a search. incomplete: a sentence where a part could not be searched."""

    incomplete: str | None = None
    _found: dict[str, tuple[Dependent, ...]] = field(default_factory=dict)

    def on(self, path: Path, *kinds: Kind) -> tuple[Dependent, ...]:
        """The other users of a file, which must be one of the searched `files`; kinds: only these."""
        found = self._found.get(real_name(path), ())
        return tuple(each for each in found if each.kind in kinds) if kinds else found

    def without(self, kind: Kind) -> Dependents:
        """All but the users of one kind."""
        left = {name: tuple(each for each in users if each.kind is not kind) for name, users in self._found.items()}
        return Dependents(self.incomplete, left)

    def reason(self, path: Path, *kinds: Kind) -> str | None:
        """Why this file must stay, in a clause; None when no other user was found."""
        return describe(self.on(path, *kinds))


def describe(dependents: Sequence[Dependent]) -> str | None:
    """The first users in a clause; None for no user."""
    more = f"; and {len(dependents) - _NAMED} more" if len(dependents) > _NAMED else ""
    return "; ".join(each.description for each in dependents[:_NAMED]) + more if dependents else None


def search(
    files: Sequence[Path],
    roots: Iterable[Path | Resolved],
    *,
    near: Collection[Path] = (),
    own: Collection[Identity] = (),
    disk: Path | None = None,
) -> Dependents:
    """Search the trees below `roots`, and libvirt's definitions, for users of `files`.

    files: by the names under which their own disk opens them: symbolic links among these do not count as users
    near: directories in which every unreadable file counts, whatever its name
    own: (device, inode) of images that do not count, such as the disk's other files
    disk: the file that a guest opens; a domain whose disk this is does not count because of that
    """
    looked = _Search(files, near, own, disk)
    looked.walk(roots)
    definitions = libvirt.definitions()
    looked.domains(definitions.domains)
    looked.walk(definitions.directories)
    looked.read(definitions.volumes)
    return looked.result(definitions.fault)


class _Search:
    def __init__(
        self, files: Sequence[Path], near: Collection[Path], own: Collection[Identity], disk: Path | None
    ) -> None:
        self._files: dict[Identity, list[str]] = {}
        self._real: dict[str, Path] = {}
        for file in files:
            real = real_name(file)
            self._real[real] = Path(real)
            with suppress(OSError):
                self._files.setdefault(_identity(os.stat(real)), []).append(real)  # noqa: PTH116 - a hot path
        self._own = set(own)
        self._names = {name for file in [*files, *([disk] if disk else [])] for name in _links(file)}
        self._disk = None if disk is None else real_name(disk)
        self._near = {real_name(directory) for directory in near}
        self._suffixes = {*_IMAGE_SUFFIXES, *(Path(real).suffix for real in self._real)} - {""}
        self._found: dict[str, dict[str, Dependent]] = {}
        self._directories: set[Identity] = set()
        self._read: set[str] = set()
        self._follow: deque[tuple[str, Rights | None]] = deque()
        """Names of files to read, each with the rights of the user that named it."""
        self._entries = 0
        self._seconds = 0.0
        self._stopped_at: str | None = None
        self._unseen: list[str] = []

    # --- trees

    def walk(self, roots: Iterable[Path | Resolved]) -> None:
        """Read all files below the roots, in the order of the roots."""
        began = time.monotonic()
        named = [tree for tree in map(self._root, roots) if tree is not None]
        passed_over = {each for each in _SYSTEM if not any(Path(tree.path).is_relative_to(each) for tree in named)}
        waiting = deque(named)
        while waiting:
            tree = waiting.popleft()
            directory = tree.path
            if self._entries >= MOST_ENTRIES or self._seconds + time.monotonic() - began > MOST_SECONDS:
                self._stopped_at = self._stopped_at or directory
                break
            waiting.extend(
                each for each in self._directory(tree) if each.path not in _NOT_ENTERED and each.path not in passed_over
            )
            self._follow_names()
        self._seconds += time.monotonic() - began

    def _root(self, root: Path | Resolved) -> _Tree | None:
        try:
            found = root if isinstance(root, Resolved) else resolve(root)
        except (OSError, SnapchainError):
            self._unseen.append(str(root))
            return None
        return _Tree(str(found.real), found.chosen_by)

    def _directory(self, tree: _Tree) -> Iterator[_Tree]:
        """Read the images of one directory; yields its directories."""
        below: list[_Tree] = []
        try:
            with Directory.open(Path(tree.path)) as home:
                status = os.fstat(home.fd)
                if _identity(status) in self._directories:
                    return
                self._directories.add(_identity(status))
                with acting_as(tree.by), os.scandir(home.opened()) as entries:
                    for entry in entries:
                        self._entries += 1
                        # A dangling link, a link to a place that its owner may not read, or removed meanwhile.
                        with suppress(OSError, SnapchainError):
                            found = self._entry(tree, home, entry)
                            if found is not None:
                                below.append(found)
                        if self._entries >= MOST_ENTRIES:
                            self._stopped_at = tree.path
                            break
        except (FileNotFoundError, NotADirectoryError):  # gone meanwhile
            pass
        except (OSError, SnapchainError):
            self._unseen.append(tree.path)
        yield from below

    def _entry(self, tree: _Tree, home: Directory, entry: os.DirEntry[str]) -> _Tree | None:
        """Read an image; returns a directory to search."""
        path = f"{tree.path.rstrip('/')}/{entry.name}"
        if not entry.is_symlink():
            if entry.is_dir(follow_symlinks=False):
                return _Tree(path, tree.by)
            self._image(path, entry.stat(follow_symlinks=False), partial(_opened, home, entry.name, tree.by))
            return None
        # A link, and all below it, is followed with the rights of the user that could have made it.
        maker = tree.by or home.rights_of_file(entry.stat(follow_symlinks=False))
        with acting_as(maker):
            status = entry.stat()
            if stat.S_ISDIR(status.st_mode):
                return _Tree(real_name(path), maker)
            self._link(path, status)
            self._image(path, status, partial(os.open, entry.name, _READ, dir_fd=home.fd), counts=maker is None)
        return None

    def _link(self, path: str, status: os.stat_result) -> None:
        """A guest may open one of our files by this name."""
        if path not in self._names:
            for real in self._files.get(_identity(status), ()):
                self._add(real, path, "is a symbolic link to it", Kind.LINK, by=real_name(path))

    # --- images

    def _image(self, path: str, status: os.stat_result, opened: Callable[[], int], *, counts: bool = True) -> None:
        """Read an image that is not read yet.

        opened: makes a descriptor of it; counts: whether it may depend on our files if it cannot be read
        """
        if not _may_be_image(status) or (status.st_dev, status.st_ino) in self._own or path in self._read:
            return
        self._read.add(path)
        try:
            names = _names_of(opened)
        except (FileNotFoundError, SnapchainError):  # gone, or swapped, meanwhile
            return
        except OSError:
            if counts:
                self._unreadable(path, status)
            return
        owner = status.st_uid if os.geteuid() == 0 else 0
        for name in names:
            self._named(Path(path), name, Rights.of_user(owner) if owner else None)

    def _named(self, image: Path, name: str, by_whom: Rights | None) -> None:
        targets: dict[str, str] = {real: real for real, file in self._real.items() if mentions(name, file)}
        for place in named_files(image, name):
            by = real_name(place)
            found = self._meant(by)
            targets.update(dict.fromkeys(found, by))
            if not found:
                self._follow.append((str(place), by_whom))
        for real, by in targets.items():
            if real_name(image) != real:
                self._add(real, str(image), "depends on it", Kind.CONTENT, by=by)

    def _meant(self, real: str) -> Collection[str]:
        """The files that a path without links leads to."""
        try:
            return self._files.get(_identity(os.stat(real)), ())  # noqa: PTH116 - a hot path
        except OSError:  # missing or invisible: compare by name
            return [real] if real in self._real else ()

    def _follow_names(self) -> None:
        """Read the files that images name: they may lie anywhere, and have backing files themselves."""
        while self._follow:
            path, by_whom = self._follow.popleft()
            if path not in self._read:
                with suppress(OSError, SnapchainError), acting_as(by_whom):
                    status = os.stat(path)  # noqa: PTH116 - a hot path
                    self._image(path, status, partial(_opened_by_name, path, by_whom), counts=by_whom is None)

    def _unreadable(self, path: str, status: os.stat_result) -> None:
        near = os.path.dirname(real_name(path)) in self._near  # noqa: PTH120 - a hot path
        looks_like_an_image = Path(path).suffix in self._suffixes or Path(path).name.startswith("disk")
        if not near and not looks_like_an_image:
            return
        for real in self._real:
            if near or _may_depend_on(real, status.st_uid):
                self._add(real, path, "cannot be read, and may depend on it", Kind.UNREAD, by=real)

    # --- libvirt

    def domains(self, domains: Iterable[libvirt.Domain]) -> None:
        """Read the disks of domains, the chains in their definitions, and the files that their headers name."""
        for domain in domains:
            for file in domain.files:
                self._named_by(domain.name, file)
                self._follow.append((str(file.path), None))
        self._follow_names()

    def _named_by(self, domain: str, file: libvirt.NamedFile) -> None:
        by = real_name(file.path)
        opened = None if file.source is None else real_name(file.source)
        is_own = opened is not None and opened == self._disk
        if is_own and not file.is_lasting:
            return
        name = f"domain {encodable(domain)}" + (f" ({file.disk})" if file.disk else "")
        what = "uses it" if opened is None else "names it in its backing chain"
        for real in self._meant(by):
            if opened is not None or real != self._disk:
                kind = Kind.DEFINITION if is_own else Kind.CONTENT
                dependent = Dependent(None, domain, f"{name} {what}", kind, Path(by))
                self._found.setdefault(real, {})[name] = dependent

    def read(self, images: Iterable[Path]) -> None:
        """Read these images, wherever they lie."""
        self._follow.extend((str(path), None) for path in images)
        self._follow_names()

    # --- the result

    def _add(self, real: str, path: str, what: str, kind: Kind, *, by: str) -> None:
        at = Path(path)
        # By its name alone where it lies beside the file.
        shown = at.name if str(at.parent) == str(Path(real).parent) else path
        self._found.setdefault(real, {})[path] = Dependent(at, None, f"{encodable(shown)} {what}", kind, Path(by))

    def result(self, fault: str | None) -> Dependents:
        """The users found, sorted by name, and the parts that could not be searched."""
        sentences = []
        if self._stopped_at is not None:
            sentences.append(
                f"The search for other users of these files ended after {self._entries} names, at "
                f"{encodable(self._stopped_at)}: it may have missed some."
            )
        if self._unseen:
            first, more = encodable(self._unseen[0]), len(self._unseen) - 1
            others = f" and {more} more directories" if more else ""
            sentences.append(f"{first}{others} cannot be read: images there may depend on these files.")
        if fault is not None:
            sentences.append(fault)
        found = {real: tuple(users[name] for name in sorted(users)) for real, users in self._found.items()}
        return Dependents(" ".join(sentences) or None, found)


def _may_be_image(status: os.stat_result) -> bool:
    kind = status.st_mode
    return stat.S_ISBLK(kind) or (stat.S_ISREG(kind) and status.st_size >= _SMALLEST_IMAGE)


def _names_of(opened: Callable[[], int]) -> tuple[str, ...]:
    fd = opened()
    try:
        # A user who may swap names can replace a file after it was read.
        return recorded_names(fd) if _may_be_image(os.fstat(fd)) else ()
    finally:
        os.close(fd)


def _opened(home: Directory, name: str, by: Rights | None) -> int:
    """Open an image of a directory. by: the user whose link leads here; their rights are in force."""
    if by is None and home.is_shared:
        return home.open_file(name)
    return os.open(name, _READ | os.O_NOFOLLOW, dir_fd=home.fd)


def _opened_by_name(path: str, by: Rights | None) -> int:
    """Open a file that an image or a domain names. by: the rights in force; the path limits root's own."""
    return os.open(path, _READ) if by is not None else open_behind(Path(path))


def _identity(status: os.stat_result) -> Identity:
    """(device, inode); of a block device its number, since it may have many nodes."""
    if stat.S_ISBLK(status.st_mode):
        return -1, status.st_rdev
    return status.st_dev, status.st_ino


def _links(path: Path) -> Iterator[str]:
    """The symbolic links, one leading to the next, by which a path reaches its file."""
    for _ in range(40):  # as many as the kernel follows
        at = Path(real_name(path.parent)) / path.name
        yield str(at)
        try:
            path = at.parent / os.readlink(at)  # noqa: PTH115 - may be relative
        except OSError:
            return


def _may_depend_on(file: str, user: int) -> bool:
    """Whether an image of this user may depend on `file`, that is, whether the user could read it.

    An image that its owner cannot use does not count.  Groups are not looked up: group access counts as everybody's.
    """
    if user == 0:
        return True
    with suppress(OSError):
        path = Path(file)
        needed = [(path, stat.S_IRUSR), *((directory, stat.S_IXUSR) for directory in path.parents)]
        for each, owners in needed:
            status = each.stat()
            bits = owners if status.st_uid == user else (owners >> 3 | owners >> 6)
            if not status.st_mode & bits:
                return False
    return True
