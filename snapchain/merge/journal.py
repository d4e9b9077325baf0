"""What a merge of local files leaves for the next run when it is killed: a small record beside the result.

    switching    new-file: the result is whole; its rename is next, or was just done     see by the inode
    absorbing    absorb: the uppermost input is being added to, or was just relinked     see by its link
    committing   commit: the lowest input is being added to; its rename is the switch    see by the inode
    live         of a running guest: a block job of its QEMU is at work                   see live_settle.py

Until a new file is whole nothing is recorded: its temporary name is enough.  The record is on the disk before the
step that it names.  It names files to remove, and others may write to its directory.  So it carries the mark of the
user who merges (host/records.py), and without that mark it is not acted on.  A living merge holds a lock
on its record (flock(2)).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from snapchain.errors import Busy, Corrupt, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.host import files, records
from snapchain.host.directory import Directory
from snapchain.host.os_errors import os_errors
from snapchain.host.records import StateKey, made_key, own_key
from snapchain.host.temporary_names import MERGE, NEW, temporary_beside
from snapchain.image import ImageChain
from snapchain.image.dependent_search import search_directories
from snapchain.image.qcow2.header import Backing, read_header
from snapchain.model.fingerprint import Fingerprint
from snapchain.source.notes import Sealed

if TYPE_CHECKING:
    from snapchain.merge.step import MergeStep

_PREFIX, _SUFFIX = ".snapchain-merge-", ".json"
_PURPOSE = "merge"
_CAP = 1 << 20
_MOST_FILES, _LONGEST_PATH = 10_000, 4096
_LARGEST = (1 << 64) - 1
_REMEDY = (
    "let the user and the host that began this merge finish it with `snapchain doctor`; else read the file, "
    "and remove it, or name it to `snapchain doctor --accept`"
)


def _is_path(path: Path) -> Path:
    if "\0" in str(path) or len(os.fsencode(path)) > _LONGEST_PATH:
        raise ValueError("not the path of a file")
    return path


def _is_exact(path: Path) -> Path:
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError("the path of a file must lead to it from the root, without '..'")
    return path


_Named = Annotated[Path, AfterValidator(_is_path)]
_Exact = Annotated[Path, AfterValidator(_is_path), AfterValidator(_is_exact)]
_Number = Annotated[int, Field(ge=0, le=_LARGEST)]
_Names = Annotated[tuple[_Named, ...], Field(max_length=_MOST_FILES)]


class FileId(BaseModel):
    """A file by name, device and inode.

    born_ns: when it was made, which distinguishes it from a later file with the same inode; None where unknown
    size, mtime_ns: as they were; None in a record of version 0.1
    """

    model_config = ConfigDict(frozen=True, defer_build=True)

    path: _Exact
    device: _Number
    inode: _Number
    born_ns: int | None = Field(default=None, ge=-_LARGEST, le=_LARGEST)
    size: _Number | None = None
    mtime_ns: int | None = Field(default=None, ge=-_LARGEST, le=_LARGEST)

    @classmethod
    def of(cls, path: Path) -> FileId:
        """As it is now."""
        with os_errors(path), Directory.open(path.parent) as directory:
            return cls._of(path, look(directory, path.name))

    @classmethod
    def of_open(cls, path: Path, fd: int) -> FileId:
        """Of an open file that has this name."""
        with os_errors(path):
            return cls._of(path, look_at(fd))

    @classmethod
    def _of(cls, path: Path, found: Look) -> FileId:
        status = found.status
        return cls(
            path=path,
            device=status.st_dev,
            inode=status.st_ino,
            born_ns=found.born_ns,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
        )

    def is_at(self, found: Look) -> bool:
        """Whether what was found under a name is this file, whatever was written to it since.

        Numbers of devices change at a reboot: they count only where the time of birth is unknown.
        """
        if found.status.st_ino != self.inode:
            return False
        if self.born_ns is not None and found.born_ns is not None:
            return self.born_ns == found.born_ns
        return found.status.st_dev == self.device

    def is_untouched(self, found: Look) -> bool:
        """Whether it is this file, unmodified."""
        status = found.status
        same = self.size in (None, status.st_size) and self.mtime_ns in (None, status.st_mtime_ns)
        return same and self.is_at(found)

    def whatever_written(self) -> FileId:
        """The same file, modified or not."""
        return self.model_copy(update={"size": None, "mtime_ns": None})

    def still(self, path: Path | None = None) -> bool:
        """Whether `path` (its own by default) is this file."""
        where = self.path if path is None else path
        try:
            with os_errors(where), Directory.open(where.parent) as directory:
                return self.is_at(look(directory, where.name))
        except NotFound:
            return False


class LiveMerge(BaseModel):
    """What the record of a live merge has besides, so that any later run finds the job, or what became of it.

    kind: of the block job; job_id: its name in QEMU; guest, disk: their names; option: as one types the guest's
    domain, connect, qmp: its address
    process: pid and start time of its QEMU, None where unknown
    inputs: lowest first, as they were; above: the file above them, None where the active layer is among them
    above_sealed: when that was sealed, and as what file, before a commit changes its header; None for an active layer
    formats, sources: of the inputs; the fingerprints are those before anything was written to them
    time, labels: of the view that the result shows, None where that is not sealed
    pivot: of an active commit: whether the guest was switched to the lowest input
    """

    model_config = ConfigDict(frozen=True, defer_build=True)

    kind: Literal["commit", "active-commit", "stream"]
    job_id: Annotated[str, Field(pattern=r"^sc-[A-Za-z0-9._-]{1,120}$")]
    guest: Annotated[str, Field(max_length=_LONGEST_PATH)]
    option: Annotated[str, Field(max_length=_LONGEST_PATH)]
    disk: Annotated[str, Field(max_length=_LONGEST_PATH)]
    domain: str | None = None
    connect: str | None = None
    qmp: _Named | None = None
    process: tuple[int, int] | None = None
    inputs: Annotated[tuple[FileId, ...], Field(min_length=2, max_length=_MOST_FILES)]
    above: FileId | None = None
    above_sealed: Sealed | None = None
    formats: Annotated[tuple[Literal["qcow2", "raw"], ...], Field(max_length=_MOST_FILES)]
    sources: Annotated[tuple[Fingerprint, ...], Field(max_length=_MOST_FILES)]
    time: AwareDatetime | None = None
    labels: tuple[str, ...] = ()
    pivot: Literal["not yet", "asked for", "done"] = "not yet"


class MergeJournal(BaseModel):
    """One merge.

    replaced: the uppermost input, whose path the result takes; result: the file that takes it (absorb: the same)
    lowest: the lowest input, by which the merge can be requested again; link: the backing link of the result
    remove: inputs that go, uppermost first; kept_as: a second name for `replaced`, given before the switch
    search: where images may depend on the inputs, besides the tree around the disk's top
    top: the file that the guest opens; None in a record of version 0.1: then the uppermost input
    links: symbolic links by which the disk itself opens inputs that go
    confirmed: inputs of --remove, which count as the disk's own
    live: of a running guest's chain; then `replaced` and `result` are the input that keeps its path
    """

    model_config = ConfigDict(frozen=True, defer_build=True)

    version: Literal[2] = 2
    stage: Literal["switching", "absorbing", "committing", "live"]
    replaced: FileId
    result: FileId
    lowest: _Exact
    link: Backing | None
    remove: Annotated[tuple[FileId, ...], Field(max_length=_MOST_FILES)] = ()
    kept_as: _Exact | None = None
    search: _Names = ()
    top: _Named | None = None
    links: _Names = ()
    confirmed: _Names = ()
    live: LiveMerge | None = None

    @model_validator(mode="after")
    def _check_places(self) -> Self:
        """The result takes a name in its own directory, and so does a second name."""
        home = self.replaced.path.parent
        if self.result.path.parent != home or (self.kept_as is not None and self.kept_as.parent != home):
            raise ValueError("the result of a merge lies in another directory than the file whose place it takes")
        if (self.stage == "live") != (self.live is not None):
            raise ValueError("a live merge and its stage belong together")
        return self

    @property
    def path(self) -> Path:
        """Where the record lies."""
        return journal_path(self.replaced.path)


Stage = Literal["switching", "absorbing", "committing"]


def of_step(step: MergeStep, old: ImageChain, stage: Stage, result: FileId) -> MergeJournal:
    """The record of a merge that is about to change files. old: the chain; result: the file that takes the place."""
    return MergeJournal(
        stage=stage,
        replaced=FileId.of(step.result),
        result=result,
        lowest=old.files[step.first].real_path,
        link=step.backing,
        remove=tuple(FileId.of(path) for path in step.remove if path != result.path),
        kept_as=step.kept_as,
        search=search_directories(old, step.request.image_dirs),
        top=old.top.path,
        # The symbolic links by which the chain opens inputs that go.
        links=tuple(file.path for file in old.files if file.real_path in step.remove and file.path != file.real_path),
        confirmed=step.confirmed,
    )


class OpenJournal:
    """A record on the disk, held by its merge until `close`; a context manager that closes and does not remove.

    unmarked: why it has no mark, so that only `doctor --accept` finishes what it names when the merge is killed
    """

    def __init__(self, journal: MergeJournal, *, durable: bool = True) -> None:
        """Write it. durable: its name too is on the disk when this returns; else with the next flush of the directory.

        It takes the place of an older one.
        """
        self.journal = journal
        self.unmarked: SnapchainError | None = None
        self._fd = -1
        path = journal.path
        temporary = temporary_beside(path, purpose=NEW).name
        with os_errors(path), Directory.open(path.parent) as directory:
            data = _encoded(journal, directory, self._key())
            self._fd = directory.create(temporary)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.write(self._fd, data)
                os.fsync(self._fd)
                directory.rename(temporary, path.name)
                if durable:
                    directory.sync()
            except BaseException:
                self.close()
                with suppress(OSError, SnapchainError):
                    directory.remove(temporary)
                raise

    def _key(self) -> StateKey | None:
        try:
            return made_key()
        except SnapchainError as error:
            self.unmarked = error
            return None

    def close(self) -> None:
        """Let go of it; fine when repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _encoded(journal: MergeJournal, directory: Directory, key: StateKey | None) -> bytes:
    try:
        values = journal.model_dump(mode="json")
    except ValueError as error:
        raise Unsupported(
            "a merge of files whose names are not UTF-8 cannot be recorded",
            subject=journal.replaced.path,
            hint="rename the files of its chain, or their directory",
        ) from error
    return records.encode(values, purpose=_PURPOSE, place=os.fstat(directory.fd).st_ino, key=key)


