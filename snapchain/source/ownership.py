"""Whether this host may write a disk: in which epoch it does, and whether it has given the disk away.

epoch    the newest in the notes beside the files of the chain; for an overlay at a replica, the epoch of its handover
given    a mark beside each file that belongs to this disk alone, and the file made read-only

A file on which other images depend belongs to them, too: it is neither marked nor made read-only, and neither is what
lies in another directory than the top, has a second name elsewhere, or belongs to another user.  A mark counts for all
above its file, unless something on it has come to this host in a later epoch.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from snapchain.errors import Conflict, Corrupt, Unsupported
from snapchain.host.directory import MOST_MODE
from snapchain.host.files import directory_of, set_mode
from snapchain.host.os_errors import os_errors
from snapchain.host.path_resolution import Resolved, place_to_change, resolve
from snapchain.host.replica_layout import is_disk
from snapchain.host.terminal import shell_line
from snapchain.image import ImageChain, ImageFile
from snapchain.image.dependent_search import Kind, dependents_of_chain
from snapchain.model.guest_state import GuestStanding, describe_takeover
from snapchain.source.handed_over import epoch_handed, epoch_of_overlay
from snapchain.source.lineage import note_of
from snapchain.source.notes import LET_THEM, Given, LayerNote, Notes, Overlay

_WRITE_BITS = 0o222
_NO_TOKEN = "0" * 32
_NO_OVERLAY = Overlay(name="", layer="", virtual_size=0, cluster_size=0, extended_l2=False)
"""Of a failover: the host that took the disk over has made its own."""


class GivenAwayError(Conflict):
    """This host has given the disk to another one, which has it. mark: to whom, and since when."""

    def __init__(self, mark: Given, *, subject: object, hint: str) -> None:
        super().__init__(
            f"{describe_gift(mark)}: nothing here may write or send it any more", subject=subject, hint=hint
        )
        self.mark = mark


def check_not_given(chain: ImageChain, *, image: Path | None = None) -> None:
    """Raises Conflict when a file of the chain was given to another host, and what reading the notes raises.

    GivenAwayError where the disk is that other host's; else the handover is under way, or another disk's.

    image: the top, where the chain is only what is sealed below it
    """
    found = _in_force(chain, Notes(), image)
    if not found:
        return
    top, mark = _top(chain, image).real, found[0][1]
    if mark.word_of is not None:
        raise _given_by_another(mark, found[0][0])
    if found[0][0] != top:
        raise Conflict(
            f"its backing file belongs to a disk that was given away: {describe_gift(mark)}",
            subject=found[0][0],
            hint=f"if {top.name} is a disk of its own, give it a copy of that file as its backing file",
        )
    named = chain.top.path if image is None else image
    again = shell_line(["snapchain", "migrate", named, f"{mark.destination}::{mark.disk}"])
    others = "" if len(mark.together) < 2 else f" (with {', '.join(sorted({*mark.together} - {mark.disk}))} as well)"
    if mark.taken_over:
        tail = f"`{shell_line(['snapchain', 'fence', named, f'{mark.destination}::{mark.disk}'])}` shows what it holds"
        raise GivenAwayError(mark, subject=named, hint=f"{tail} that no point has; start no guest on it")
    if mark.confirmed:
        back = f"`{again} --take-back`{others} gets it back as long as no guest has written to it there"
        raise GivenAwayError(mark, subject=named, hint=back)
    raise Conflict(
        f"{describe_gift(mark)}: nothing here may write or send it any more",
        subject=named,
        hint=f"`{again} --offline`{others} finishes the handover; --take-back undoes it",
    )


def describe_gift(mark: Given) -> str:
    """To whom a disk was given, in a sentence; where another user may have written the note, only that it claims so."""
    if mark.word_of is not None:
        return f"a note of user {mark.word_of.user} says that this disk was given to another host"
    if mark.taken_over:
        return f"{mark.taken_over}; this disk is {mark.destination}::{mark.disk}"
    said = "was given" if mark.confirmed else "is being given"
    when = f"{mark.time:%Y-%m-%d %H:%M} UTC"
    return f"this disk {said} to {mark.destination}::{mark.disk}, in epoch {mark.epoch}, {when}"


def _given_by_another(mark: Given, path: Path) -> Conflict:
    """The error for a file that only another user's note claims was given away."""
    return Conflict(describe_gift(mark), subject=path, hint=remedy_against(mark))


def remedy_against(mark: Given) -> str:
    """What to do where only another user's note claims that a disk was given away."""
    assert mark.word_of is not None
    return f"if it was not, remove {mark.word_of.note}; if it was, {LET_THEM}"


