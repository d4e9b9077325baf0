"""Strategy new-file: what survives goes into a file of its own; one rename is the switch.

Until then the inputs are only read, and others may read them too.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapchain.errors import Corrupt, SnapchainError
from snapchain.host import files
from snapchain.host.directory import Directory
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.openers import OpenFiles
from snapchain.host.os_errors import os_errors
from snapchain.host.temporary_names import MERGE, temporary_beside
from snapchain.image import ImageChain
from snapchain.image.qcow2.header import Backing
from snapchain.merge.assembly import Assembly, plan_assembly, write_assembly
from snapchain.merge.copying import SPARE, reporting, shares_extents
from snapchain.merge.inputs import check_still_allowed
from snapchain.merge.journal import FileId, OpenJournal, of_step, sweep
from snapchain.merge.prove import check_link, check_refcounts, check_unchanged, prove, reread
from snapchain.merge.request import MergeRequest
from snapchain.model.events import Notice, OnEvent
from snapchain.model.merging import Strategy

if TYPE_CHECKING:
    from snapchain.merge.step import MergeStep

_TICKS = 50_000_000
"""Nanoseconds; see model/fingerprint.py."""


def plan(view: ImageChain, first: int, backing: Backing | None, request: MergeRequest) -> NewFile:
    """Plan a new file. Raises InvalidInput for clusters that cannot hold the disk."""
    return NewFile(
        plan_assembly(view, first, backing=backing, cluster_size=request.cluster_size), shares_extents(view, first)
    )


@dataclass(frozen=True, slots=True, eq=False)
class NewFile:
    """A `Method` (merge/methods.py)."""

    work: Assembly
    shares_extents: bool
    strategy = Strategy.NEW
    unpacks = False

    @property
    def bytes_moved(self) -> int:
        """Shared or copied."""
        return self.work.bytes_moved

    @property
    def bytes_needed(self) -> int:
        """Room that the file takes while the inputs are there."""
        return (self.work.layout.metadata_bytes if self.shares_extents else self.work.bytes_needed) + SPARE

    @property
    def cluster_size(self) -> int:
        """Of the result."""
        return self.work.geometry.cluster_size

    @property
    def extended_l2(self) -> bool:
        """Of the result."""
        return self.work.geometry.extended_l2

    def make(self, step: MergeStep, old: ImageChain, *, locks: Sequence[ImageLock], on_event: OnEvent) -> OpenJournal:
        """Write, prove and switch. Before the switch nothing is changed; others may read the inputs until then."""
        sweep(step.result)
        with files.directory_of(step.result) as place:
            return _make(step, self.work, old, place, locks=locks, on_event=on_event)


def _make(
    step: MergeStep,
    work: Assembly,
    old: ImageChain,
    place: Directory,
    *,
    locks: Sequence[ImageLock],
    on_event: OnEvent,
) -> OpenJournal:
    temporary = temporary_beside(step.result, purpose=MERGE)
    journal: OpenJournal | None = None
    fd = place.create(temporary.name)
    made, replaced = os.fstat(fd), os.fstat(old.files[step.last].fileno())
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the doctor leaves it alone
        _write(step, work, old, (temporary, fd), place, on_event)
        open_files = OpenFiles()
        for lock in locks:
            lock.change(LockMode.WRITE, open_files=open_files)
        check_unchanged(old)
        check_still_allowed(old, step.first, step.last)
        journal = OpenJournal(of_step(step, old, "switching", FileId.of_open(temporary, fd)), durable=False)
        if step.kept_as is not None:
            place.link(step.result.name, step.kept_as.name)
            place.check_is(step.kept_as.name, replaced)
        place.give_name(fd, temporary.name, step.result.name, replacing=replaced)
    except BaseException:
        if journal is not None and journal.journal.result.still(step.result):
            journal.close()
            raise  # it failed past the switch: the next run finishes by the journal
        _undo(step, temporary, made, journal, place)
        raise
    finally:
        os.close(fd)
    return journal


def _undo(
    step: MergeStep, temporary: Path, made: os.stat_result, journal: OpenJournal | None, place: Directory
) -> None:
    """As it was; what cannot be undone now, the next run does."""
    with suppress(SnapchainError, OSError):
        place.remove(temporary.name, only=made)
        place.sync()
        if journal is not None:
            kept_as = step.kept_as
            if kept_as is not None and journal.journal.replaced.still(kept_as):
                files.remove(kept_as)
            files.remove(journal.journal.path)
    if journal is not None:
        journal.close()


def _write(
    step: MergeStep,
    work: Assembly,
    old: ImageChain,
    target: tuple[Path, int],
    place: Directory,
    on_event: OnEvent,
) -> None:
    """The new file, proven and on the disk."""
    temporary, fd = target
    replaced = old.files[step.last].fileno()
    with os_errors(step.result):
        files.check_standing(os.fstat(replaced), os.fstat(fd), subject=step.result)  # before anything is moved
    write_assembly(work, fd, subject=step.result, on_bytes=reporting("merge", work.bytes_moved, on_event))
    if lost := files.copy_standing(replaced, fd, subject=step.result, directory=place):
        on_event(Notice.of(step.result, lost))
    with os_errors(step.result):
        # As if written a moment ago: a fingerprint need not wait until no write can hide in the tick of the clock.
        written = os.fstat(fd).st_mtime_ns - _TICKS
        os.utime(fd, ns=(written, written))
    flush = _Flush(fd)
    try:
        with reread(temporary, fd, old.files[: step.first]) as new:
            _check_as_planned(step, new)
            check_refcounts(new.top)
            prove(old.at(step.last), new, shared=step.first, subject=step.result, on_event=on_event)
    finally:
        flush.join()
    with os_errors(step.result):
        flush.check()


def _check_as_planned(step: MergeStep, new: ImageChain) -> None:
    check_link(new, place=step.result)
    recorded = new.top.backing
    wanted = step.backing
    if (recorded and (recorded.name, recorded.format)) != (wanted and (wanted.name, wanted.format)):
        raise Corrupt("the merged file records a wrong backing file", subject=step.result)


class _Flush(threading.Thread):
    """fsync while the proof reads."""

    def __init__(self, fd: int) -> None:
        super().__init__(name="merge-flush", daemon=True)
        self._fd = fd
        self._error: OSError | None = None
        self.start()

    def run(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._error = error

    def check(self) -> None:
        """Raises OSError when it failed; then the file is not trusted."""
        if self._error is not None:
            raise self._error