@contextmanager
def taken(journal: MergeJournal) -> Iterator[None]:
    """Hold the record of a merge that was killed. Raises Busy while that merge lives."""
    path = journal.path
    with os_errors(path), Directory.open(path.parent) as directory:
        fd = directory.open_file(path.name)
    try:
        with os_errors(path):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Busy(
                    "another merge of it is running", subject=journal.replaced.path, hint="wait for its end"
                ) from error
        yield
    finally:
        os.close(fd)


def journal_path(image: Path) -> Path:
    """Where the journal of a merge into `image` lies."""
    name = image.name if len(image.name.encode()) < 200 else hashlib.sha256(image.name.encode()).hexdigest()
    return image.with_name(f"{_PREFIX}{name}{_SUFFIX}")


def sweep(image: Path) -> None:
    """Remove half-written files of killed merges into `image`. Only while no other merge works there."""
    files.remove_temporaries(image, purpose=MERGE)
    files.remove_temporaries(journal_path(image), purpose=NEW)


def unsettled(images: Iterable[Path]) -> list[MergeJournal]:
    """The journals that killed merges have left beside any of these images (real paths).

    Raises Corrupt for one that cannot be read, InvalidInput for one that this user did not write.
    """
    return [_read(image, path) for image in images if _is_there(path := journal_path(image))]


