"""Notes: what snapchain records about a layer file that the file itself cannot hold, in a small file beside it.

    .snapchain-layer-web1.2.qcow2-1234567.json

holds    reasons for which the file stays as it is
sealed   when it was sealed, and under which labels: a local layer is a point of its disk, too
merged   what it was made of, so that a shipment recognises the parts that a destination has
epoch    in which this host may write the disk; given: to which other host the disk was given

A note belongs to the file of its inode, whatever that is called by now; to the file of its name where no file of the
directory has that inode, or where only that one looks as the noted file did: the directory was copied, and numbers of
inodes are used again.  Devices are not compared: they change at a reboot, and the names of one directory are of one
filesystem.  Losing a note costs a hold, a label, or one reading of a merged file; that a disk was given away is then
known at its destination alone.

Others may write to the directory, so the author of a note decides what it counts for (docs/decisions/0075):

    ours   it bears our mark, or only we and root can have put it there          everything
    word   root: of the owner of the file, or of the directory; else: anybody's  holds, given: they forbid, no more
    none   any other user                                                        nothing; one notice names it
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from snapchain.errors import Corrupt, InvalidInput, NotFound, SnapchainError
from snapchain.host import files, records
from snapchain.host.directory import Directory
from snapchain.host.files import remove_leftover
from snapchain.host.os_errors import os_errors
from snapchain.host.path_resolution import Resolved
from snapchain.host.records import StateKey, made_key, own_key
from snapchain.host.rights import Rights, user_name
from snapchain.host.temporary_names import NEW, temporary_of
from snapchain.model.disk_name import LARGEST_EPOCH
from snapchain.model.fingerprint import Fingerprint
from snapchain.source import NOTE_PREFIX

_PREFIX, _SUFFIX = NOTE_PREFIX, ".json"
_PURPOSE = "layer"
_CAP = 4 << 20
_MOST_FOREIGN_BYTES, _MOST_FOREIGN = 64 << 20, 10_000
"""Of notes of others in one directory: reading more of them would take minutes."""
MOST_PARTS = 10_000
"""Files of which one merged file may be made."""
_MOST_MERGED = 8192
"""Merged files that one note tells of, so that it stays well below its cap; files beyond that are read again."""
_LONGEST_NAME = 150
"""Bytes of a file's name in its note's: 255 are allowed, also for the temporary one."""
_MODE = 0o644
"""Whoever may look at the images' directory may know what is held there."""
_SECRET_MODE = 0o600
"""It holds the token of a handover, by which anybody could undo that."""
_LOCK_TRIES, _LOCK_PAUSE = 100, 0.05
"""For the lock on a directory, which a run holds for a few calls only. Any user who can read the directory can take it
for ever; then the work is done without.
"""

_Inode = Annotated[int, Field(ge=-1, lt=1 << 64)]
_Time = Annotated[int, Field(gt=-(1 << 64), lt=1 << 64)]
_Size = Annotated[int, Field(ge=-1, lt=1 << 64)]
_Name = Annotated[str, Field(max_length=4096)]
_Epoch = Annotated[int, Field(ge=1, le=LARGEST_EPOCH)]


LET_THEM = "let that user act on it, or name the note to `snapchain doctor --accept`"
"""What to do about a note that may be true, and that another user may have written."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class WordOf(_Part):
    """A note that another user may have written. user: its owner's name; note: its path. Never stored."""

    user: str
    note: Path


class Hold(_Part):
    """A reason to leave a file as it is.

    tag: names it, once a file; reason: for people; word_of: the other user whose note alone has it, None for our own
    """

    tag: Annotated[str, Field(max_length=255)]
    since: AwareDatetime
    reason: Annotated[str, Field(max_length=65536)] = ""
    word_of: WordOf | None = Field(default=None, exclude=True)


class Sealed(_Part):
    """When a file was sealed. file: what it was then; valid only while that is not modified."""

    time: AwareDatetime
    labels: Annotated[tuple[_Name, ...], Field(max_length=10_000)] = ()
    file: Fingerprint


class MergedFile(_Part):
    """A file that a merge has made, and the files that it was made of, lowest first."""

    made: Fingerprint
    of: Annotated[tuple[Fingerprint, ...], Field(max_length=MOST_PARTS)]


