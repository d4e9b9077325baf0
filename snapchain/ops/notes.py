"""What snapchain knows of a layer file and the file cannot say: a small note beside each.

    .snapchain-layer-web1.2.qcow2-1234567.json

holds    who wants the file to stay as it is, and why
sealed   when it was sealed, and under which labels: a local layer is a point of its disk, too
merged   what it was made of, so that a shipment knows the parts again that a destination has
epoch    since when this host may write the disk; given: that it may not any more, since another host does

A note belongs to the file of its inode, whatever that is called by now; to the file of its name where no file of the
directory has that inode, or where only that one looks as the noted file did: the directory was copied, and numbers of
inodes are used again.  Devices are not compared: they change at a reboot, and the names of one directory are of one
filesystem.  Losing a note costs a hold, a label, or one reading of a merged file, and a disk that was given away is
told from its destination alone; a note that somebody else could have written is believed in what forbids, no more.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from snapchain.errors import Corrupt, NotFound, SnapchainError
from snapchain.host import files
from snapchain.host.os_errors import os_errors
from snapchain.host.temporary_names import NEW, temporary_of
from snapchain.repository.source import Source

_PREFIX, _SUFFIX = ".snapchain-layer-", ".json"
_CAP = 16 << 20
_LONGEST_NAME = 150
"""Bytes of a file's name in its note's: 255 are allowed, also for the temporary one."""
_MODE = 0o644
"""Whoever may look at the images' directory may know what is held there."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Hold(_Part):
    """A reason to leave a file as it is. tag: names it, once a file; reason: for people."""

    tag: str
    since: AwareDatetime
    reason: str = ""


class Sealed(_Part):
    """When a file was sealed. file: what it was then; true only as long as nobody has written to it since."""

    time: AwareDatetime
    labels: tuple[str, ...] = ()
    file: Source


class MergedFile(_Part):
    """A file that a merge has made, and the files that it was made of, lowest first."""

    made: Source
    of: tuple[Source, ...]


class Overlay(_Part):
    """The empty overlay at a replica on which a guest is to run: its file's name, on which layer, and its geometry."""

    name: str
    layer: str
    virtual_size: int
    cluster_size: int
    extended_l2: bool


class Given(_Part):
    """The disk that this file is a part of was given to another host: nothing here may write to it, or send it.

    destination, disk: to whom; epoch: in which; token: of the handover; together: all disks of it; mode: the file's
    before; confirmed: the destination has said that it has it; started: the hook that starts its guest is done
    """

    destination: str
    disk: str
    epoch: int
    token: str
    time: AwareDatetime
    overlay: Overlay
    together: tuple[str, ...]
    mode: int = 0
    confirmed: bool = False
    started: bool = False