def read(path: Path) -> MergeJournal:
    """The record at a path; errors as `unsettled`."""
    journal = _parsed(path)
    return _read(journal.replaced.path, path)


def unproven(path: Path) -> MergeJournal:
    """The record at a path, whoever wrote it, for a person to read; by it, only files of its own directory go.

    Raises Corrupt for what is no record of this place.
    """
    found = _parsed(path, unproven=True)
    _check_place(found, found.replaced.path, path)
    # Without what makes another directory the disk's own, or a file elsewhere, nothing goes that lies elsewhere.
    return found.model_copy(update={"top": None, "links": (), "confirmed": ()})


def accept(path: Path) -> None:
    """Make a record this user's, as `unproven` shows it, since they have looked at it.

    Raises as that, Busy while its merge lives, and as `made_key`.
    """
    made_key()
    found = unproven(path)
    with taken(found), OpenJournal(found):
        pass


def is_journal(path: Path) -> bool:
    """Whether a file has the name of a record."""
    return path.name.startswith(_PREFIX) and path.name.endswith(_SUFFIX)


def _is_there(path: Path) -> bool:
    """Whether anything has that name, even a dangling link."""
    with os_errors(path), Directory.open(path.parent) as directory:
        return directory.has(path.name)


def _read(image: Path, path: Path) -> MergeJournal:
    journal = _parsed(path)
    _check_place(journal, image, path)
    return journal


