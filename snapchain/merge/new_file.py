"""Strategy new-file: what survives goes into a file of its own; one rename is the switch.

The inputs are only read until then, and anybody else may read them too.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from snapchain.errors import Corrupt, SnapchainError
from snapchain.host import files
from snapchain.host.directory import Directory
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.openers import OpenFiles
from snapchain.host.os_errors import os_errors
from snapchain.host.temporary_names import MERGE, temporary_beside
from snapchain.image import ImageChain
from snapchain.image.assemble import Assembly, run as assemble
from snapchain.image.dependent_search import search_directories
from snapchain.image.reread import check_link, check_refcounts, reread
from snapchain.merge.inputs import check_still_allowed, links_to
from snapchain.merge.journal import FileId, MergeJournal, OpenJournal, sweep
from snapchain.merge.plan import MergePlan
from snapchain.merge.prove import check_unchanged, prove
from snapchain.model.events import Notice, OnEvent, Progress

_TICKS = 50_000_000
"""Nanoseconds; see model/fingerprint.py."""


def make(
    planned: MergePlan, work: Assembly, old: ImageChain, *, locks: Sequence[ImageLock], on_event: OnEvent
) -> OpenJournal:
    """Write, prove and switch; what is left to do is in the journal. Before the switch nothing was changed."""
    sweep(planned.result)
    with files.directory_of(planned.result) as place:
        return _make(planned, work, old, place, locks=locks, on_event=on_event)


def _make(
    planned: MergePlan,
    work: Assembly,
    old: ImageChain,
    place: Directory,
    *,
    locks: Sequence[ImageLock],
    on_event: OnEvent,
) -> OpenJournal:
    temporary = temporary_beside(planned.result, purpose=MERGE)
    journal: OpenJournal | None = None
    fd = place.create(temporary.name)
    made, replaced = os.fstat(fd), os.fstat(old.files[planned.last].fileno())
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the doctor leaves it alone
        _write(planned, work, old, (temporary, fd), place, on_event)
        open_files = OpenFiles()
        for lock in locks:
            lock.change(LockMode.WRITE, open_files=open_files)
        check_unchanged(old)
        check_still_allowed(old, planned.first, planned.last)
        journal = OpenJournal(_record(planned, old, temporary, fd), durable=False)
        if planned.kept_as is not None:
            place.link(planned.result.name, planned.kept_as.name)
            place.check_is(planned.kept_as.name, replaced)
        place.give_name(fd, temporary.name, planned.result.name, replacing=replaced)
    except BaseException:
        if journal is not None and journal.journal.result.still(planned.result):
            journal.close()
            raise  # it failed past the switch: the next run finishes by the journal
        _undo(planned, temporary, made, journal, place)
        raise
    finally:
        os.close(fd)
    return journal


def _undo(
    planned: MergePlan, temporary: Path, made: os.stat_result, journal: OpenJournal | None, place: Directory
) -> None:
    """As it was; what cannot be undone now, the next run does."""
    with suppress(SnapchainError, OSError):
        place.remove(temporary.name, only=made)
        place.sync()
        if journal is not None:
            kept_as = planned.kept_as
            if kept_as is not None and journal.journal.replaced.still(kept_as):
                files.remove(kept_as)
            files.remove(journal.journal.path)
    if journal is not None:
        journal.close()


def _record(planned: MergePlan, old: ImageChain, temporary: Path, fd: int) -> MergeJournal:
    return MergeJournal(
        stage="switching",
        replaced=FileId.of(planned.result),
        result=FileId.of_open(temporary, fd),
        lowest=old.files[planned.first].real_path,
        link=planned.backing,
        remove=tuple(FileId.of(path) for path in planned.remove),
        kept_as=planned.kept_as,
        search=search_directories(old, planned.image_dirs),
        top=old.top.path,
        links=links_to(old, planned.remove),
        confirmed=planned.confirmed,
    )


def _write(
    planned: MergePlan,
    work: Assembly,
    old: ImageChain,
    target: tuple[Path, int],
    place: Directory,
    on_event: OnEvent,
) -> None:
    """The new file, proven and on the disk."""
    temporary, fd = target
    total, done = work.bytes_moved, 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_event(Progress("merge", done, total))

    replaced = old.files[planned.last].fileno()
    with os_errors(planned.result):
        files.check_standing(os.fstat(replaced), os.fstat(fd), subject=planned.result)  # before anything is moved
    on_event(Progress("merge", 0, total))
    assemble(work, fd, subject=planned.result, on_bytes=on_bytes)
    if lost := files.copy_standing(replaced, fd, subject=planned.result, directory=place):
        on_event(Notice.of(planned.result, lost))
    with os_errors(planned.result):
        # As if written a moment ago: whoever looks at it need not wait until no write can hide in the clock's tick.
        written = os.fstat(fd).st_mtime_ns - _TICKS
        os.utime(fd, ns=(written, written))
    flush = _Flush(fd)
    try:
        with reread(temporary, fd, old.files[: planned.first]) as new:
            _check_as_planned(planned, new)
            check_refcounts(new.top)
            prove(old.at(planned.last), new, shared=planned.first, subject=planned.result, on_event=on_event)
    finally:
        flush.join()
    with os_errors(planned.result):
        flush.check()


def _check_as_planned(planned: MergePlan, new: ImageChain) -> None:
    check_link(new, place=planned.result)
    recorded = new.top.backing
    wanted = planned.backing
    if (recorded and (recorded.name, recorded.format)) != (wanted and (wanted.name, wanted.format)):
        raise Corrupt("the merged file records a wrong backing file", subject=planned.result)


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
