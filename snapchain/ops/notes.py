"""What snapchain knows of a layer file and the file cannot say: a small note beside each.

    .snapchain-layer-web1.2.qcow2-1234567.json

holds    who wants the file to stay as it is, and why
sealed   when it was sealed, and under which labels: a local layer is a point of its disk, too
merged   what it was made of, so that a shipment knows the parts again that a destination has

A note belongs to the file of its inode, whatever that is called by now; only where no file of the directory has that
inode (a copy of the whole directory), a hold stands for the file of its name.  Devices are not compared: their numbers
change at a reboot, and the names of one directory are of one filesystem.  Losing a note costs a hold, a label, or one
reading of a merged file; a note that somebody else could have written is believed in nothing but its holds.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from snapchain.errors import Corrupt, NotFound, SnapchainError
from snapchain.host import files
from snapchain.host.os_errors import os_errors
from snapchain.repository.source import Source

_PREFIX, _SUFFIX = ".snapchain-layer-", ".json"
_BEGUN = re.compile(rf"\.{re.escape(_PREFIX)}.*\.{files.NEW}-[0-9a-f]+")
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


class LayerNote(_Part):
    """merged: how this file was made, how its parts were made, and so on; a flat list, however deep that goes."""

    version: Literal[1] = 1
    name: str
    inode: int
    holds: tuple[Hold, ...] = ()
    sealed: Sealed | None = None
    merged: tuple[MergedFile, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing."""
        return not (self.holds or self.sealed or self.merged)


@dataclass(slots=True)
class _Directory:
    """notes: by inode, each with its path; inodes: name -> inode, of all other entries; begun: notes half written."""

    notes: dict[int, tuple[Path, LayerNote]]
    inodes: dict[str, int]
    begun: list[Path]
    faults: list[SnapchainError]


class Notes:
    """The notes of the directories in which some files lie; each directory is read once, when first asked for."""

    def __init__(self) -> None:
        self._known: dict[Path, _Directory] = {}

    def of(self, path: Path, *, inode: int | None = None) -> LayerNote:
        """The note of a file (a real path), an empty one where there is none; `faults` says what could not be read.

        inode: of a file that was opened under this path and may have lost its name since
        """
        there = self._in(path.parent)
        inode = there.inodes.get(path.name, -1) if inode is None else inode
        found = there.notes.get(inode)
        holds = tuple(found[1].holds) if found else ()
        present = set(there.inodes.values())
        for _, note in there.notes.values():
            if note.name == path.name and note.inode not in present:
                holds += tuple(hold for hold in note.holds if hold.tag not in {each.tag for each in holds})
        note = found[1] if found else LayerNote(name=path.name, inode=inode)
        return note.model_copy(update={"holds": holds})

    def faults(self, paths: Iterable[Path]) -> list[SnapchainError]:
        """What could not be read in the directories of these files: there may be holds that nobody knows of."""
        return [fault for parent in dict.fromkeys(path.parent for path in paths) for fault in self._in(parent).faults]

    def change(self, path: Path, change: Callable[[LayerNote], LayerNote]) -> LayerNote:
        """Write the note of a file (a real path) anew; one that says nothing any more is removed.

        A file that is gone may still have a note, by its name. Raises NotFound where there is neither.
        """
        with self._alone_in(path.parent) as there:
            inode = there.inodes.get(path.name)
            if inode is None and not self.of(path).holds:
                raise NotFound("no such file", subject=path)
            note = change(self.of(path)).model_copy(update={"name": path.name, "inode": -1 if inode is None else inode})
            # The note of this inode, under whatever name, and those that stood for this name: in this one now.
            present = set(there.inodes.values())
            old = {
                where
                for where, each in there.notes.values()
                if each.inode == inode or (each.name == path.name and each.inode not in present)
            }
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
            present = set(there.inodes.values())
            for where, note in there.notes.values():
                if note.inode not in present and not note.holds:
                    with os_errors(where):
                        where.unlink(missing_ok=True)  # not made durable: one that comes back goes the next time

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


def _read(directory: Path) -> _Directory:
    there = _Directory({}, {}, [], [])
    try:
        with os_errors(directory), os.scandir(directory) as entries:
            found = [(entry.name, entry.inode()) for entry in entries]
    except SnapchainError as fault:
        there.faults.append(fault)
        return there
    for name, inode in found:
        if _BEGUN.fullmatch(name):
            there.begun.append(directory / name)
            continue
        if not (name.startswith(_PREFIX) and name.endswith(_SUFFIX)):
            there.inodes[name] = inode
            continue
        path = directory / name
        try:
            note = _read_note(path)
        except NotFound:  # removed meanwhile
            continue
        except SnapchainError as fault:
            there.faults.append(fault)
            continue
        there.notes[note.inode] = path, note
    return there


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
        return note.model_copy(update={"sealed": None, "merged": ()})
    return note


def _lock(fd: int) -> bool:
    """False where the filesystem has no such locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError:
        return False
    return True
