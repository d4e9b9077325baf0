"""The end of a merge: inputs go, and the journal; after a merge that was killed, the rest of it or its undoing."""

from __future__ import annotations

from pathlib import Path

from snapchain.host import files
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.openers import OpenFiles
from snapchain.host.os_errors import os_errors
from snapchain.image.references import children
from snapchain.ops.merge.journal import FileId, MergeJournal, OpenJournal, sweep, taken
from snapchain.ops.notes import Notes


def finish(journal: OpenJournal) -> list[Path]:
    """Remove the inputs, which the caller has locked since it saw that nobody needs them, and then the journal."""
    with journal:
        removed = _remove(journal.journal, [entry.path for entry in journal.journal.remove])
    for directory in {path.parent for path in removed}:
        Notes().sweep(directory)
    return removed


def settle(journal: MergeJournal) -> list[Path]:
    """Finish a killed merge whose switch was done, else undo it; the inputs that were removed now.

    Inputs that another image has come to need stay. Raises Busy when somebody has an input open, or merges it.
    """
    with taken(journal):
        if switched(journal):
            removed = _remove_unneeded(journal)
        else:
            if journal.kept_as is not None and journal.replaced.still() and journal.replaced.still(journal.kept_as):
                files.remove(journal.kept_as)
            removed = _remove(journal, [])
        sweep(journal.replaced.path)
    Notes().sweep(journal.replaced.path.parent)
    return removed


def switched(journal: MergeJournal) -> bool:
    """Whether the result has taken its place."""
    return journal.result.still(journal.replaced.path)


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
    own = {(entry.device, entry.inode) for entry in inputs}
    found = children([path for path in search if path.is_dir()], of=[entry.path for entry in inputs], besides=own)
    needed: set[Path] = set()
    for entry in inputs:
        if needed or entry.path in found:
            needed.add(entry.path)
    return needed