class LayerNote(_Part):
    """name, inode, size, mtime_ns: of the file, when the note was written

    merged: how this file was made, how its parts were made, and so on; a flat list, however deep that goes
    epoch: in which this host writes the disks above it, 1 where nobody has ever taken one over
    """

    version: Literal[1] = 1
    name: str
    inode: int
    size: int = -1
    mtime_ns: int = -1
    holds: tuple[Hold, ...] = ()
    sealed: Sealed | None = None
    merged: tuple[MergedFile, ...] = ()
    epoch: int = Field(default=1, ge=1)
    given: Given | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing."""
        return not (self.holds or self.sealed or self.merged or self.epoch > 1 or self.given)


@dataclass(frozen=True, slots=True)
class _Found:
    """A note where it lies, and the name of the file that it belongs to, None where that is gone."""

    path: Path
    note: LayerNote
    owner: str | None


@dataclass(slots=True)
class _Directory:
    """inodes: name -> inode, of all entries but notes; begun: notes half written; faults: what could not be read."""

    notes: list[_Found]
    inodes: dict[str, int]
    begun: list[Path]
    faults: list[SnapchainError]

    def of(self, name: str) -> list[_Found]:
        """The notes of a file, by whichever of its names; of one that is gone, those that bear its name."""
        inode = self.inodes.get(name)
        if inode is None:
            return [each for each in self.notes if name == (each.owner or each.note.name)]
        return [each for each in self.notes if each.owner is not None and self.inodes[each.owner] == inode]


class Notes:
    """The notes of the directories in which some files lie; each directory is read once, when first asked for."""

    def __init__(self) -> None:
        self._known: dict[Path, _Directory] = {}

    def of(self, path: Path, *, inode: int | None = None) -> LayerNote:
        """The note of a file (a real path), an empty one where there is none; `faults` says what could not be read.

        inode: of a file that was opened under this path and may have lost its name since
        """
        there = self._in(path.parent)
        present = there.inodes.get(path.name)
        if inode is None or inode == present:
            found = [each.note for each in there.of(path.name)]
        else:
            found = [each.note for each in there.notes if each.note.inode == inode]
        wanted = present if inode is None else inode
        found.sort(key=lambda note: note.inode != wanted)
        holds = {hold.tag: hold for note in reversed(found) for hold in note.holds}
        note = found[0] if found else LayerNote(name=path.name, inode=-1 if wanted is None else wanted)
        # There is one note as a rule; where a killed run has left two, what either says is true.
        return note.model_copy(
            update={
                "holds": tuple(sorted(holds.values(), key=lambda hold: hold.since)),
                "sealed": next((each.sealed for each in found if each.sealed), None),
                "merged": tuple(merge for each in found for merge in each.merged),
                "epoch": max((each.epoch for each in found), default=1),
                "given": next((each.given for each in found if each.given), None),
            }
        )

    def faults(self, paths: Iterable[Path]) -> list[SnapchainError]:
        """What could not be read in the directories of these files: there may be holds that nobody knows of."""
        return [fault for parent in dict.fromkeys(path.parent for path in paths) for fault in self._in(parent).faults]

    def change(self, path: Path, change: Callable[[LayerNote], LayerNote]) -> LayerNote:
        """Write the note of a file (a real path) anew; one that says nothing any more is removed.

        A file that is gone may still have a note, by its name. Raises NotFound where there is neither.
        """
        with self._alone_in(path.parent) as there:
            before = self.of(path)
            if path.name not in there.inodes and not before.holds:
                raise NotFound("no such file", subject=path)
            note = change(before).model_copy(update=_look(path))
            # The notes that were this file's, under whatever name: in this one now.
            old = {each.path for each in there.of(path.name)}
            own = _note_path(path, note.inode)
            if not note.is_empty:
                files.write_atomically(own, note.model_dump_json(indent=1).encode(), mode=_MODE)
                old.discard(own)
            for where in old:
                files.remove(where)
        return note

    def sweep(self, directory: Path) -> None:
        """Remove the notes of files that are gone, but for holds: these wait for their file, or for their release."""
        with self._alone_in(directory) as there:
            for each in there.notes:
                if each.owner is None and not each.note.holds:
                    with os_errors(each.path):
                        each.path.unlink(missing_ok=True)  # not made durable: one that comes back goes the next time

    @contextmanager
    def _alone_in(self, directory: Path) -> Iterator[_Directory]:
        """A directory read anew while nobody else changes its notes, and forgotten afterwards."""
        with os_errors(directory):
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            alone = _lock(fd)
            self._known.pop(directory, None)
            there = self._in(directory)
            for path in there.begun if alone else ():  # by runs that were killed
                files.remove(path)
            yield there
        finally:
            self._known.pop(directory, None)
            os.close(fd)

    def _in(self, directory: Path) -> _Directory:
        if directory not in self._known:
            self._known[directory] = _read(directory)
        return self._known[directory]


def _note_path(path: Path, inode: int) -> Path:
    name = path.name.encode()[:_LONGEST_NAME].decode(errors="ignore")
    return path.with_name(f"{_PREFIX}{name}-{max(inode, 0)}{_SUFFIX}")


def _look(path: Path) -> dict[str, object]:
    """What a note says of its file, which may be gone."""
    try:
        status = path.lstat()
    except OSError:
        return {"name": path.name, "inode": -1, "size": -1, "mtime_ns": -1}
    return {"name": path.name, "inode": status.st_ino, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _read(directory: Path) -> _Directory:
    there = _Directory([], {}, [], [])
    notes: list[Path] = []
    try:
        with os_errors(directory), os.scandir(directory) as entries:
            for entry in entries:
                begun = temporary_of(Path(entry.path))
                if begun is not None and begun.purpose == NEW and begun.target.name.startswith(_PREFIX):
                    there.begun.append(directory / entry.name)
                elif entry.name.startswith(_PREFIX) and entry.name.endswith(_SUFFIX):
                    notes.append(directory / entry.name)
                else:
                    there.inodes[entry.name] = entry.inode()
    except SnapchainError as fault:
        there.faults.append(fault)
        return there
    names = {inode: name for name, inode in there.inodes.items()}
    for path in notes:
        try:
            note = _read_note(path)
        except NotFound:  # removed meanwhile
            continue
        except SnapchainError as fault:
            there.faults.append(fault)
            continue
        there.notes.append(_Found(path, note, _owner(note, directory, there.inodes, names)))
    return there


def _owner(note: LayerNote, directory: Path, inodes: dict[str, int], names: dict[int, str]) -> str | None:
    """The name of the file that a note belongs to now."""
    if inodes.get(note.name) == note.inode:
        return note.name
    renamed = names.get(note.inode)
    if note.name not in inodes or renamed is None:
        return renamed if note.name not in inodes else note.name
    mark = {"size": note.size, "mtime_ns": note.mtime_ns}
    same = {name: mark.items() <= _look(directory / name).items() for name in (note.name, renamed)}
    return note.name if same[note.name] and not same[renamed] else renamed


def _read_note(path: Path) -> LayerNote:
    with os_errors(path):
        status = path.lstat()
    try:
        note = LayerNote.model_validate_json(files.read_small(path, cap=_CAP))
    except ValidationError as error:
        raise Corrupt(
            f"not the note of a layer: {error.errors()[0]['msg']}",
            subject=path,
            hint="remove it; holds that were in it must be set again",
        ) from error
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
        return note.model_copy(update={"sealed": None, "merged": (), "epoch": 1})
    return note


def _lock(fd: int) -> bool:
    """False where the filesystem has no such locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError:
        return False
    return True
