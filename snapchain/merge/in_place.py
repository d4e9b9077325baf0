"""Strategies absorb and commit: what is missing is added to one of the inputs, and only then is it the result.

The journal is on the disk before the first write.  Absorb: the uppermost input's view never changes, so whatever
happens is undone by making its reference counts exact.  Commit: the lowest input is overwritten only where upper ones
hide it, so the chain reads as before; but that input by itself does not, and so the work is done again, to its end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from snapchain.errors import Conflict, Corrupt, SnapchainError
from snapchain.host import files
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.openers import OpenFiles
from snapchain.image import ImageChain, ImageFile
from snapchain.image.dependent_search import search_directories
from snapchain.merge import amendment
from snapchain.merge.amendment import Amendment
from snapchain.merge.inputs import check_still_allowed, links_to
from snapchain.merge.journal import FileId, MergeJournal, OpenJournal, linked, sweep
from snapchain.merge.prove import check_link, check_refcounts, check_unchanged, prove, reread
from snapchain.merge.step import MergeStep
from snapchain.model.events import Notice, OnEvent, Progress
from snapchain.model.merging import Strategy


def make(
    planned: MergeStep, work: Amendment, old: ImageChain, *, locks: Sequence[ImageLock], on_event: OnEvent
) -> OpenJournal:
    """Fill, prove and switch; what is left to do is in the journal."""
    open_files = OpenFiles()
    for lock in locks:
        lock.change(LockMode.WRITE, open_files=open_files)
    check_unchanged(old)
    check_still_allowed(old, planned.first, planned.last)
    sweep(planned.result)
    if planned.strategy is Strategy.COMMIT:
        standing = [os.fstat(file.fileno()) for file in (old.files[planned.last], work.file)]
        files.check_standing(standing[0], standing[1], subject=planned.result)
    with _opened(work.file) as fd:
        journal = OpenJournal(_record(planned, work, old))
        try:
            _fill(planned, work, old, fd, on_event)
            if planned.strategy is Strategy.ABSORB:
                amendment.relink(work, fd, subject=planned.result)
            amendment.settle(fd, subject=work.file.path)
            with reread(work.file.real_path, fd, old.files[: planned.first]) as new:
                check_link(new, place=work.file.real_path)
                check_refcounts(new.top)
            if planned.strategy is Strategy.COMMIT:
                _take_place(planned, work, old, fd, on_event)
        except BaseException:
            _undo(planned, journal, fd)
            raise
    return journal


def _fill(planned: MergeStep, work: Amendment, old: ImageChain, fd: int, on_event: OnEvent) -> None:
    total, done = work.bytes_moved, 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_event(Progress("merge", done, total))

    on_event(Progress("merge", 0, total))
    below, view = old.files[: planned.first], old.at(planned.last)

    def check(pending: amendment.Pending) -> None:
        with amendment.shadow(work.file, fd, pending, below=below) as new:
            prove(view, new, shared=planned.first, subject=planned.result, on_event=on_event)
            shown.append(new.top)
        check_unchanged(old, but=work.target)

    shown: list[ImageFile] = []
    amendment.fill(work, fd, subject=planned.result, on_bytes=on_bytes, prove=check)
    if planned.strategy is Strategy.COMMIT:
        amendment.relink(work, fd, subject=planned.result)
    with reread(work.file.real_path, fd, below) as new:
        if not amendment.same_map(new.top, shown[0]):
            raise Corrupt("the tables on the disk are not those that were proven", subject=planned.result)


def _take_place(planned: MergeStep, work: Amendment, old: ImageChain, fd: int, on_event: OnEvent) -> None:
    """The lowest input under the path of the uppermost."""
    lowest, replaced = work.file, old.files[planned.last].fileno()
    with files.directory_of(planned.result) as directory:
        if lost := files.copy_standing(replaced, fd, subject=planned.result, directory=directory):
            on_event(Notice.of(planned.result, lost))
        os.fsync(fd)
        directory.give_name(fd, lowest.real_path.name, planned.result.name, replacing=os.fstat(replaced))


def _undo(planned: MergeStep, journal: OpenJournal, fd: int) -> None:
    """Absorb, not relinked: as it was. Else the journal stays, and the next run or the doctor goes on from there."""
    with suppress(SnapchainError, OSError):
        if planned.strategy is Strategy.ABSORB and not linked(fd, journal.journal.link, subject=planned.result):
            amendment.settle(fd, subject=planned.result)
            files.remove(journal.journal.path)
    journal.close()


def _record(planned: MergeStep, work: Amendment, old: ImageChain) -> MergeJournal:
    commits = planned.strategy is Strategy.COMMIT
    result = FileId.of(work.file.real_path)
    return MergeJournal(
        stage="committing" if commits else "absorbing",
        replaced=FileId.of(planned.result),
        result=result,
        lowest=old.files[planned.first].real_path,
        link=planned.backing,
        remove=tuple(FileId.of(path) for path in planned.remove if path != result.path),
        search=search_directories(old, planned.image_dirs),
        top=old.top.path,
        links=links_to(old, planned.remove),
        confirmed=planned.confirmed,
    )


@contextmanager
def _opened(file: ImageFile) -> Iterator[int]:
    """For writing; the very file that was scanned."""
    fd = files.open_file(file.real_path, writing=True)
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != file.device:
            raise Conflict("another file took its name", subject=file.path)
        yield fd
    finally:
        os.close(fd)