class Overlay(_Part):
    """The empty overlay at a replica on which a guest is to run: its file's name, on which layer, and its geometry."""

    name: Annotated[str, Field(max_length=255)]
    layer: Annotated[str, Field(max_length=255)]
    virtual_size: Annotated[int, Field(ge=0, lt=1 << 63)]
    cluster_size: Annotated[int, Field(ge=0, lt=1 << 32)]
    extended_l2: bool


class Given(_Part):
    """The disk that this file is a part of was given to another host: nothing here may write to it, or send it.

    destination, disk: to whom; epoch: in which; token: of the handover; together: all disks of it; mode: the file's
    before; confirmed: the destination has confirmed that it has it; started: the hook that starts its guest is done
    taken_over: who took it over without this host, and on whose word; '' where this host has given it
    word_of: the other user whose note alone has it, None for our own; nothing else of it counts then
    """

    destination: _Name
    disk: _Name
    epoch: _Epoch
    token: Annotated[str, Field(max_length=255)]
    time: AwareDatetime
    overlay: Overlay
    together: Annotated[tuple[_Name, ...], Field(max_length=10_000)]
    mode: Annotated[int, Field(ge=0, le=0o7777)] = 0
    confirmed: bool = False
    started: bool = False
    taken_over: Annotated[str, Field(max_length=4096)] = ""
    word_of: WordOf | None = Field(default=None, exclude=True)


