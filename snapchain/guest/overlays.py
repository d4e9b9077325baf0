"""Overlay files for a guest that runs: made and recorded before its disks are switched to them, or removed again.

    temporary file, fsync -> journal's record with the inode of each -> final names, fsync

What a killed run leaves is judged by the guest's block graph: the overlays are in its chains, all of them, since they
were switched to in one transaction; or none is, and then they are closed and removed.  A file is removed only when it
is the very file that was made, holds nothing, and nobody has it open.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from snapchain.errors import Conflict, Corrupt, NotFound, SnapchainError, Unavailable
from snapchain.guest import journal
from snapchain.guest.protocol import Guest
from snapchain.guest.quiesce import THAW, settle_thaw
from snapchain.host import files
from snapchain.host.directory import Directory, open_behind
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.os_errors import os_errors
from snapchain.host.path_resolution import real_path
from snapchain.host.temporary_names import SNAPSHOT, temporary_beside
from snapchain.image import ImageFile
from snapchain.image.backing import Allowed, Place
from snapchain.image.file import Format
from snapchain.image.physical import RunBudget
from snapchain.image.qcow2.header import Backing, read_header
from snapchain.image.qcow2.write import write_overlay
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.source.lineage import seal

OPERATION = "snapshot"
"""Of the journal's records of overlays."""


@dataclass(frozen=True, slots=True)
class WantedOverlay:
    """overlay: its path, beside the file that it seals; virtual_size: bytes; sealed_format: qcow2 or raw"""

    overlay: Path
    sealed: Path
    sealed_format: Format
    virtual_size: int


class _Made(BaseModel):
    """An overlay of the journal's record. inode: of the file that was made, whatever has its path later."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    overlay: Path
    device: int
    inode: int
    sealed: Path


class _Details(BaseModel):
    """What the journal records of a snapshot."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    overlays: tuple[_Made, ...]
    labels: tuple[str, ...] = ()


def make(
    guest: Guest, wanted: Sequence[WantedOverlay], labels: Sequence[str], *, on_event: OnEvent = ignore
) -> journal.Found:
    """Make the overlays, all or none; the journal's record of them. labels: of the files that they will seal.

    Raises Conflict for a name that was taken meanwhile, Unavailable for a full disk.
    """
    with ExitStack() as stack:
        new = [_Overlay.make(each, stack, on_event) for each in wanted]
        details = _Details(overlays=tuple(each.made for each in new), labels=tuple(labels))
        values: dict[str, JsonValue] = details.model_dump(mode="json")
        record = journal.begun(guest, OPERATION, **values)
        found = journal.Found(journal.write(record), record)
        try:
            for each in new:
                each.name()
        except BaseException:
            _remove(details)
            journal.remove(found.path)
            raise
    return found


def check(overlay: Path, sealed: Path, sealed_format: Format) -> None:
    """Raises Conflict unless the overlay, as our own parser reads it, has the sealed file as its backing file.

    Only its header is read: the guest writes to it already.
    """
    fd = open_behind(overlay)
    try:
        recorded = read_header(fd, subject=overlay).backing
    finally:
        os.close(fd)
    if recorded is not None and recorded.format == sealed_format:
        whole = Place.of(overlay)
        found = Allowed(whole, [sealed.parent]).place(recorded, overlay=whole.path)
        if files.identity_of(found.real) == files.identity_of(sealed):
            return
    raise Conflict("the new overlay does not have the sealed file as its backing file", subject=overlay)


def note_sealed(paths: Sequence[Path], labels: Sequence[str], time: datetime, on_event: OnEvent) -> None:
    """Note when files were sealed; worth a failure only where labels were asked for."""
    for path in paths:
        try:
            seal(real_path(path), labels=labels, time=time)
        except SnapchainError as error:
            if labels:
                raise
            on_event(Notice(f"the time of the snapshot is not noted: {error}"))


