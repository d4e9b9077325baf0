"""doctor: find what killed runs have left beside images, describe it, and finish or undo it.

    a merge's journal          the merge was killed at work: it is finished, or undone, as far as it had come;
                               a live one by its guest, as long as that runs
    a new file without a name  of a merge or a snapshot that was killed early: it goes
    a second name              of an image that was about to be sealed: it goes, the image stays
    a part of a restore        of one that was killed: it goes

Everything is done under the locks that live runs hold: work under way is left alone, and reported.

Others may write to the directories.  A journal is acted on only if it bears this user's mark, or is accepted by name.
A file is removed only if it is what a run makes (a file of its own with one name), by the descriptor that was checked.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from enum import Enum
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Busy, Conflict, NotFound, SnapchainError, Unavailable
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.host.directory import Directory, same_file
from snapchain.host.files import is_leftover, remove_leftover
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.os_errors import os_errors
from snapchain.host.path_resolution import place_to_change, real_path
from snapchain.host.temporary_names import MERGE, NEW, RESTORE, SNAPSHOT, Temporary, temporary_of
from snapchain.image import scan
from snapchain.image.dependent_search import Kind as Use, find_dependents
from snapchain.image.dependents import describe
from snapchain.merge import journal as journals
from snapchain.merge.inputs import KeptFile
from snapchain.merge.journal import MergeJournal, is_journal, read
from snapchain.merge.run import recover
from snapchain.merge.settle import Settled, describe as describe_merge
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.ops import guest_doctor
from snapchain.source.notes import Notes, is_note

_UNFINISHED = {
    MERGE: "the new file of a merge",
    SNAPSHOT: "the overlay of a snapshot",
    NEW: "the journal of a merge",
    RESTORE: "the new file of a restore",
}


class Kind(Enum):
    """What was found."""

    MERGE = "interrupted-merge"
    NEW_FILE = "unfinished-file"
    SECOND_NAME = "second-name"
    UNREADABLE = "unreadable-journal"
    NOTE = "unproven-note"
    GUEST = "guest-operation"


class Finding(BaseModel):
    """Something that a killed run has left.

    path: the journal, the file or the name; image: to which it belongs, of a guest the record itself
    guest: whose operation it is; says: what happened; remedy: what the doctor does
    """

    model_config = ConfigDict(frozen=True)

    path: Path
    kind: Kind
    image: Path
    says: str
    remedy: str
    guest: str | None = None


class DoctorPlan(BaseModel):
    """What was found. directories: that were searched; image_dirs: further ones, for other users of the files.

    accepted: journals and notes that the user has read and accepts
    unseen: why the images of the guest could not be looked at, a sentence
    """

    model_config = ConfigDict(frozen=True)

    directories: tuple[Path, ...]
    findings: tuple[Finding, ...]
    image_dirs: tuple[Path, ...] = ()
    accepted: tuple[Path, ...] = ()
    unseen: str | None = None


class Treated(BaseModel):
    """A finding, and what was done about it. error: why it was left as it is.

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


def plan(
    paths: Sequence[Path],
    *,
    image_dirs: Sequence[Path] = (),
    accept: Sequence[Path] = (),
    guest: GuestAddress | None = None,
) -> DoctorPlan:
    """Find what was left; changes nothing. What killed runs owe to guests comes first, whatever the paths.

    paths: directories, or images, which stand for the directories of their chains
    image_dirs: where backing files of images may lie
    accept: journals and notes that the user has read, so that they count although nothing proves who wrote them
    guest: the only guest that is meant, with the merges of its disks; None for all
    Raises NotFound, Unsupported for a place that another user's link has chosen. Raises why the guest cannot be
    reached, when nothing was recorded for it either.
    """
    accepted = tuple(_whole(path) for path in accept)
    places = [each for path in paths for each in _directories(path, image_dirs)]
    directories = tuple(dict.fromkeys([*places, *(path.parent for path in accepted)]))
    findings = (*_in_guests(guest), *(each for place in directories for each in _look(place, accepted)))
    unseen = None
    if guest is not None:
        try:
            known = {each.path for each in findings}
            findings = (*findings, *(each for each in _merges_of(guest, accepted) if each.path not in known))
        except SnapchainError as error:
            if not findings:
                raise
            unseen = f"The images of this guest were not looked at: {error}"
    return DoctorPlan(
        directories=directories, findings=findings, image_dirs=tuple(image_dirs), accepted=accepted, unseen=unseen
    )


def _whole(path: Path) -> Path:
    """Raises NotFound for what is not there, or is neither a journal nor a note by its name."""
    whole = place_to_change(path.parent) / path.name
    if not os.path.lexists(whole):
        raise NotFound("no such file", subject=path)
    if not is_journal(whole) and not is_note(whole):
        raise NotFound("neither a merge's journal nor a layer's note", subject=path)
    return whole


def run(planned: DoctorPlan, *, on_event: OnEvent = ignore) -> DoctorReport:
    """Finish or undo each finding; one that cannot be treated now does not keep the others from it."""
    if planned.unseen is not None:
        on_event(Notice(planned.unseen))
    treated = tuple(_treat(finding, planned, on_event) for finding in planned.findings)
    return DoctorReport(directories=planned.directories, treated=treated)


