"""The end of a merge: inputs go, and the journal; after a merge that was killed, the rest of it or its undoing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import Busy
from snapchain.host import files
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.openers import OpenFiles
from snapchain.host.os_errors import os_errors
from snapchain.image import inplace
from snapchain.ops.dependents import find_dependents
from snapchain.ops.merge.inputs import KeptFile, fate
from snapchain.ops.merge.journal import MergeJournal, OpenJournal, sweep, taken
from snapchain.ops.merge.linked import linked
from snapchain.ops.notes import Notes


@dataclass(frozen=True, slots=True)
class Settled:
    """The inputs of a merge that were removed, and those that stay, with the reason.

    incomplete: what the search for their other users could not look at, a sentence
    """

    removed: list[Path]
    kept: tuple[KeptFile, ...] = ()
    incomplete: str | None = None


def finish(journal: OpenJournal) -> Settled:
    """Remove the inputs without other users, and then the journal. The caller has them locked."""
    with journal:
        gone, kept, incomplete = _judged(journal.journal)
        removed = _remove(journal.journal, list(gone))
    renamed = [journal.journal.lowest] if journal.journal.stage == "committing" else []
    for path in (*removed, *renamed):
        sweep(path)  # what killed merges into it have left
    for directory in {path.parent for path in removed}:
        Notes().sweep(directory)
    return Settled(removed, kept, incomplete)


def settle(journal: MergeJournal, *, image_dirs: Sequence[Path] = ()) -> Settled:
    """Finish a killed merge whose switch was done, else undo it.

    Inputs that are not the disk's own, or have other users by now, stay. Undoing a commit leaves the lowest
    input as far as it had come: the chain reads as before, that file alone does not.

    image_dirs: where to look for users of the inputs, besides what the journal names
    Raises Busy when somebody has an input open, or merges it.
    """
    journal = journal.model_copy(update={"search": (*journal.search, *image_dirs)})
    with taken(journal):
        if journal.stage == "absorbing":
            settled = _settle_absorbing(journal)
        elif switched(journal):
            settled = _remove_unneeded(journal)
        else:
            if journal.stage == "committing" and journal.result.still():
                _make_exact(journal.result.path)
            if journal.kept_as is not None and journal.replaced.still() and journal.replaced.still(journal.kept_as):
                files.remove(journal.kept_as)
            settled = Settled(_remove(journal, []))
        sweep(journal.replaced.path)
    Notes().sweep(journal.replaced.path.parent)
    return settled


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


def _settle_absorbing(journal: MergeJournal) -> Settled:
    if not journal.replaced.still():
        return Settled(_remove(journal, []))  # another file has that name now: the merge is void
    done = switched(journal)
    _make_exact(journal.replaced.path)
    return _remove_unneeded(journal) if done else Settled(_remove(journal, []))


def _make_exact(path: Path) -> None:
    """The reference counts of an image that a merge was adding to."""
    with ImageLock(path, LockMode.WRITE):
        with os_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            inplace.settle(fd, subject=path)
        finally:
            os.close(fd)


def _remove_unneeded(journal: MergeJournal) -> Settled:
    with ExitStack() as locks:
        open_files = OpenFiles()
        in_use: dict[Path, Busy] = {}
        for entry in journal.remove:
            if entry.still():
                try:
                    locks.enter_context(ImageLock(entry.path, LockMode.WRITE, open_files=open_files))
                except Busy as error:  # no matter if it stays
                    in_use[entry.path] = error
        gone, kept, incomplete = _judged(journal)
        for path in gone:
            if path in in_use:
                raise in_use[path]
        return Settled(_remove(journal, list(gone)), kept, incomplete)


def _judged(journal: MergeJournal) -> tuple[tuple[Path, ...], tuple[KeptFile, ...], str | None]:
    """Which of the inputs may go, uppermost first, as things are now, which stay, and what could not be looked at."""
    entries = [entry for entry in journal.remove if entry.still()]
    paths = [entry.path for entry in entries]
    top = journal.top or journal.replaced.path
    others = find_dependents(
        [*paths, *journal.links],
        top=top,
        own=[(entry.device, entry.inode) for entry in entries],
        image_dirs=journal.search,
    )
    return *fate(paths, top=top, others=others, confirmed=journal.confirmed), others.incomplete


def _remove(journal: MergeJournal, paths: list[Path]) -> list[Path]:
    """The inputs' names are gone from the disk before the journal's is."""
    for path in paths:
        with os_errors(path):
            path.unlink(missing_ok=True)
    for directory in {path.parent for path in paths} - {journal.path.parent}:
        files.fsync_dir(directory)
    files.remove(journal.path)
    return paths