@dataclass(frozen=True, slots=True)
class _Overlay:
    place: Directory
    fd: int
    temporary: str
    made: _Made

    @classmethod
    def make(cls, wanted: WantedOverlay, stack: ExitStack, on_event: OnEvent) -> _Overlay:
        """A finished overlay under a temporary name, on the disk; at the end of `stack` that name is gone."""
        place = stack.enter_context(files.directory_of(wanted.overlay))
        temporary = temporary_beside(wanted.overlay, purpose=SNAPSHOT).name
        active = open_behind(wanted.sealed)
        stack.callback(os.close, active)
        with os_errors(wanted.overlay):
            fd = place.create(temporary)
            stack.callback(os.close, fd)
            status = os.fstat(fd)
            stack.callback(_drop, place, temporary, status)
            header = read_header(active, subject=wanted.sealed) if wanted.sealed_format == "qcow2" else None
            write_overlay(
                fd,
                wanted.virtual_size,
                # Both lie in one directory, so the name is right however the overlay is reached, also after a move.
                Backing(real_path(wanted.sealed).name, wanted.sealed_format),
                cluster_size=header.cluster_size if header else None,
                extended_l2=bool(header and header.extended_l2),
                subject=wanted.overlay,
            )
            if lost := files.copy_standing(active, fd, subject=wanted.sealed, directory=place):
                on_event(Notice.of(wanted.overlay, lost))
            os.fsync(fd)
        made = _Made(overlay=wanted.overlay, device=status.st_dev, inode=status.st_ino, sealed=wanted.sealed)
        return cls(place, fd, temporary, made)

    def name(self) -> None:
        """Raises Conflict when another program took the name."""
        with os_errors(self.made.overlay):
            self.place.give_name(self.fd, self.temporary, self.made.overlay.name, replacing=None)


def _drop(place: Directory, name: str, status: os.stat_result) -> None:
    with suppress(OSError):
        place.remove(name, only=status)


def settle(guest: Guest, *, on_event: OnEvent = ignore) -> None:
    """Finish what killed runs owe this guest: thaw first of all, then the overlays. Raises what its calls raise.

    A thaw that its agent does not answer is a Notice: the guest's disks can be snapshotted all the same.
    """
    for found in journal.abandoned(guest=guest.name, process=guest.process(), operations=[THAW]):
        try:
            settle_thaw(found)
        except SnapchainError as error:
            on_event(Notice.of(guest.name, f"a thaw that an earlier run owes could not be done: {error.message}"))
    for found in journal.abandoned(guest=guest.name, process=guest.process(), operations=[OPERATION]):
        settle_by_graph(guest, found, on_event=on_event)


def settle_by_graph(guest: Guest, found: journal.Found, *, on_event: OnEvent = ignore) -> tuple[Path, ...]:
    """Judge a snapshot that did not come to its end by the guest's graph, and finish or undo it. The files removed.

    Raises Corrupt for a record of another shape, and what the guest's calls raise: then nothing is removed.
    """
    details = _details(found)
    chains = [[layer.identity for layer in disk.chain] for disk in guest.disks()]
    in_use = {each for chain in chains for each in chain}
    removed: tuple[Path, ...] = ()
    if any((each.device, each.inode) in in_use for each in details.overlays):
        note_sealed([each.sealed for each in details.overlays], details.labels, found.record.time, on_event)
    else:
        sealed = {files.identity_of(each.sealed) for each in details.overlays}
        if any(None in chain and sealed & set(chain[:-1]) for chain in chains):
            raise Unavailable("what lies on the sealed file cannot be told from the block graph", subject=guest.name)
        guest.release([each.overlay for each in details.overlays])
        removed = _remove(details)
    journal.remove(found.path)
    return removed


def settle_files(found: journal.Found) -> tuple[Path, ...]:
    """As `settle_by_graph` when its QEMU has ended: an overlay that nobody wrote to or has open is removed."""
    removed = _remove(_details(found))
    journal.remove(found.path)
    return removed


def settle_or_leave(guest: Guest, made: journal.Found, on_event: OnEvent) -> None:
    """As `settle_by_graph`, after a failure: what cannot be judged now is left, and a Notice says so."""
    try:
        settle_by_graph(guest, made, on_event=on_event)
    except SnapchainError as error:
        words = f"what the snapshot has begun is left for the next run: {error.message}"
        on_event(Notice.of(guest.name, words))


def _details(found: journal.Found) -> _Details:
    try:
        return _Details.model_validate(found.record.details)
    except ValidationError as error:
        raise Corrupt("not the record of a snapshot", subject=found.path, hint="remove it") from error


def _remove(details: _Details) -> tuple[Path, ...]:
    """Remove overlays that are still what was made: that very file, empty, and locked by nobody."""
    removed: list[Path] = []
    for each in details.overlays:
        with suppress(NotFound), files.directory_of(each.overlay) as place:
            if not place.has(each.overlay.name):
                continue
            status = place.status(each.overlay.name)
            if (status.st_dev, status.st_ino) != (each.device, each.inode) or not _is_untouched(each):
                continue
            with ImageLock(each.overlay, LockMode.WRITE):
                if place.remove(each.overlay.name, only=status):
                    removed.append(each.overlay)
            place.sync()
    return tuple(removed)


def _is_untouched(made: _Made) -> bool:
    """Whether an overlay holds nothing, as it was made."""
    whole = Place.of(made.overlay)
    with ImageFile(whole, open_behind(made.overlay), format="qcow2", budget=RunBudget()) as overlay:
        return not overlay.extents.data_bytes and not overlay.extents.zero_bytes
