"""The record of a guest's move to this host, in the journal, and the files that were made for it.

Written before anything is made: whoever finds the guest `moving` finds out what became of the move.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from snapchain.errors import Corrupt, NotFound
from snapchain.guest import journal
from snapchain.host import files
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.process_identity import Identity, boot_id, own_identity
from snapchain.replica.stream.guest_messages import HandedDisk, MovingDomain

OPERATION = "incoming"
"""Of the journal's records."""


class MadeFile(BaseModel):
    """A file that this guest will write to. device, inode: of the file, whatever has its path later."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    path: Path
    device: int
    inode: int


class MoveDetails(BaseModel):
    """What the journal records of a move."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    token: str
    by: str
    root: Path
    disks: tuple[HandedDisk, ...]
    overlays: tuple[MadeFile, ...]
    nvram: tuple[MadeFile, ...] = ()
    directory: Path
    stage: Literal["prepared", "started", "ran"]
    qemu: Identity | None = None
    domain: MovingDomain | None = None


def record_of(token: str) -> journal.Found | None:
    """The record of the move with this token; None for none."""
    records, _ = journal.find(operation=OPERATION)
    return next((each for each in records if each.record.details.get("token") == token), None)


def details_of(found: journal.Found) -> MoveDetails:
    """Raises Corrupt for what is no record of a move."""
    try:
        return MoveDetails.model_validate(found.record.details)
    except ValidationError as error:
        raise Corrupt("not the record of a move", subject=found.path, hint="remove it") from error


def write(details: MoveDetails, *, guest: str, before: journal.Found | None, qmp: Path | None = None) -> journal.Found:
    """Record a move, in the place of its record `before`. qmp: QEMU's monitor, if that is not as before"""
    record = journal.InFlight(
        operation=OPERATION,
        guest=guest,
        domain=None if details.domain is None else details.domain.name,
        qmp=str(qmp) if qmp is not None else None if before is None else before.record.qmp,
        process=details.qemu,
        boot=boot_id(),
        writer=own_identity(),
        time=datetime.now(UTC),
        details=details.model_dump(mode="json"),
    )
    if before is None:
        return journal.Found(journal.write(record), record)
    journal.replace(before.path, record)
    return journal.Found(before.path, record)


def made_file(path: Path) -> MadeFile:
    """The file that has this path now."""
    with files.directory_of(path) as place:
        status = place.status(path.name)
    return MadeFile(path=path, device=status.st_dev, inode=status.st_ino)


def remove_made(made: MadeFile) -> None:
    """Remove it, unless another file has its path now: what was mirrored into it is no guest's."""
    with suppress(NotFound), files.directory_of(made.path) as place:
        if not place.has(made.path.name):
            return
        status = place.status(made.path.name)
        if (status.st_dev, status.st_ino) != (made.device, made.inode):
            return
        with ImageLock(made.path, LockMode.WRITE):
            place.remove(made.path.name, only=status)
        place.sync()