def _in_guests(address: GuestAddress | None) -> Iterator[Finding]:
    for each in guest_doctor.left_behind(address):
        operation = guest_doctor.OPERATIONS[each.record.operation]
        address = each.record.address
        yield Finding(
            path=each.path,
            kind=Kind.GUEST,
            image=each.path,
            guest=each.record.guest,
            says=operation.says if address is None else f"{operation.says} ({address.option})",
            remedy=operation.remedy,
        )


def _merges_of(address: GuestAddress, accepted: Collection[Path]) -> Iterator[Finding]:
    """The interrupted merges of a guest's disks."""
    with open_guest(address) as guest:
        layers = [layer.path for disk in guest.disks() for layer in disk.chain if layer.path is not None]
    for path in dict.fromkeys(journals.journal_path(real_path(layer)) for layer in layers):
        if os.path.lexists(path):
            yield _merge(path, path in accepted)


def _directories(path: Path, image_dirs: Sequence[Path]) -> Iterator[Path]:
    whole = place_to_change(path)
    if not whole.exists():
        raise NotFound("no such file or directory", subject=path)
    if whole.is_dir():
        yield whole
        return
    yield whole.parent
    try:
        with scan(path, image_dirs=image_dirs) as chain:
            # What another user's link has chosen is not repaired for them.
            yield from (file.real_path.parent for file in chain.files if file.chosen_by is None)
    except SnapchainError:
        return  # it may not open because of what is found beside it


def _look(place: Path, accepted: Collection[Path]) -> list[Finding]:
    with os_errors(place), Directory.open(place) as directory:
        found = dict(_statuses(directory))
    merges = [_merge(place / name, place / name in accepted) for name in found if is_journal(Path(name))]
    return [
        *merges,
        *_unfinished(place, found),
        *_second_names(place, found),
        *_notes(place, accepted),
    ]


def _statuses(directory: Directory) -> Iterator[tuple[str, os.stat_result]]:
    for name in directory.names():
        try:
            yield name, directory.status(name)
        except FileNotFoundError:  # it went meanwhile
            continue


def _unfinished(place: Path, found: Mapping[str, os.stat_result]) -> Iterator[Finding]:
    """Leftovers of killed runs. A file that only has the name of one, and that no run makes, is none."""
    for name, status in found.items():
        temporary = _leftover_name(place / name)
        if temporary is None or not is_leftover(status, finished=found.get(_final(temporary) or "")):
            continue
        again = "; run the restore again from the start" if temporary.purpose == RESTORE else ""
        yield Finding(
            path=place / name,
            kind=Kind.NEW_FILE,
            image=temporary.target,
            says=f"{_UNFINISHED[temporary.purpose]} that was not finished; nothing else was changed",
            remedy=f"removes it{again}",
        )


def _leftover_name(path: Path) -> Temporary | None:
    """A name under which merges, snapshots and restores leave files when they are killed."""
    temporary = temporary_of(path)
    if temporary is None or temporary.purpose not in _UNFINISHED:
        return None
    return None if temporary.purpose == NEW and not is_journal(temporary.target) else temporary


def _final(temporary: Temporary) -> str | None:
    """The name that a run gives its file before it takes the temporary one off; others rename."""
    return temporary.target.name if temporary.purpose == RESTORE else None


def _notes(place: Path, accepted: Collection[Path]) -> Iterator[Finding]:
    """Notes of which nothing proves that this user or root wrote them, though they may have."""
    for doubt in Notes().doubts(place):
        yield Finding(
            path=doubt.note,
            kind=Kind.NOTE,
            image=place if doubt.file is None else place / doubt.file,
            says=doubt.sentence,
            remedy="makes it a note of this user" if doubt.note in accepted else "nothing: remove it, or --accept it",
        )


def _merge(path: Path, is_accepted: bool) -> Finding:  # noqa: FBT001 - a finding's own
    try:
        journal = journals.unproven(path) if is_accepted else read(path)
        says, remedy = describe_merge(journal)
    except SnapchainError as error:
        return Finding(
            path=path,
            kind=Kind.UNREADABLE,
            image=path,
            says=error.message,
            remedy=f"nothing: {error.hint or 'look into it, and remove it if you trust nothing in it'}",
        )
    return Finding(path=path, kind=Kind.MERGE, image=journal.replaced.path, says=says, remedy=remedy)


def _second_names(place: Path, found: Mapping[str, os.stat_result]) -> Iterator[Finding]:
    """Images under their own name and the one under which they were to be sealed (source/sealing.py), or kept."""
    known = [read(place / name) for name in found if is_journal(Path(name)) and _readable(place / name)]
    kept = {journal.kept_as for journal in known}
    named: dict[tuple[int, int], list[Path]] = {}
    for name, status in found.items():
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 2:
            named.setdefault((status.st_dev, status.st_ino), []).append(place / name)
    for paths in named.values():
        for image in paths:
            for path in paths:
                pattern = rf"{re.escape(image.stem)}\.(\d+|unmerged-\d+){re.escape(image.suffix)}"
                if re.fullmatch(pattern, path.name) and path not in kept:
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