def given(chain: ImageChain, notes: Notes) -> Given | None:
    """To whom the disk was given: the mark of its top, which is the first to be set and the last to be taken off.

    Raises Corrupt for a note that cannot be read beside a top that is read-only: both signs of a disk that was given.
    Raises Conflict where only another user's note claims so.
    """
    found = _in_force(chain, notes, None)
    if found and found[0][1].word_of is not None:
        raise _given_by_another(found[0][1], found[0][0])
    return found[0][1] if found and found[0][0] == chain.top.real_path else None


def mark_of(chain: ImageChain, notes: Notes) -> Given | None:
    """The uppermost mark that can be read, and counts."""
    return next((mark for _, mark in _marks(chain, notes, None)), None)


def epoch_of(chain: ImageChain, notes: Notes, *, image: Path | None = None) -> int:
    """In which epoch this host writes the disk. image: as `check_not_given` takes it."""
    return max(_epoch(path, note) for path, note in _noted(chain, notes, image))


def _top(chain: ImageChain, image: Path | None) -> Resolved:
    if image is None:
        return chain.top.resolved
    with os_errors(image):
        return resolve(image)


def _noted(chain: ImageChain, notes: Notes, image: Path | None) -> list[tuple[Path, LayerNote]]:
    """All files with their notes, uppermost first."""
    found = [(file.real_path, note_of(file, notes)) for file in reversed(chain.files)]
    top = _top(chain, image)
    return found if top.real == found[0][0] else [(top.real, notes.of(top)), *found]


def _epoch(path: Path, note: LayerNote) -> int:
    return max(note.epoch, epoch_of_overlay(path))


def _marks(chain: ImageChain, notes: Notes, image: Path | None) -> list[tuple[Path, Given]]:
    """The marks that count, uppermost first: an overlay of a file may have come back to this host since."""
    found: list[tuple[Path, Given]] = []
    above = 1
    for path, note in _noted(chain, notes, image):
        if note.given is not None and note.given.epoch >= max(above, epoch_handed(path)):
            found.append((path, note.given))
        above = max(above, _epoch(path, note))
    return found


def _in_force(chain: ImageChain, notes: Notes, image: Path | None) -> list[tuple[Path, Given]]:
    top = _top(chain, image)
    with os_errors(top.real):
        is_read_only = not top.real.stat().st_mode & _WRITE_BITS
    for fault in notes.faults([top, *(file.resolved for file in chain.files)]) if is_read_only else ():
        raise Corrupt(
            f"{fault.message}: it may have said that this disk was given to another host",
            subject=fault.subject,
            hint="make sure that no other host runs its guest before you remove that file",
        ) from fault
    return _marks(chain, notes, image)


def check_no_layer(path: Path) -> None:
    """Raises Unsupported for a layer of a replica (a real path): the replica's catalogue records what it holds."""
    if is_disk(path.parent):
        raise Unsupported(
            "it is a layer of a replica, and must stay what its catalogue says",
            subject=path,
            hint="`snapchain merge DEST::DISK` merges layers there; a guest's own image is in `active`",
        )


def note_epoch(image: Path, epoch: int) -> None:
    """Record that this host writes an image in this epoch, unless a newer epoch is recorded.

    Raises Unsupported for what is no regular file or was chosen by a link of somebody else, and what writing a small
    file raises.
    """
    path = place_to_change(image)
    if not path.is_file():
        raise Unsupported("only a regular file has notes", subject=image)
    if Notes().of(path).epoch < epoch:
        Notes().change(path, lambda note: note.model_copy(update={"epoch": max(note.epoch, epoch)}))


def check_can_be_given(chain: ImageChain, *, image_dirs: Sequence[Path] = ()) -> list[ImageFile]:
    """The files that belong to this disk alone, uppermost first. Raises Unsupported for a top that cannot be marked."""
    chain.top.check_may_be_changed()
    files = _own(chain, image_dirs)
    if not files:
        raise Unsupported(
            "only a regular file of yours that has no other name and no dependents can be marked as given away",
            subject=chain.top.path,
            hint="run as its owner or as root; remove its other names (`find -samefile`) and the images on it",
        )
    return files


