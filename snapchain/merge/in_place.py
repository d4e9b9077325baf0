"""Strategies absorb and commit: one of the inputs gets the data that it lacks, and becomes the result.

The journal is on the disk before the first write.  Absorb: the uppermost input's view never changes, so whatever
happens is undone by making its reference counts exact.  Commit: the lowest input is overwritten only where upper ones
hide it, so the chain reads as before; but that input by itself does not, and so the work is done again, to its end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from snapchain.errors import Conflict, Corrupt, SnapchainError
from snapchain.host import files
from snapchain.host.locks import ImageLock
from snapchain.image import ImageChain, ImageFile
from snapchain.image.qcow2.header import Backing
from snapchain.merge import amendment
from snapchain.merge.amendment import Amendment
from snapchain.merge.copying import SPARE, reporting, shares_extents
from snapchain.merge.inputs import check_still_allowed
from snapchain.merge.journal import FileId, OpenJournal, linked, of_step, sweep
from snapchain.merge.prove import check_link, check_refcounts, check_unchanged, prove, reread
from snapchain.merge.request import MergeRequest
from snapchain.model.events import Notice, OnEvent
from snapchain.model.merging import Strategy

if TYPE_CHECKING:
    from snapchain.merge.step import MergeStep


def plan_absorb(view: ImageChain, first: int, backing: Backing | None, _request: MergeRequest) -> InPlace:
    """Plan that the uppermost input takes in what the lower ones show through it. Errors as `amendment.plan_absorb`."""
    return InPlace(Strategy.ABSORB, amendment.plan_absorb(view, first, backing=backing), shares_extents(view, first))


def plan_commit(view: ImageChain, first: int, backing: Backing | None, _request: MergeRequest) -> InPlace:
    """Plan that the lowest input takes in what the upper ones hold. Errors as `amendment.plan_commit`."""
    return InPlace(Strategy.COMMIT, amendment.plan_commit(view, first, backing=backing), shares_extents(view, first))


@dataclass(frozen=True, slots=True, eq=False)
class InPlace:
    """A `Method` (merge/methods.py)."""

    strategy: Strategy
    work: Amendment
    shares_extents: bool

    @property
    def bytes_moved(self) -> int:
        """Shared or copied."""
        return self.work.bytes_moved

    @property
    def bytes_needed(self) -> int:
        """Room that the changed file takes more than now."""
        return self.work.bytes_needed + SPARE

    @property
    def unpacks(self) -> bool:
        """Whether compressed clusters do not stay compressed."""
        return self.work.bytes_unpacked > 0

    @property
    def cluster_size(self) -> int:
        """Of the result."""
        return self.work.cluster_size

    @property
    def extended_l2(self) -> bool:
        """Of the result."""
        return self.work.file.header is not None and self.work.file.header.extended_l2

    def make(self, step: MergeStep, old: ImageChain, *, locks: Sequence[ImageLock], on_event: OnEvent) -> OpenJournal:
        """Fill, prove and switch. The inputs are locked against everybody already."""
        del locks
        return _make(step, self.work, old, on_event)


def _make(step: MergeStep, work: Amendment, old: ImageChain, on_event: OnEvent) -> OpenJournal:
    check_unchanged(old)
    check_still_allowed(old, step.first, step.last)
    sweep(step.result)
    if step.strategy is Strategy.COMMIT:
        standing = [os.fstat(file.fileno()) for file in (old.files[step.last], work.file)]
        files.check_standing(standing[0], standing[1], subject=step.result)
    with _opened(work.file) as fd:
        stage: Literal["committing", "absorbing"] = "committing" if step.strategy is Strategy.COMMIT else "absorbing"
        journal = OpenJournal(of_step(step, old, stage, FileId.of(work.file.real_path)))
        try:
            _fill(step, work, old, fd, on_event)
            if step.strategy is Strategy.ABSORB:
                amendment.relink(work, fd, subject=step.result)
            amendment.settle(fd, subject=work.file.path)
            with reread(work.file.real_path, fd, old.files[: step.first]) as new:
                check_link(new, place=work.file.real_path)
                check_refcounts(new.top)
            if step.strategy is Strategy.COMMIT:
                _take_place(step, work, old, fd, on_event)
        except BaseException:
            _undo(step, journal, fd)
            raise
    return journal


def _fill(step: MergeStep, work: Amendment, old: ImageChain, fd: int, on_event: OnEvent) -> None:
    below, view = old.files[: step.first], old.at(step.last)

    def check(pending: amendment.Pending) -> None:
        with amendment.shadow(work.file, fd, pending, below=below) as new:
            prove(view, new, shared=step.first, subject=step.result, on_event=on_event)
            shown.append(new.top)
        check_unchanged(old, but=work.target)

    shown: list[ImageFile] = []
    amendment.fill(work, fd, subject=step.result, on_bytes=reporting("merge", work.bytes_moved, on_event), prove=check)
    if step.strategy is Strategy.COMMIT:
        amendment.relink(work, fd, subject=step.result)
    with reread(work.file.real_path, fd, below) as new:
        if not amendment.same_map(new.top, shown[0]):
            raise Corrupt("the tables on the disk are not those that were proven", subject=step.result)


def _take_place(step: MergeStep, work: Amendment, old: ImageChain, fd: int, on_event: OnEvent) -> None:
    """The lowest input under the path of the uppermost."""
    lowest, replaced = work.file, old.files[step.last].fileno()
    with files.directory_of(step.result) as directory:
        if lost := files.copy_standing(replaced, fd, subject=step.result, directory=directory):
            on_event(Notice.of(step.result, lost))
        os.fsync(fd)
        directory.give_name(fd, lowest.real_path.name, step.result.name, replacing=os.fstat(replaced))


def _undo(step: MergeStep, journal: OpenJournal, fd: int) -> None:
    """Undo an absorb before its switch. Otherwise the journal stays, and the next run or the doctor continues."""
    with suppress(SnapchainError, OSError):
        if step.strategy is Strategy.ABSORB and not linked(fd, journal.journal.link, subject=step.result):
            amendment.settle(fd, subject=step.result)
            files.remove(journal.journal.path)
    journal.close()


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
