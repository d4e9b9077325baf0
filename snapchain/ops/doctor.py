"""doctor: finds what killed runs have left beside images, says what it is, and finishes or undoes it.

    a merge's journal          the merge was killed at work: it is finished, or undone, as far as it had come
    a new file without a name  of a merge or a snapshot that was killed early: it goes
    a second name              of an image that was about to be sealed: it goes, the image stays
    a part of a restore        of one that was killed: it goes

Everything under the locks that live runs hold: what somebody is at work on is left alone, and said.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Busy, NotFound, SnapchainError
from snapchain.host import files
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.os_errors import os_errors
from snapchain.host.temporary_names import MERGE, NEW, SNAPSHOT, temporary_of
from snapchain.image import scan
from snapchain.image.dependents import describe
from snapchain.ops.dependents import Kind as Use, find_dependents
from snapchain.ops.events import Notice, OnEvent, ignore
from snapchain.ops.merge import recover
from snapchain.ops.merge.inputs import KeptFile
from snapchain.ops.merge.journal import MergeJournal, is_journal, read
from snapchain.ops.merge.settle import Settled
from snapchain.ops.output import is_part, meant_for, remove_part

_UNFINISHED = {
    MERGE: "the new file of a merge",
    SNAPSHOT: "the overlay of a snapshot",
    NEW: "the journal of a merge",
}


class Kind(Enum):
    """What was found."""

    MERGE = "interrupted-merge"
    NEW_FILE = "unfinished-file"
    SECOND_NAME = "second-name"
    UNREADABLE = "unreadable-journal"


class Finding(BaseModel):
    """Something that a killed run has left.

    path: the journal, the file or the name; image: whose it is; says: what happened; remedy: what the doctor does
    """

    model_config = ConfigDict(frozen=True)

    path: Path
    kind: Kind
    image: Path
    says: str
    remedy: str


class DoctorPlan(BaseModel):
    """What was found. directories: searched; image_dirs: searched for other users of the files, too."""

    model_config = ConfigDict(frozen=True)

    directories: tuple[Path, ...]
    findings: tuple[Finding, ...]
    image_dirs: tuple[Path, ...] = ()


class Treated(BaseModel):
    """A finding, and what became of it. error: why it was left as it is.

    removed: files that went with it; kept: files that a merge would have removed, each with the reason why it stays
    incomplete: what the search for other users of these files could not look at, a sentence
    """

    model_config = ConfigDict(frozen=True)

    finding: Finding
    done: bool
    removed: tuple[Path, ...] = ()
    kept: tuple[KeptFile, ...] = ()
    error: str | None = None
    hint: str | None = None
    incomplete: str | None = None


class DoctorReport(BaseModel):
    """What was done. well: nothing is left to do."""

    model_config = ConfigDict(frozen=True)

    directories: tuple[Path, ...]
    treated: tuple[Treated, ...]

    @property
    def well(self) -> bool:
        """Whether everything that was found is done."""
        return all(each.done for each in self.treated)


def plan(paths: Sequence[Path], *, image_dirs: Sequence[Path] = ()) -> DoctorPlan:
    """Look; changes nothing. paths: directories, or images, which stand for the directories of their chains.

    image_dirs: where backing files of images may lie. Raises NotFound.
    """
    directories = tuple(dict.fromkeys(found for path in paths for found in _directories(path, image_dirs)))
    findings = tuple(each for place in directories for each in _look(place))
    return DoctorPlan(directories=directories, findings=findings, image_dirs=tuple(image_dirs))


def run(planned: DoctorPlan, *, on_event: OnEvent = ignore) -> DoctorReport:
    """Finish or undo each finding; one that cannot be treated now does not keep the others from it."""
    treated = tuple(_treat(finding, planned.image_dirs, on_event) for finding in planned.findings)
    return DoctorReport(directories=planned.directories, treated=treated)


def _directories(path: Path, image_dirs: Sequence[Path]) -> Iterator[Path]:
    whole = Path(os.path.realpath(path))
    if not whole.exists():
        raise NotFound("no such file or directory", subject=path)
    if whole.is_dir():
        yield whole
        return
    yield whole.parent
    try:
        with scan(path, image_dirs=image_dirs) as chain:
            yield from (file.real_path.parent for file in chain.files)
    except SnapchainError:
        return  # what cannot be opened may be so because of what is found beside it


def _look(directory: Path) -> Iterator[Finding]:
    with os_errors(directory):
        entries = sorted(directory.iterdir())
    for path in entries:
        if is_journal(path):
            yield _merge(path)
    for path in entries:
        found = temporary_of(path)
        what = None if found is None else _UNFINISHED.get(found.purpose)
        if found is None or what is None or (found.purpose == NEW and not is_journal(found.target)):
            continue
        yield Finding(
            path=path,
            kind=Kind.NEW_FILE,
            image=found.target,
            says=f"{what} that was not finished; nothing else was changed",
            remedy="removes it",
        )
    yield from _second_names(entries)
    yield from _parts(entries)


def _parts(entries: Sequence[Path]) -> Iterator[Finding]:
    """Leftovers of killed restores; a file that another user has put under such a name does not count."""
    for path in entries:
        target = meant_for(path)
        try:
            if target is None or not is_part(path, path.lstat(), of_anybody=os.geteuid() == 0):
                continue
        except FileNotFoundError:
            continue
        yield Finding(
            path=path,
            kind=Kind.NEW_FILE,
            image=target,
            says="the new file of a restore that was not finished; nothing else was changed",
            remedy="removes it; run the restore again from the start",
        )


def _merge(path: Path) -> Finding:
    try:
        journal = read(path)
    except SnapchainError as error:
        return Finding(
            path=path,
            kind=Kind.UNREADABLE,
            image=path,
            says=error.message,
            remedy=f"nothing: {error.hint or 'look into it, and remove it if you trust nothing in it'}",
        )
    says, remedy = recover.described(journal)
    return Finding(path=path, kind=Kind.MERGE, image=journal.replaced.path, says=says, remedy=remedy)


def _second_names(entries: Sequence[Path]) -> Iterator[Finding]:
    """Images under their own name and the one under which they were to be sealed (ops/snapshot.py), or kept."""
    journals = [read(path) for path in entries if is_journal(path) and _readable(path)]
    named: dict[tuple[int, int], list[Path]] = {}
    for path in entries:
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 2:
            named.setdefault((status.st_dev, status.st_ino), []).append(path)
    for paths in named.values():
        for image in paths:
            for path in paths:
                pattern = rf"{re.escape(image.stem)}\.(\d+|unmerged-\d+){re.escape(image.suffix)}"
                if re.fullmatch(pattern, path.name) and path not in {journal.kept_as for journal in journals}:
                    yield Finding(
                        path=path,
                        kind=Kind.SECOND_NAME,
                        image=image,
                        says=f"a second name of {image.name}, given by a run that was killed before it replaced that",
                        remedy="removes this name; the image keeps its own",
                    )


def _readable(path: Path) -> bool:
    try:
        read(path)
    except SnapchainError:
        return False
    return True


def _treat(finding: Finding, image_dirs: Sequence[Path], on_event: OnEvent) -> Treated:
    try:
        settled = _done(finding, image_dirs, on_event)
    except SnapchainError as error:
        return Treated(finding=finding, done=False, error=str(error), hint=error.hint)
    if settled.incomplete is not None:
        on_event(Notice(settled.incomplete))
    return Treated(
        finding=finding,
        done=True,
        removed=tuple(settled.removed),
        kept=settled.kept,
        incomplete=settled.incomplete,
    )


def _done(finding: Finding, image_dirs: Sequence[Path], on_event: OnEvent) -> Settled:
    if finding.kind is Kind.UNREADABLE:
        read(finding.path)  # raises what is wrong with it
    if not os.path.lexists(finding.path):
        return Settled([])
    if finding.kind is Kind.MERGE:
        return recover.recover(read(finding.path), image_dirs=image_dirs, on_event=on_event)
    if finding.kind is Kind.SECOND_NAME:
        with ImageLock(finding.image, LockMode.WRITE):
            one, other = finding.path.lstat(), finding.image.lstat()
            if (one.st_dev, one.st_ino) != (other.st_dev, other.st_ino):
                raise Busy("another file has this name now", subject=finding.path)
            return _remove_unused(finding, image_dirs)
    if meant_for(finding.path) is not None:
        return Settled([finding.path] if remove_part(finding.path, of_anybody=os.geteuid() == 0) else [])
    with _free(finding):
        return _remove_unused(finding, image_dirs)


def _remove_unused(finding: Finding, image_dirs: Sequence[Path]) -> Settled:
    """Remove a name of a file. Raises Busy when something uses the file by this very name."""
    status = finding.path.lstat()
    others = find_dependents(
        [finding.path], top=finding.image, own=[(status.st_dev, status.st_ino)], image_dirs=image_dirs
    )
    name = Path(os.path.realpath(finding.path))
    users = [each for each in others.on(finding.path) if each.by == name]
    if finding.kind is Kind.NEW_FILE:  # only users that were found count: it was never in use
        users = [each for each in users if each.kind is not Use.UNREAD]
    if users:
        raise Busy(
            f"it cannot be removed: {describe(users)}", subject=finding.path, hint="move or remove its user first"
        )
    files.remove(finding.path)
    return Settled([finding.path], incomplete=others.incomplete)


@contextmanager
def _free(finding: Finding) -> Iterator[None]:
    """While nobody is at work on a new file: a merge locks it, a snapshot the image that it is for."""
    found = temporary_of(finding.path)
    if found is not None and found.purpose == SNAPSHOT and finding.image.exists():
        with ImageLock(finding.image, LockMode.WRITE):
            yield
        return
    with os_errors(finding.path):
        fd = os.open(finding.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy("a run is at work on it", subject=finding.path, hint="wait for its end") from error
        yield
    finally:
        os.close(fd)


__all__ = ["DoctorPlan", "DoctorReport", "Finding", "Kind", "MergeJournal", "Treated", "plan", "run"]