class LayerNote(_Part):
    """name, inode, size, mtime_ns: of the file, when the note was written

    merged: how this file was made, how its parts were made, and so on; a flat list, however deep that goes
    epoch: in which this host writes the disks above it, 1 where no host has ever taken one over
    """

    version: Literal[1] = 1
    name: Annotated[str, Field(max_length=255)]
    inode: _Inode
    size: _Size = -1
    mtime_ns: _Time = -1
    holds: Annotated[tuple[Hold, ...], Field(max_length=10_000)] = ()
    sealed: Sealed | None = None
    merged: Annotated[tuple[MergedFile, ...], Field(max_length=100_000)] = ()
    epoch: _Epoch = 1
    given: Given | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing."""
        return not (self.holds or self.sealed or self.merged or self.epoch > 1 or self.given)


@dataclass(frozen=True, slots=True)
class _Found:
    """A note where it lies, and the name of the file that it belongs to, None where that is gone.

    word_of: the other user who may have written it; None for a note that is ours
    """

    path: Path
    note: LayerNote
    owner: str | None
    word_of: WordOf | None


@dataclass(frozen=True, slots=True)
class Doubt:
    """A note of which nothing proves that this user or root wrote it.

    note: where it lies; file: the name of what it is about, if that is there; sentence: what it counts for
    """

    note: Path
    file: str | None
    sentence: str
    counts: bool


@dataclass(slots=True)
class _Directory:
    """inodes: name -> inode, of all entries but notes; begun: names of notes half written

    taken: the names of all notes; faults: what could not be read
    """

    notes: list[_Found] = field(default_factory=list)
    inodes: dict[str, int] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    faults: list[SnapchainError] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)

    def of(self, name: str) -> list[_Found]:
        """The notes of a file by any of its names; of a file that is gone, the notes with its name."""
        inode = self.inodes.get(name)
        if inode is None:
            return [each for each in self.notes if name == (each.owner or each.note.name)]
        return [each for each in self.notes if each.owner is not None and self.inodes[each.owner] == inode]


class Notes:
    """The notes of the directories in which some files lie; each directory is read once, when first asked for.

    A file is a real path, or a Resolved: then a directory that another user's link has chosen is read with their
    rights, and nothing is written there.
    """

    def __init__(self) -> None:
        self._known: dict[Path, _Directory] = {}

    def of(self, file: Path | Resolved, *, inode: int | None = None) -> LayerNote:
        """The note of a file, an empty one where there is none; `faults` holds what could not be read.

        inode: of a file that was opened under this path and may have lost its name since
        """
        there, path = self._beside(file), _path(file)
        present = there.inodes.get(path.name)
        if inode is None or inode == present:
            found = there.of(path.name)
        else:
            found = [each for each in there.notes if each.note.inode == inode]
        return _joined(found, path.name, present if inode is None else inode)

    def faults(self, paths: Iterable[Path | Resolved]) -> list[SnapchainError]:
        """What could not be read in the directories of these files: they may be holds."""
        return [fault for each in self._all(paths) for fault in each.faults]

    def ignored(self, paths: Iterable[Path | Resolved]) -> list[str]:
        """A sentence for each note in the directories of these files that counts for nothing."""
        return [doubt.sentence for each in self._all(paths) for doubt in each.doubts if not doubt.counts]

    def doubts(self, directory: Path) -> list[Doubt]:
        """The notes of a directory that count for nothing, and root's notes that count only for what they forbid."""
        return self._in(directory).doubts

    def changed(self, file: Path | Resolved, change: Callable[[LayerNote], LayerNote]) -> LayerNote:
        """What `change` would write. Raises as `change`, for a place that another user's link has chosen."""
        path = _place_to_change(file)
        there = self._in(path.parent)
        return change(_joined(_ours(there.of(path.name)), path.name, there.inodes.get(path.name)))

    def change(self, file: Path | Resolved, change: Callable[[LayerNote], LayerNote]) -> LayerNote:
        """Write our note of a file anew; an empty one is removed.

        A file that is gone may still have a note, by its name. Raises NotFound where there is neither, Unsupported for
        a place that another user's link has chosen.
        """
        path = _place_to_change(file)
        with self._alone_in(path.parent) as (there, directory):
            ours = _ours(there.of(path.name))
            before = _joined(ours, path.name, there.inodes.get(path.name))
            if path.name not in there.inodes and not before.holds:
                raise NotFound("no such file", subject=path)
            note = change(before).model_copy(update=_look(directory, path.name))
            # The notes that were this file's, under whatever name: in this one now. Those of others stay.
            old = {each.path.name for each in ours}
            own = _note_name(path.name, note.inode, there.taken - old)
            if not note.is_empty:
                mode = _MODE if note.given is None else _SECRET_MODE
                files.write_atomically(path.with_name(own), _encoded(note, directory), mode=mode)
                old.discard(own)
            for name in old:
                files.remove(path.with_name(name))
        return note

    def accept(self, path: Path) -> LayerNote:
        """Make a note ours, whoever wrote it: the user has read it. path: of the note; it is replaced.

        Raises Corrupt for what is no note.
        """
        made_key()  # without one, nothing can be accepted
        with self._alone_in(path.parent) as (_, directory):
            note = _parsed(path, _record(directory, path.name, own_key()))
            files.write_atomically(path, _encoded(note, directory), mode=_MODE if note.given is None else _SECRET_MODE)
        return note

    def sweep(self, directory: Path) -> None:
        """Remove our notes of files that are gone, but for holds: these wait for their file, or for their release."""
        with self._alone_in(directory) as (there, opened):
            for each in there.notes:
                if each.owner is None and each.word_of is None and not each.note.holds:
                    with os_errors(each.path):
                        opened.remove(each.path.name)  # not made durable: one that comes back goes the next time

    @contextmanager
    def _alone_in(self, path: Path) -> Iterator[tuple[_Directory, Directory]]:
        """A directory read anew under its lock, and forgotten afterwards."""
        with os_errors(path):
            directory = Directory.open(path)
        with directory:
            with os_errors(path):
                alone = _lock(directory.opened())
            self._known.pop(path, None)
            there = self._in(path)
            for name in there.begun if alone else ():  # by runs that were killed
                with os_errors(path / name):
                    remove_leftover(directory, name)
            try:
                yield there, directory
            finally:
                self._known.pop(path, None)

    def _all(self, files: Iterable[Path | Resolved]) -> list[_Directory]:
        return list({_path(file).parent: self._beside(file) for file in files}.values())

    def _beside(self, file: Path | Resolved) -> _Directory:
        return self._in(_path(file).parent, file.chosen_by if isinstance(file, Resolved) else None)

    def _in(self, directory: Path, chosen_by: Rights | None = None) -> _Directory:
        if directory not in self._known:
            self._known[directory] = _read(directory, chosen_by)
        return self._known[directory]


def _path(file: Path | Resolved) -> Path:
    return file.real if isinstance(file, Resolved) else file


def _place_to_change(file: Path | Resolved) -> Path:
    if isinstance(file, Resolved):
        file.check_may_be_changed(file.real)
    return _path(file)