def _check_place(journal: MergeJournal, image: Path, path: Path) -> None:
    if journal.replaced.path != image or journal_path(image) != path:
        raise Corrupt("the journal of another directory's merge", subject=path, hint="was the directory moved?")


def _parsed(path: Path, *, unproven: bool = False) -> MergeJournal:
    """unproven: whoever wrote it."""
    try:
        with os_errors(path), Directory.open(path.parent) as directory:
            record = records.read(directory, path.name, purpose=_PURPOSE, key=own_key(), cap=_CAP)
    except (InvalidInput, Unsupported) as error:
        raise _no_journal(path, error.message) from error
    try:
        journal = MergeJournal.model_validate_json(record.text)
    except ValidationError as error:
        raise _no_journal(path, error.errors()[0]["msg"]) from error
    if not record.is_marked and not unproven:
        raise InvalidInput(
            "a merge's journal that this user did not write on this host, or that was changed since",
            subject=path,
            hint=_REMEDY,
        )
    return journal


def _no_journal(path: Path, why: str) -> Corrupt:
    return Corrupt(f"not a merge's journal: {why}", subject=path, hint="look at it, and remove it")


# --- How far an absorb had come: whether the file's header records the new link.


def linked(fd: int, link: Backing | None, *, subject: object) -> bool:
    """Whether an open qcow2 file records just this. Errors as `read_header`."""
    recorded = read_header(fd, subject=subject).backing
    if recorded is None or link is None:
        return recorded is None and link is None
    return (recorded.name, recorded.format) == (link.name, link.format)


# --- What lies under a name, pinned while it is looked at: no link is followed, nothing is opened for reading.
#
# The number of an inode is used again soon.  Together with the time at which the file was made, which nobody can set,
# it names one file for ever.

_AT_EMPTY_PATH, _STATX_BTIME = 0x1000, 0x800
_STATX_BYTES, _MASK_AT, _BORN_AT = 256, 0, 80
_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a file. born_ns: when it was made, None where its filesystem does not know."""

    status: os.stat_result
    born_ns: int | None


def look(directory: Directory, name: str) -> Look:
    """At what has a name in a directory, be it a link. Raises OSError."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.fd)
    try:
        return look_at(fd)
    finally:
        os.close(fd)


def look_at(fd: int) -> Look:
    """At what is open."""
    return Look(os.fstat(fd), _born(fd))


def _born(fd: int) -> int | None:
    from ctypes import create_string_buffer  # not at the start of every command

    statx = _statx()
    buffer = create_string_buffer(_STATX_BYTES)
    if statx is None or statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer) != 0:
        return None
    if not struct.unpack_from("=I", buffer, _MASK_AT)[0] & _STATX_BTIME:
        return None
    seconds, nanoseconds = struct.unpack_from("=qI", buffer, _BORN_AT)
    return int(seconds * _NS + nanoseconds)


@functools.cache
def _statx() -> Any | None:
    """statx(2) of the C library, which glibc and musl have since 2018."""
    from ctypes import CDLL

    return getattr(CDLL(None), "statx", None)
