"""Whether this host may write a disk: in which epoch it does, and whether it has given the disk away.

epoch    the newest that a note beside a file of the chain tells; for an overlay at a replica, that of its handover
given    a mark beside each file that belongs to this disk alone, and the file made read-only

A file on which other images stand belongs to them, too: it is neither marked nor made read-only.
"""

from __future__ import annotations

import shlex
import stat
from collections.abc import Sequence
from pathlib import Path

from snapchain.errors import Conflict, Unsupported
from snapchain.host.files import fsync_file
from snapchain.host.os_errors import os_errors
from snapchain.image import ImageChain, ImageFile
from snapchain.image.references import Unread, children
from snapchain.ops.lineage import note_of
from snapchain.ops.notes import Given, LayerNote, Notes
from snapchain.replica.epochs import epoch_of_overlay

_WRITE_BITS = 0o222


def check_not_given(chain: ImageChain, notes: Notes | None = None) -> None:
    """Raises Conflict when a file of the chain was given to another host, and what reading the notes raises."""
    notes = notes or Notes()
    found = given(chain, notes)
    if found is None:
        return
    again = shlex.join(["snapchain", "migrate", str(chain.top.path), f"{found.destination}::{found.disk}"])
    raise Conflict(
        f"{told(found)}: nothing here may write or send it any more",
        subject=chain.top.path,
        hint=f"`{again} --take-back` gets it back as long as no guest has written to it there"
        if found.confirmed
        else f"`{again} --offline` finishes that, with --take-back it is undone",
    )


def told(mark: Given) -> str:
    """To whom a disk was given, as a sentence."""
    said = "was given" if mark.confirmed else "is being given"
    when = f"{mark.time:%Y-%m-%d %H:%M} UTC"
    return f"this disk {said} to {mark.destination}::{mark.disk}, in epoch {mark.epoch}, {when}"


def given(chain: ImageChain, notes: Notes) -> Given | None:
    """To whom the disk was given, as the uppermost file tells that was.

    Raises Corrupt for a note that cannot be read beside a top that is read-only: both signs of a disk that was given.
    """
    top = chain.top.real_path
    with os_errors(top):
        is_read_only = not top.stat().st_mode & _WRITE_BITS
    for fault in notes.faults(file.real_path for file in chain.files) if is_read_only else ():
        raise fault
    return mark_of(chain, notes)


def mark_of(chain: ImageChain, notes: Notes) -> Given | None:
    """The uppermost mark that can be read."""
    marks = (note_of(file, notes).given for file in reversed(chain.files))
    return next((mark for mark in marks if mark is not None), None)


def epoch_of(chain: ImageChain, notes: Notes) -> int:
    """In which epoch this host writes the disk."""
    noted = [note_of(file, notes).epoch for file in chain.files]
    handed = [epoch_of_overlay(file.real_path) for file in chain.files]
    return max(*noted, *handed)


def fence(chain: ImageChain, mark: Given, *, image_dirs: Sequence[Path] = ()) -> list[Path]:
    """Mark the disk's own files as given away and make them read-only, durably; the uppermost first. May be repeated.

    Raises Unsupported for a top that is no regular file.
    """
    files = _own(chain, image_dirs)
    if not files or files[0] is not chain.top:
        raise Unsupported(
            "only an image that is a regular file, and on which no other one stands, can be marked as given away",
            subject=chain.top.path,
            hint="copy it into a file, or remove what stands on it",
        )
    notes = Notes()
    for file in files:
        path = file.real_path
        with os_errors(path):
            mode = stat.S_IMODE(path.stat().st_mode)

        def marked(note: LayerNote, mode: int = mode) -> LayerNote:
            before = note.given
            mine = before is not None and before.token == mark.token
            kept = before.mode if before is not None and mine else mode
            return note.model_copy(update={"given": mark.model_copy(update={"mode": kept})})

        notes.change(path, marked)
        with os_errors(path):
            path.chmod(mode & ~_WRITE_BITS)
        fsync_file(path)
    return [file.path for file in files]


def confirm(chain: ImageChain, token: str, *, started: bool) -> None:
    """Note that the destination has the disk, and whether its guest was started there."""
    change = {"confirmed": True, "started": started}

    def confirmed(note: LayerNote) -> LayerNote:
        return note.model_copy(update={"given": note.given and note.given.model_copy(update=change)})

    for file, _ in _marked(chain, token):
        Notes().change(file.real_path, confirmed)


def unfence(chain: ImageChain, token: str, *, epoch: int) -> None:
    """The disk is this host's again, in an epoch: no mark, and modes as they were. May be repeated."""

    def restored(note: LayerNote) -> LayerNote:
        return note.model_copy(update={"given": None, "epoch": max(note.epoch, epoch)})

    # The top last: as long as its mark is there, an interrupted run is known, and done again.
    for file, mark in _marked(chain, token):
        with os_errors(file.real_path):
            file.real_path.chmod(mark.mode)
        Notes().change(file.real_path, restored)


def _marked(chain: ImageChain, token: str) -> list[tuple[ImageFile, Given]]:
    """The files that bear the mark of a handover, root first."""
    notes = Notes()
    marks = ((file, note_of(file, notes).given) for file in chain.files)
    return [(file, mark) for file, mark in marks if mark is not None and mark.token == token]


def _own(chain: ImageChain, image_dirs: Sequence[Path]) -> list[ImageFile]:
    """The files, uppermost first, on which nothing but this chain stands."""
    besides = {file.device for file in chain.files}
    beside = [parent for file in chain.files for parent in (file.path.parent, file.real_path.parent)]
    standing = children(
        [*beside, *(directory for directory in image_dirs if directory.is_dir())],
        of=[file.real_path for file in chain.files],
        besides=besides,
        unread=Unread.PASSED_OVER,
    )
    own: list[ImageFile] = []
    for file in reversed(chain.files):
        if file.real_path in standing:
            break
        if file.real_path.is_file():
            own.append(file)
    return own