def is_note(path: Path) -> bool:
    """Whether a file has the name of a note."""
    return path.name.startswith(_PREFIX) and path.name.endswith(_SUFFIX)


def _ours(found: Iterable[_Found]) -> list[_Found]:
    return [each for each in found if each.word_of is None]


def _joined(found: Sequence[_Found], name: str, inode: int | None) -> LayerNote:
    """Several notes of one file as one. There is one as a rule; where a killed run has left two, both are true."""
    found = sorted(found, key=lambda each: (each.word_of is not None, each.note.inode != inode))
    ours = [each.note for each in _ours(found)]
    holds = {hold.tag: hold for each in reversed(found) for hold in each.note.holds}
    note = found[0].note if found else LayerNote(name=name, inode=-1 if inode is None else inode)
    return note.model_copy(
        update={
            "holds": tuple(sorted(holds.values(), key=lambda hold: hold.since)),
            "sealed": next((each.sealed for each in ours if each.sealed), None),
            "merged": tuple(merge for each in ours for merge in each.merged),
            "epoch": max((each.epoch for each in ours), default=1),
            "given": next((each.note.given for each in found if each.note.given), None),
        }
    )


def _note_name(name: str, inode: int, taken: Iterable[str]) -> str:
    """An unused name for the note of a file. Another user's note may have the plain one."""
    start = name.encode()[:_LONGEST_NAME].decode(errors="ignore")
    number = str(max(inode, 0))
    while f"{_PREFIX}{start}-{number}{_SUFFIX}" in taken:
        number = f"0{number}"
    return f"{_PREFIX}{start}-{number}{_SUFFIX}"


def _encoded(note: LayerNote, directory: Directory) -> bytes:
    """Without a key it gets no mark: in a place where others may write it then counts as theirs."""
    key: StateKey | None = None
    with suppress(SnapchainError):
        key = made_key()
    values = note.model_copy(update={"merged": note.merged[:_MOST_MERGED]}).model_dump(mode="json")
    return records.encode(values, purpose=_PURPOSE, place=os.fstat(directory.fd).st_ino, key=key)


