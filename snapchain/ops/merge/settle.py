"""The end of a merge: inputs go, and the journal; after a merge that was killed, the rest of it or its undoing."""

from __future__ import annotations

import os
from pathlib import Path

from snapchain.host import files
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.openers import OpenFiles
from snapchain.host.os_errors import os_errors
from snapchain.image import inplace
from snapchain.image.references import children
from snapchain.ops.merge.journal import FileId, MergeJournal, OpenJournal, leftover_ids, sweep, taken
from snapchain.ops.merge.linked import linked
from snapchain.ops.notes import Notes


def finish(journal: OpenJournal) -> list[Path]:
    """Remove the inputs, which the caller has locked, and then the journal; the inputs that are gone.

    Others may read an input up to the switch, and so make an overlay on it: what such a one needs stays.
    """
    with journal:
        needed = _needed(journal.journal.remove, journal.journal.search)
        removed = _remove(journal.journal, [entry.path for entry in journal.journal.remove if entry.path not in needed])
    renamed = [journal.journal.lowest] if journal.journal.stage == "committing" else []
    for path in (*removed, *renamed):
        sweep(path)  # what killed merges into it have left
    for directory in {path.parent for path in removed}:
        Notes().sweep(directory)
    return removed


def settle(journal: MergeJournal) -> list[Path]:
    """Finish a killed merge whose switch was done, else undo it; the inputs that were removed now.

    Inputs that another image has come to need stay. Undoing a commit leaves the lowest input as far as it had come:
    the chain reads as before, that file alone does not. Raises Busy when somebody has an input open, or merges it.
    """
    with taken(journal):
        if journal.stage == "absorbing":
            removed = _settle_absorbing(journal)
        elif switched(journal):
            removed = _remove_unneeded(journal)
        else:
            if journal.stage == "committing" and journal.result.still():
                _make_exact(journal.result.path)
            if journal.kept_as is not None and journal.replaced.still() and journal.replaced.still(journal.kept_as):
                files.remove(journal.kept_as)
            removed = _remove(journal, [])
        sweep(journal.replaced.path)
    Notes().sweep(journal.replaced.path.parent)
    return removed


def take_up(journal: MergeJournal) -> None:
    """Before a killed commit is done again: reference counts made exact. Errors as `settle`.

    The record stays until that of the new run takes its place: killed in between, nothing else would tell that the
    lowest input alone reads wrong.
    """
    with taken(journal):
        if journal.result.still():
            _make_exact(journal.result.path)


def switched(journal: MergeJournal) -> bool:
    """Whether the result has taken its place."""
    if not journal.result.still(journal.replaced.path):
        return False
    if journal.stage != "absorbing":
        return True
    with os_errors(journal.replaced.path):
        fd = os.open(journal.replaced.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return linked(fd, journal.link, subject=journal.replaced.path)
    finally:
        os.close(fd)


def _settle_absorbing(journal: MergeJournal) -> list[Path]:
    if not journal.replaced.still():
        return _remove(journal, [])  # somebody has put another file there: this merge is nobody's any more
    done = switched(journal)
    _make_exact(journal.replaced.path)
    return _remove_unneeded(journal) if done else _remove(journal, [])


def _make_exact(path: Path) -> None:
    """The reference counts of an image that a merge was adding to."""
    with ImageLock(path, LockMode.WRITE):
        with os_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            inplace.settle(fd, subject=path)
        finally:
            os.close(fd)


def _remove_unneeded(journal: MergeJournal) -> list[Path]:
    needed = _needed(journal.remove, journal.search)
    open_files = OpenFiles()
    gone: list[Path] = []
    for entry in journal.remove:
        if entry.still() and entry.path not in needed:
            # One at a time: each is only needed by the one before it.
            with ImageLock(entry.path, LockMode.WRITE, open_files=open_files):
                files.remove(entry.path)
            gone.append(entry.path)
    _remove(journal, [])
    return gone


def _remove(journal: MergeJournal, paths: list[Path]) -> list[Path]:
    """The inputs' names are gone from the disk before the journal's is."""
    for path in paths:
        with os_errors(path):
            path.unlink(missing_ok=True)
    for directory in {path.parent for path in paths} - {journal.path.parent}:
        files.fsync_dir(directory)
    files.remove(journal.path)
    return paths


def _needed(inputs: tuple[FileId, ...], search: tuple[Path, ...]) -> set[Path]:
    """Inputs under another image, and the inputs below those (`inputs`: uppermost first)."""
    own = {(entry.device, entry.inode) for entry in inputs} | leftover_ids(entry.path.parent for entry in inputs)
    found = children([path for path in search if path.is_dir()], of=[entry.path for entry in inputs], besides=own)
    needed: set[Path] = set()
    for entry in inputs:
        if needed or entry.path in found:
            needed.add(entry.path)
    return needed