def _treat(finding: Finding, planned: DoctorPlan, on_event: OnEvent) -> Treated:
    try:
        settled = _done(finding, planned, on_event)
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


def _done(finding: Finding, planned: DoctorPlan, on_event: OnEvent) -> Settled:
    is_accepted = finding.path in planned.accepted
    if finding.kind is Kind.UNREADABLE:
        read(finding.path)  # raises what is wrong with it
        raise Conflict("another file took its name meanwhile", subject=finding.path, hint="run it again")
    if not os.path.lexists(finding.path):
        return Settled([])
    if finding.kind is Kind.GUEST:
        return Settled(list(guest_doctor.treat(finding.path, on_event=on_event)))
    if finding.kind is Kind.NOTE:
        if is_accepted:
            Notes().accept(finding.path)
        return Settled([])
    if finding.kind is Kind.MERGE:
        if is_accepted:
            journals.accept(finding.path)
        return _recovered(read(finding.path), planned, on_event)
    with os_errors(finding.path), Directory.open(finding.path.parent) as directory:
        if finding.kind is Kind.SECOND_NAME:
            return _remove_second_name(finding, directory, planned.image_dirs)
        return _remove_unfinished(finding, directory, planned.image_dirs)


def _recovered(journal: MergeJournal, planned: DoctorPlan, on_event: OnEvent) -> Settled:
    """A killed merge, finished or undone: by its guest while that runs, else as one of images at rest."""
    live = journal.live
    if live is not None:
        from snapchain.guest.protocol import State
        from snapchain.merge.live_run import address_of, note_switch, settle_live

        try:
            with open_guest(address_of(live), on_event=on_event) as guest:
                if guest.state() is not State.OFF:
                    report = settle_live(guest, journal, on_event=on_event)
                    return Settled([]) if report is None else Settled(list(report.removed), report.kept)
                journal = note_switch(guest, journal)
        except (NotFound, Unavailable) as error:
            # Its QEMU is gone, or was at this moment; the locks on the images tell.
            on_event(Notice(f"{live.guest}: its images are looked at, as if it were off: {error}"))
            journal = read(journal.path) if os.path.lexists(journal.path) else journal
    return recover(journal, image_dirs=planned.image_dirs, on_event=on_event)


def _remove_second_name(finding: Finding, directory: Directory, image_dirs: Sequence[Path]) -> Settled:
    """Remove a name of an image that keeps another one."""
    with ImageLock(finding.image, LockMode.WRITE):
        one, other = directory.status(finding.path.name), directory.status(finding.image.name)
        if not same_file(one, other):
            raise Busy("another file has this name now", subject=finding.path)
        incomplete = _check_unused(finding, one, image_dirs)
        removed = directory.remove(finding.path.name, only=other)
        directory.sync()
    return Settled([finding.path] if removed else [], incomplete=incomplete)


def _remove_unfinished(finding: Finding, directory: Directory, image_dirs: Sequence[Path]) -> Settled:
    """Remove what a killed run has left, under the locks that show that it is not in use."""
    temporary = temporary_of(finding.path)
    assert temporary is not None
    name, final = finding.path.name, _final(temporary)
    with ExitStack() as locks:
        if temporary.purpose == SNAPSHOT and directory.has(finding.image.name):  # it locks the image, not the overlay
            locks.enter_context(ImageLock(finding.image, LockMode.WRITE))
        incomplete = None
        if temporary.purpose in {MERGE, SNAPSHOT}:
            incomplete = _check_unused(finding, directory.status(name), image_dirs)
            with ImageLock(finding.path, LockMode.WRITE):
                pass  # a guest that was started on it has it locked, or open
        try:
            removed = remove_leftover(directory, name, final=final)
        except Busy as error:
            if temporary.purpose != RESTORE:
                raise
            raise Busy("another snapchain is writing it", subject=finding.image, hint="wait until it ends") from error
        directory.sync()
    return Settled([finding.path] if removed else [], incomplete=incomplete)


def _check_unused(finding: Finding, status: os.stat_result, image_dirs: Sequence[Path]) -> str | None:
    """What the search could not look at. Raises Busy when something uses the file by this very name."""
    others = find_dependents(
        [finding.path], top=finding.image, own=[(status.st_dev, status.st_ino)], image_dirs=image_dirs
    )
    name = real_path(finding.path)
    users = [each for each in others.on(finding.path) if each.by == name]
    if finding.kind is Kind.NEW_FILE:  # only users that were found count: it was never in use
        users = [each for each in users if each.kind is not Use.UNREAD]
    if users:
        raise Busy(
            f"it cannot be removed: {describe(users)}", subject=finding.path, hint="move or remove its user first"
        )
    return others.incomplete


__all__ = ["DoctorPlan", "DoctorReport", "Finding", "Kind", "MergeJournal", "Treated", "plan", "run"]