def fence(
    chain: ImageChain,
    mark: Given,
    *,
    image_dirs: Sequence[Path] = (),
    top_only: bool = False,
    stays_writable: bool = False,
) -> list[Path]:
    """Mark the disk's own files as given away and make them read-only, durably; the uppermost first. May be repeated.

    top_only: only the uppermost, whose mark decides, while a guest waits for it; its owner has checked it beforehand
    stays_writable: its guest runs on it still, and may go on: QEMU opens it again to write then
    Raises Unsupported as `check_can_be_given`, Conflict where it is being given by another handover.
    """
    files = [chain.top] if top_only else check_can_be_given(chain, image_dirs=image_dirs)
    notes = Notes()
    above = 1
    for file in files:
        path = file.real_path
        mode = _mode(path)

        def marked(note: LayerNote, path: Path = path, mode: int = mode, above: int = above) -> LayerNote:
            before = note.given
            if before is not None and before.token != mark.token:
                is_followed = bool(before.taken_over and mark.taken_over and before.epoch < mark.epoch)
                if not is_followed and before.epoch >= max(above, epoch_handed(path)):
                    raise Conflict(describe_gift(before), subject=chain.top.path, hint="let that run end")
                before = before if is_followed else None
            kept = mode if before is None else before.mode
            return note.model_copy(update={"given": mark.model_copy(update={"mode": kept})})

        above = max(above, _epoch(path, notes.change(file.resolved, marked)))
        if not stays_writable:
            set_mode(path, mode & ~_WRITE_BITS)
    return [file.path for file in files]


def mark_taken_over(
    chain: ImageChain, standing: GuestStanding, *, destination: str, disk: str, image_dirs: Sequence[Path] = ()
) -> list[Path]:
    """Mark the disk's own files as taken over by another host, and make them read-only; as `fence`.

    standing: of the guest at the destination. A guest that runs on them all the same goes on.
    """
    mark = Given(
        destination=destination,
        disk=disk,
        epoch=standing.epoch,
        token=standing.token or _NO_TOKEN,
        time=standing.time or datetime.now(UTC),
        overlay=_NO_OVERLAY,
        together=(disk,),
        confirmed=True,
        started=True,
        taken_over=describe_takeover(standing)[:4096],
    )
    return fence(chain, mark, image_dirs=image_dirs)


def confirm(chain: ImageChain, token: str, *, started: bool) -> None:
    """Note that the destination has the disk, and whether its guest was started there.

    Raises Conflict where the mark of that handover is gone: it was taken back.
    """
    change = {"confirmed": True, "started": started}

    def confirmed(note: LayerNote) -> LayerNote:
        mine = note.given is not None and note.given.token == token
        return note.model_copy(update={"given": note.given.model_copy(update=change)}) if mine and note.given else note

    marked = _marked(chain, token)
    if not marked or marked[-1][0] is not chain.top:
        raise Conflict("it was taken back meanwhile, by another run", subject=chain.top.path)
    for file, _ in marked:
        Notes().change(file.resolved, confirmed)


def unfence(chain: ImageChain, token: str, *, epoch: int = 1) -> None:
    """The disk is this host's again, in an epoch: no mark, and modes as they were. May be repeated."""

    def restored(note: LayerNote) -> LayerNote:
        return note.model_copy(update={"given": None, "epoch": max(note.epoch, epoch)})

    # The top last: as long as its mark is there, an interrupted run is known, and done again.
    marked = _marked(chain, token)
    for file, _ in marked:
        file.check_may_be_changed()
    for file, mark in marked:
        set_mode(file.real_path, mark.mode & MOST_MODE or _mode(file.real_path) | stat.S_IWUSR)
        Notes().change(file.resolved, restored)


def fenced(chain: ImageChain, token: str) -> list[Path]:
    """The files that bear the mark of a handover, uppermost first."""
    return [file.path for file, _ in reversed(_marked(chain, token))]


def _marked(chain: ImageChain, token: str) -> list[tuple[ImageFile, Given]]:
    """The files that bear the mark of a handover, root first."""
    notes = Notes()
    marks = ((file, note_of(file, notes).given) for file in chain.files)
    return [(file, mark) for file, mark in marks if mark is not None and not mark.word_of and mark.token == token]


def _mode(path: Path) -> int:
    with directory_of(path) as directory:
        return stat.S_IMODE(directory.status(path.name).st_mode)


def _own(chain: ImageChain, image_dirs: Sequence[Path]) -> list[ImageFile]:
    """The files, uppermost first, that are nothing but this chain's."""
    others = dependents_of_chain(chain, image_dirs=image_dirs)
    own: list[ImageFile] = []
    for file in reversed(chain.files):
        elsewhere = file.real_path.parent != chain.top.real_path.parent
        if elsewhere or file.chosen_by or others.on(file.path, Kind.CONTENT) or not _is_ours(file):
            break
        own.append(file)
    return own


def _is_ours(file: ImageFile) -> bool:
    """Whether it is a regular file that this user may change the mode of, with no name in another directory."""
    path = file.real_path
    with directory_of(path) as directory, os.scandir(directory.opened()) as entries:
        status = directory.status(path.name)
        names = sum(entry.inode() == status.st_ino for entry in entries)
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= names and os.geteuid() in (0, status.st_uid)
