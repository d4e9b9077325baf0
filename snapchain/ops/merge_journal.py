"""What a merge of local files leaves for the next run when it is killed: a small record beside the result.

    building    the result grows under a temporary name; nothing else was touched      undo: remove it
    switching   the result is whole; its rename is next, or was just done               see by the inode

The record is on the disk before the step that it names.  Settling it is idempotent.  It names files to remove, so
one that somebody else could have planted is not believed: it must be ours, and its files what they were.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from snapchain.errors import Corrupt, InvalidInput
from snapchain.host import files
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.openers import OpenFiles
from snapchain.host.os_errors import os_errors
from snapchain.image.references import children

TEMPORARY = "merge"
"""The purpose in the temporary names of results."""


class FileId(BaseModel):
    """A file by name, device and inode."""

    model_config = ConfigDict(frozen=True)

    path: Path
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileId:
        """As it is now."""
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
    """One merge. replaced: the uppermost input, whose path the result takes; remove: inputs, uppermost first;
    kept_as: a second name for `replaced`, given before the switch; search: where images may stand on the inputs.
    """

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    stage: Literal["building", "switching"] = "building"
    replaced: FileId
    temporary: Path
    result: FileId | None = None
    remove: tuple[FileId, ...] = ()
    kept_as: Path | None = None
    search: tuple[Path, ...] = ()

    def save(self) -> None:
        """Put it on the disk."""
        files.write_atomically(journal_path(self.replaced.path), self.model_dump_json(indent=1).encode())

    @property
    def switched(self) -> bool:
        """Whether the result has taken its place."""
        return self.result is not None and self.result.still(self.replaced.path)

    def settle(self) -> list[Path]:
        """Undo the merge, or finish it when its result is in place; the inputs that were removed now.

        Inputs that another image has come to need stay. Raises Busy when somebody has an input open.
        """
        removed: list[Path] = []
        if self.switched:
            needed = _needed(self.remove, self.search)
            open_files = OpenFiles()
            for input_file in self.remove:
                if input_file.still() and input_file.path not in needed:
                    with ImageLock(input_file.path, LockMode.WRITE, open_files=open_files):
                        files.remove(input_file.path)
                    removed.append(input_file.path)
        else:
            files.remove(self.temporary)
            if self.kept_as is not None and self.replaced.still() and self.replaced.still(self.kept_as):
                files.remove(self.kept_as)
        sweep(self.replaced.path)
        files.remove(journal_path(self.replaced.path))
        return removed


def journal_path(image: Path) -> Path:
    """Where the journal of a merge into `image` lies."""
    name = image.name if len(image.name.encode()) < 200 else hashlib.sha256(image.name.encode()).hexdigest()
    return image.with_name(f".snapchain-merge-{name}.json")


def sweep(image: Path) -> None:
    """Remove half-written files of killed merges into `image`. Only while nobody else merges there."""
    files.remove_temporaries(image, purpose=TEMPORARY)
    files.remove_temporaries(journal_path(image), purpose=files.NEW)


def unsettled(images: Iterable[Path]) -> list[MergeJournal]:
    """The journals that killed merges have left beside any of these images (real paths).

    Raises Corrupt for one that cannot be read, InvalidInput for one that somebody else could have written.
    """
    return [_read(image, path) for image in images if (path := journal_path(image)).exists()]


def _read(image: Path, path: Path) -> MergeJournal:
    with os_errors(path):
        status = path.lstat()
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
        raise InvalidInput(
            "a merge's journal that others may have written",
            subject=path,
            hint="look into it; remove it if you trust nothing in it",
        )
    try:
        journal = MergeJournal.model_validate_json(files.read_small(path))
    except ValidationError as error:
        raise Corrupt(f"not a merge's journal: {error.errors()[0]['msg']}", subject=path) from error
    if journal.replaced.path != image or journal.temporary.parent != image.parent:
        raise Corrupt("the journal of another directory's merge", subject=path, hint="was the directory moved?")
    return journal


def _needed(inputs: tuple[FileId, ...], search: tuple[Path, ...]) -> set[Path]:
    """Inputs under another image, and the inputs below those (`inputs`: uppermost first)."""
    own = {(entry.device, entry.inode) for entry in inputs}
    found = children(search, of=[entry.path for entry in inputs], besides=own)
    needed: set[Path] = set()
    for entry in inputs:
        if needed or entry.path in found:
            needed.add(entry.path)
    return needed
