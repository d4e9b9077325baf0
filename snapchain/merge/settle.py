"""The end of a merge: inputs go, and the journal; after a merge that was killed, the rest of it or its undoing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import Busy, Conflict
from snapchain.host import files
from snapchain.host.directory import Directory
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.openers import OpenFiles
from snapchain.host.os_errors import os_errors, translated
from snapchain.image.dependent_search import find_dependents
from snapchain.merge import amendment
from snapchain.merge.inputs import KeptFile, classify
from snapchain.merge.journal import FileId, Look, MergeJournal, OpenJournal, linked, look, look_at, sweep, taken
from snapchain.source.notes import Notes


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
        removed = _remove(journal.journal, gone)
    for directory in {path.parent for path in removed}:
        Notes().sweep(directory)
    if journal.journal.stage == "committing":
        removed.append(journal.journal.lowest)  # it has another name now
    for path in removed:
        sweep(path)  # what killed merges into it have left
    return Settled(removed, kept, incomplete)


def settle(journal: MergeJournal, *, image_dirs: Sequence[Path] = ()) -> Settled:
    """Finish a killed merge whose switch was done, else undo it.

    Inputs that are not the disk's own, or have other users by now, stay. Undoing a commit leaves the lowest input
    partly written: the chain reads as before, but that file alone does not.

    image_dirs: where to look for users of the inputs, besides what the journal names
    Raises Busy when an input is open or being merged elsewhere.
    """
    journal = journal.model_copy(update={"search": (*journal.search, *image_dirs)})
    if journal.live is not None:
        from snapchain.merge.live_settle import settle_at_rest

        return settle_at_rest(journal)
    with taken(journal):
        if journal.stage == "absorbing":
            settled = _settle_absorbing(journal)
        elif switched(journal):
            settled = remove_inputs(journal)
        else:
            if journal.stage == "committing" and journal.result.still():
                _make_exact(journal.result)
            if journal.kept_as is not None and journal.replaced.still():
                _remove_name(journal.replaced.whatever_written(), journal.kept_as)
            settled = Settled(_remove(journal, []))
        sweep(journal.replaced.path)
    Notes().sweep(journal.replaced.path.parent)
    return settled


def take_up(journal: MergeJournal) -> None:
    """Before a killed commit is done again: reference counts made exact. Errors as `settle`.

    The record stays until that of the new run takes its place: after a kill in between, nothing else would show that
    the lowest input alone reads wrong.
    """
    with taken(journal):
        if journal.result.still():
            _make_exact(journal.result)


def switched(journal: MergeJournal) -> bool:
    """Whether the result has taken its place."""
    if not journal.result.still(journal.replaced.path):
        return False
    if journal.live is not None:
        from snapchain.merge.live_settle import is_done

        return is_done(journal, journal.live)
    if journal.stage != "absorbing":
        return True
    with opened_entry(journal.result) as fd:
        return linked(fd, journal.link, subject=journal.replaced.path)


def describe(journal: MergeJournal) -> tuple[str, str]:
    """(what happened, what `recover` does)."""
    if journal.live is not None:
        from snapchain.merge.live_settle import describe_live

        return describe_live(journal, journal.live)
    count = len(journal.remove)
    if switched(journal):
        return (
            f"a merge ({journal.stage}) whose result is in place; {count} merged files are still there",
            f"removes {', '.join(entry.path.name for entry in journal.remove) or 'nothing but the journal'}",
        )
    if journal.stage == "committing":
        return (
            f"a merge into {journal.lowest.name} that was killed; the chain reads as before, that file alone does not",
            "merges again, to the end",
        )
    return (
        f"a merge ({journal.stage}) that was killed before its result took its place; the image reads as before",
        "undoes it",
    )


@contextmanager
def opened_entry(entry: FileId, *, writing: bool = False) -> Iterator[int]:
    """A descriptor of a file that the journal names. Raises Conflict when another one has its name."""
    with os_errors(entry.path), Directory.open(entry.path.parent) as directory:
        fd = directory.open_file(entry.path.name, writing=writing)
    try:
        if not entry.is_at(look_at(fd)):
            raise Conflict("another file took its name", subject=entry.path)
        yield fd
    finally:
        os.close(fd)


def _settle_absorbing(journal: MergeJournal) -> Settled:
    if not journal.replaced.still():
        return Settled(_remove(journal, []))  # another file has that name now: the merge is void
    done = switched(journal)
    _make_exact(journal.replaced)
    return remove_inputs(journal) if done else Settled(_remove(journal, []))


def _make_exact(entry: FileId) -> None:
    """The reference counts of an image that a merge was adding to."""
    with ImageLock(entry.path, LockMode.WRITE), opened_entry(entry, writing=True) as fd:
        amendment.settle(fd, subject=entry.path)


def remove_inputs(journal: MergeJournal) -> Settled:
    """Remove the inputs of a merge that is done, as far as nothing uses them, and its record.

    Raises Busy where one of them is open elsewhere.
    """
    with ExitStack() as locks:
        open_files = OpenFiles()
        in_use: dict[Path, Busy] = {}
        for entry in journal.remove:
            if entry.still():
                try:
                    locks.enter_context(ImageLock(entry.path, LockMode.WRITE, open_files=open_files))
                except Busy as error:  # matters only if it is to go
                    in_use[entry.path] = error
        gone, kept, incomplete = _judged(journal)
        for entry in gone:
            if entry.path in in_use:
                raise in_use[entry.path]
        return Settled(_remove(journal, gone), kept, incomplete)


def _judged(journal: MergeJournal) -> tuple[list[FileId], tuple[KeptFile, ...], str | None]:
    """Which of the inputs may go, uppermost first, as things are now, which stay, and what could not be looked at."""
    found = [(entry, seen) for entry in journal.remove if (seen := _look(entry)) is not None and entry.is_at(seen)]
    # One that was written to since may be in use; what lies below it is its backing file.
    count = next((place for place, (entry, seen) in enumerate(found) if not entry.is_untouched(seen)), len(found))
    entries, stay = [entry for entry, _ in found[:count]], [entry.path for entry, _ in found[count:]]
    top = journal.top or journal.replaced.path
    others = find_dependents(
        [*(entry.path for entry in entries), *journal.links],
        top=top,
        own=[(seen.status.st_dev, seen.status.st_ino) for _, seen in found[:count]],
        image_dirs=journal.search,
    )
    gone, kept = classify([entry.path for entry in entries], top=top, others=others, confirmed=journal.confirmed)
    written = [KeptFile(path=path, reason=_why_written(path, stay[0])) for path in stay]
    return [entry for entry in entries if entry.path in gone], (*kept, *written), others.incomplete


def _why_written(path: Path, uppermost: Path) -> str:
    return "it was written to after the merge" if path == uppermost else f"{uppermost.name} may depend on it"


def _look(entry: FileId) -> Look | None:
    """The file that has the name of an input now; None if there is none."""
    try:
        with Directory.open(entry.path.parent) as directory:
            return look(directory, entry.path.name)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise translated(error, entry.path) from error


def _remove(journal: MergeJournal, entries: Sequence[FileId]) -> list[Path]:
    """Remove the inputs durably. Only then may the journal be removed."""
    removed = [entry.path for entry in entries if _remove_name(entry, entry.path)]
    for directory in {path.parent for path in removed} - {journal.path.parent}:
        files.fsync_dir(directory)
    files.remove(journal.path)
    return removed


def _remove_name(entry: FileId, path: Path) -> bool:
    """Remove a name of a file that the journal names, while it is that very file. Whether it was removed."""
    with os_errors(path), Directory.open(path.parent) as directory:
        try:
            found = look(directory, path.name)
        except FileNotFoundError:
            return False
        is_that = stat.S_ISREG(found.status.st_mode) and entry.is_untouched(found)
        return is_that and directory.remove(path.name, only=found.status)