def _look(directory: Directory, name: str) -> dict[str, object]:
    """What a note records of its file, which may be gone."""
    try:
        status = directory.status(name)
    except OSError:
        return {"name": name, "inode": -1, "size": -1, "mtime_ns": -1}
    return {"name": name, "inode": status.st_ino, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _read(path: Path, chosen_by: Rights | None) -> _Directory:
    there = _Directory()
    try:
        with os_errors(path), Directory.open(path, chosen_by=chosen_by) as directory:
            _read_all(directory, there)
    except SnapchainError as fault:
        there.faults.append(fault)
    return there


def _read_all(directory: Directory, there: _Directory) -> None:
    with os.scandir(directory.opened()) as entries:
        for entry in entries:
            if not entry.name.startswith(_PREFIX[0]):  # most are images
                there.inodes[entry.name] = entry.inode()
                continue
            begun = temporary_of(Path(entry.name))
            if begun is not None and begun.purpose == NEW and begun.target.name.startswith(_PREFIX):
                there.begun.append(entry.name)
            elif is_note(Path(entry.name)):
                there.taken.add(entry.name)
            else:
                there.inodes[entry.name] = entry.inode()
    names = {inode: name for name, inode in there.inodes.items()}
    key = own_key() if there.taken else None
    foreign, foreign_bytes = 0, 0
    for name in sorted(there.taken):
        if foreign >= _MOST_FOREIGN or foreign_bytes >= _MOST_FOREIGN_BYTES:
            there.faults.append(
                Corrupt(
                    "there are too many notes of other users",
                    subject=directory.path,
                    hint=f"remove the files called {_PREFIX}* that you do not know",
                )
            )
            return
        status: os.stat_result | None = None
        try:
            with os_errors(directory.path / name):
                status = directory.status(name)
            record = _record(directory, name, key)
            status = record.status
            note = _parsed(directory.path / name, record)
            owner = _owner(note, directory, there.inodes, names)
            word_of = None if record.is_own else WordOf(user=user_name(status.st_uid), note=directory.path / name)
            counts = word_of is None or _may_forbid(directory, status, owner)
            if counts:
                there.notes.append(_Found(directory.path / name, _as_word(note, word_of), owner, word_of))
            if word_of is not None and (not counts or status.st_uid in (0, os.geteuid())):
                there.doubts.append(_doubt(word_of, owner, counts=counts))
        except NotFound:  # removed meanwhile
            continue
        except SnapchainError as fault:
            if status is None or _may_forbid(directory, status, names.get(_inode_in(name))):
                there.faults.append(fault)
            else:
                word_of = WordOf(user=user_name(status.st_uid), note=directory.path / name)
                there.doubts.append(_doubt(word_of, None, counts=False))
        if status is not None and status.st_uid not in (0, os.geteuid()):
            foreign, foreign_bytes = foreign + 1, foreign_bytes + min(status.st_size, _CAP)


def _record(directory: Directory, name: str, key: StateKey | None) -> records.Record:
    try:
        return records.read(directory, name, purpose=_PURPOSE, key=key, cap=_CAP)
    except InvalidInput as error:
        raise _no_note(directory.path / name, error.message) from error


def _parsed(path: Path, record: records.Record) -> LayerNote:
    try:
        note = LayerNote.model_validate_json(record.text)
    except ValidationError as error:
        raise _no_note(path, error.errors()[0]["msg"]) from error
    return _as_word(note, None)


def _no_note(path: Path, why: str) -> Corrupt:
    return Corrupt(
        f"not the note of a layer: {why}", subject=path, hint="remove it; holds that were in it must be set again"
    )


def _as_word(note: LayerNote, word_of: WordOf | None) -> LayerNote:
    """A note that names its author in what it forbids, whatever the stored text has there."""
    change: dict[str, object] = {"word_of": word_of}
    if word_of is not None:
        change["reason"] = ""  # only our own text is shown as it is
    holds = tuple(hold.model_copy(update=change) for hold in note.holds)
    given = None if note.given is None else note.given.model_copy(update={"word_of": word_of})
    if word_of is not None:
        holds = tuple(hold.model_copy(update={"tag": _plain(hold.tag)}) for hold in holds)
    return note.model_copy(update={"holds": holds, "given": given})


def _plain(tag: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in tag)


def _may_forbid(directory: Directory, note: os.stat_result, owner: str | None) -> bool:
    """Whether a note that is not ours counts for what it forbids. owner: the name of its file, None where it is gone.

    Nobody can do more with it than keep a file as it is, and each message names the note.  Root heeds only whom the
    file or, for a file that is not root's, the directory belongs to; and root: a note of another host, of a lost key.
    """
    if os.geteuid() != 0 or note.st_uid == 0:
        return True
    is_directorys = note.st_uid == os.fstat(directory.fd).st_uid
    if owner is None:
        return is_directorys
    try:
        status = directory.status(owner)
    except OSError:
        return is_directorys
    return note.st_uid == status.st_uid or (is_directorys and status.st_uid != 0)


def _doubt(word_of: WordOf, owner: str | None, *, counts: bool) -> Doubt:
    about = "" if owner is None else f" on {owner}"
    what = (
        "counts only for what it forbids, since nothing proves who wrote it"
        if counts
        else "is ignored, since nothing shows that they may decide on that file"
    )
    return Doubt(word_of.note, owner, f"a note of user {word_of.user}{about} {what}: {word_of.note}", counts)


_NUMBER = re.compile(r".*-(\d{1,20})\.json", re.DOTALL)


def _inode_in(name: str) -> int:
    found = _NUMBER.fullmatch(name)
    return -1 if found is None else int(found[1])


def _owner(note: LayerNote, directory: Directory, inodes: dict[str, int], names: dict[int, str]) -> str | None:
    """The name of the file that a note belongs to now."""
    if inodes.get(note.name) == note.inode:
        return note.name
    renamed = names.get(note.inode)
    if note.name not in inodes or renamed is None:
        return renamed if note.name not in inodes else note.name
    mark = {"size": note.size, "mtime_ns": note.mtime_ns}
    same = {name: mark.items() <= _look(directory, name).items() for name in (note.name, renamed)}
    return note.name if same[note.name] and not same[renamed] else renamed


def _lock(fd: int) -> bool:
    """False where the filesystem has no such locks, or another process keeps this one."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE)
            continue
        except OSError:
            return False
        return True
    return False
