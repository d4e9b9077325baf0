"""What a merge of local files leaves for the next run when it is killed: a small record beside the result.

    switching    new-file: the result is whole; its rename is next, or was just done     see by the inode
    absorbing    absorb: the uppermost input is being added to, or was just relinked     see by its link
    committing   commit: the lowest input is being added to; its rename is the switch    see by the inode

Until a new file is whole nothing is recorded: its temporary name says enough.  The record is on the disk before the
step that it names.  It names files to remove, so one that somebody else could have planted is not believed: it must be
ours, and its files what they were.  While the merge lives it holds a lock on its record (flock(2)).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from snapchain.errors import Busy, Corrupt, InvalidInput
from snapchain.host import files
from snapchain.host.os_errors import os_errors
from snapchain.host.temporary_names import MERGE, NEW, temporary_beside
from snapchain.image.qcow2.header import Backing

_PREFIX, _SUFFIX = ".snapchain-merge-", ".json"


class FileId(BaseModel):
    """A file by name, device and inode."""

    model_config = ConfigDict(frozen=True)

    path: Path
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileId:
        """As it is now."""
        with os_errors(path):
            status = path.lstat()
        return cls(path=path, device=status.st_dev, inode=status.st_ino)

    def still(self, path: Path | None = None) -> bool:
        """Whether `path` (its own by default) is this file."""
        try:
            status = (path or self.path).lstat()
        except FileNotFoundError:
            return False
        return (status.st_dev, status.st_ino) == (self.device, self.inode)


class MergeJournal(BaseModel):
    """One merge.

    replaced: the uppermost input, whose path the result takes; result: the file that takes it (absorb: the same)
    lowest: the lowest input, by which the merge can be asked for again; link: the backing link of the result
    remove: inputs that go, uppermost first; kept_as: a second name for `replaced`, given before the switch
    search: where images may depend on the inputs, besides the tree around the disk's top
    top: the file that the guest opens; None in a record of version 0.1: then the uppermost input
    links: symbolic links by which the disk itself opens inputs that go
    confirmed: inputs of --remove, which count as the disk's own
    """

    model_config = ConfigDict(frozen=True)

    version: Literal[2] = 2
    stage: Literal["switching", "absorbing", "committing"]
    replaced: FileId
    result: FileId
    lowest: Path
    link: Backing | None
    remove: tuple[FileId, ...] = ()
    kept_as: Path | None = None
    search: tuple[Path, ...] = ()
    top: Path | None = None
    links: tuple[Path, ...] = ()
    confirmed: tuple[Path, ...] = ()

    @property
    def path(self) -> Path:
        """Where the record lies."""
        return journal_path(self.replaced.path)


class OpenJournal:
    """A record on the disk, held by its merge until `close`; a context manager that closes and does not remove."""

    def __init__(self, journal: MergeJournal, *, durable: bool = True) -> None:
        """Write it. durable: its name too is on the disk when this returns; else with the next flush of the directory.

        It takes the place of an older one.
        """
        self.journal = journal
        self._fd = -1
        temporary = temporary_beside(journal.path, purpose=NEW)
        self._fd = files.open_new(temporary)
        try:
            with os_errors(journal.path):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.write(self._fd, journal.model_dump_json(indent=1).encode())
                os.fsync(self._fd)
                temporary.replace(journal.path)
            if durable:
                files.fsync_dir(journal.path.parent)
        except BaseException:
            self.close()
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Let go of it; fine when repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@contextmanager
def taken(journal: MergeJournal) -> Iterator[None]:
    """Hold the record of a merge that was killed. Raises Busy while that merge lives."""
    with os_errors(journal.path):
        fd = os.open(journal.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with os_errors(journal.path):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Busy(
                    "another merge of it is at work", subject=journal.replaced.path, hint="wait for its end"
                ) from error
        yield
    finally:
        os.close(fd)


def journal_path(image: Path) -> Path:
    """Where the journal of a merge into `image` lies."""
    name = image.name if len(image.name.encode()) < 200 else hashlib.sha256(image.name.encode()).hexdigest()
    return image.with_name(f"{_PREFIX}{name}{_SUFFIX}")


def sweep(image: Path) -> None:
    """Remove half-written files of killed merges into `image`. Only while nobody else merges there."""
    files.remove_temporaries(image, purpose=MERGE)
    files.remove_temporaries(journal_path(image), purpose=NEW)


def unsettled(images: Iterable[Path]) -> list[MergeJournal]:
    """The journals that killed merges have left beside any of these images (real paths).

    Raises Corrupt for one that cannot be read, InvalidInput for one that somebody else could have written.
    """
    return [_read(image, path) for image in images if (path := journal_path(image)).exists()]


def read(path: Path) -> MergeJournal:
    """The record at a path; errors as `unsettled`."""
    journal = _parsed(path)
    return _read(journal.replaced.path, path)


def is_journal(path: Path) -> bool:
    """Whether a file bears the name of a record."""
    return path.name.startswith(_PREFIX) and path.name.endswith(_SUFFIX)


def _read(image: Path, path: Path) -> MergeJournal:
    journal = _parsed(path)
    if journal.replaced.path != image or journal_path(image) != path:
        raise Corrupt("the journal of another directory's merge", subject=path, hint="was the directory moved?")
    return journal


def _parsed(path: Path) -> MergeJournal:
    with os_errors(path):
        status = path.lstat()
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
        raise InvalidInput(
            "a merge's journal that others may have written",
            subject=path,
            hint="look into it; remove it if you trust nothing in it",
        )
    try:
        return MergeJournal.model_validate_json(files.read_small(path))
    except ValidationError as error:
        raise Corrupt(f"not a merge's journal: {error.errors()[0]['msg']}", subject=path) from error
