"""What the owner of a directory puts in the place of a name just before it is used, and how it is taken back."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tests.swaps.world import GROUP, USER, World, as_user


class Kind(Enum):
    """Links are symbolic unless named hard."""

    LINK_TO_IMAGE = "link-to-image"
    LINK_TO_READABLE = "link-to-readable"
    """To an image of root's that everybody may read: only changing it is harm."""
    LINK_TO_SECRET = "link-to-secret"
    LINK_TO_DIRECTORY = "link-to-directory"
    LINK_TO_NOTHING = "link-to-nothing"
    LINK_TO_DEVICE = "link-to-device"
    FIFO = "fifo"
    HARD_LINK_SHARED = "hard-link-shared"
    """To a file of root's that all may write: fs.protected_hardlinks allows it."""
    HARD_LINK_SECRET = "hard-link-secret"
    """To a file of root's that nobody else may read: only without fs.protected_hardlinks."""
    PARENT = "parent"
    """A directory on the way becomes a link to one that is root's and has files of the same names."""


OF_NAMES = tuple(kind for kind in Kind if kind is not Kind.PARENT)
OF_PARENTS = (Kind.PARENT, Kind.LINK_TO_DIRECTORY, Kind.FIFO)


@dataclass(frozen=True, slots=True)
class Attack:
    """number: of the call among those that look names up in the user's directories; step: of the names it looks up.

    back: whether the swap is undone before the next such call
    """

    number: int
    step: int
    kind: Kind
    back: bool

    def __str__(self) -> str:
        return f"{self.number}.{self.step}:{self.kind.value}{':back' if self.back else ''}"

    @classmethod
    def parse(cls, words: str) -> Attack:
        """As `str` writes it."""
        place, kind, *more = words.split(":")
        number, step = place.split(".")
        return cls(int(number), int(step), Kind(kind), more == ["back"])


def may_swap(directory: str, name: str) -> bool:
    """Whether the user may put something else under this name."""
    try:
        status = Path(directory).stat()
    except OSError:
        return False
    if not stat.S_ISDIR(status.st_mode):  # asked for below a file, to see that nothing is there
        return False
    if status.st_uid == USER:
        return True
    if not status.st_mode & (0o022 if status.st_gid == GROUP else 0o002):
        return False
    if not status.st_mode & 0o1000:
        return True
    try:
        return os.lstat(f"{directory}/{name}").st_uid == USER
    except FileNotFoundError:
        return True


class Swap:
    """One swap that was made."""

    def __init__(self, world: World, kind: Kind, directory: str, name: str) -> None:
        self._path = f"{directory}/{name}"
        # A directory can only be renamed where it is: moving it writes to its "..".
        is_directory = os.path.isdir(self._path) and not os.path.islink(self._path)  # noqa: PTH112, PTH114
        self._aside = f"{directory}/.zz-{name}" if is_directory else f"{world.aside}/{name}"
        with as_user():
            try:
                os.rename(self._path, self._aside)  # noqa: PTH104
                self._moved = True
            except FileNotFoundError:
                self._moved = False
            if kind is not Kind.HARD_LINK_SECRET:
                self._plant(world, kind, name)
        if kind is Kind.HARD_LINK_SECRET:
            os.link(self._image(world, name), self._path)
        self._planted = os.lstat(self._path)

    def _plant(self, world: World, kind: Kind, name: str) -> None:
        etc = world.out / "etc"
        targets = {
            Kind.LINK_TO_IMAGE: self._image(world, name),
            Kind.LINK_TO_READABLE: self._image(world, name, "public"),
            Kind.LINK_TO_SECRET: etc / "shadow",
            Kind.LINK_TO_DIRECTORY: etc,
            Kind.LINK_TO_NOTHING: etc / "new",
            Kind.LINK_TO_DEVICE: world.out / "dev" / "disk",
            Kind.PARENT: world.out / "images",
        }
        if kind in targets:
            Path(self._path).symlink_to(targets[kind])
        elif kind is Kind.FIFO:
            os.mkfifo(self._path, 0o666)
        else:
            os.link(etc / "shared.log", self._path)

    @staticmethod
    def _image(world: World, name: str, directory: str = "images") -> Path:
        path = world.out / directory / name
        return path if os.path.lexists(path) else path.with_name("disk.qcow2")

    def undo(self) -> bool:
        """Whether what was planted was still there, or nothing was: then the old file is back."""
        with suppress(FileNotFoundError):
            now = os.lstat(self._path)
            if (now.st_dev, now.st_ino) != (self._planted.st_dev, self._planted.st_ino):
                return False
            Path(self._path).unlink()
        if self._moved:
            os.rename(self._aside, self._path)  # noqa: PTH104
        return True
