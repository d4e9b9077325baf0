"""How an instant restore stands: how much of its point the image has, how long the rest takes, what it depends on."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from snapchain.errors import NotFound, SnapchainError
from snapchain.host.directory import open_behind
from snapchain.host.openers import OpenFiles
from snapchain.image import ImageFile
from snapchain.image.backing import Place
from snapchain.image.physical import RunBudget
from snapchain.ops.instant import server
from snapchain.ops.instant.finish import lacking_bytes
from snapchain.ops.instant.record import InstantRecord, images_in, record_of

State = Literal["copying", "in use", "served", "not served", "missing"]
_COPIER = "qemu-storage-d"


class InstantStatus(BaseModel):
    """How an image stands.

    state: copying: by us; in use: a guest has it open; served: it can be used; not served: it cannot be opened, run
    the restore again; missing: its file is gone, and its record is left
    depends_on: the point; hold: tag of the point's hold, None where it has none
    copied_bytes: of virtual_size, as far as they are written to the image's tables; None where these cannot be read now
    seconds_left: as long as the copying went since it began last, None where nothing is copied
    """

    model_config = ConfigDict(frozen=True)

    image: str
    state: State
    depends_on: str
    guest: str | None
    hold: str | None
    virtual_size: int
    copied_bytes: int | None
    percent: float | None
    seconds_left: float | None


class InstantStatusReport(BaseModel):
    """Of several images."""

    model_config = ConfigDict(frozen=True)

    instant: tuple[InstantStatus, ...]


def instant_images(path: Path) -> tuple[Path, ...]:
    """The images that a path means: the file, or those of a directory that are not finished. () for anything else."""
    if path.is_file() or record_of(path) is not None:
        return (path,)
    return tuple(images_in(path)) if path.is_dir() else ()


def instant_status(images: tuple[Path, ...], *, now: datetime | None = None) -> InstantStatusReport:
    """How they stand; changes nothing. Raises NotFound for an image without a record."""
    return InstantStatusReport(instant=tuple(_status(each.absolute(), now or datetime.now(UTC)) for each in images))


def _status(image: Path, now: datetime) -> InstantStatus:
    record = record_of(image)
    if record is None:
        raise NotFound(
            "it is no instant restore that is being copied: it is finished, or never was one",
            subject=image,
            hint="`snapchain inspect` shows an image; `snapchain status DEST` shows a destination",
        )
    copied = _copied(image)
    state = _state(image, record)
    return InstantStatus(
        image=str(image),
        state=state,
        depends_on=str(record.address),
        guest=record.guest,
        hold=record.hold,
        virtual_size=record.virtual_size,
        copied_bytes=copied,
        percent=None if copied is None else round(100 * copied / max(record.virtual_size, 1), 1),
        seconds_left=_seconds_left(record, copied, now) if state == "copying" else None,
    )


def _state(image: Path, record: InstantRecord) -> State:
    if not os.path.lexists(image):
        return "missing"
    writers = [each for each in OpenFiles().openers(image.stat()) if each.writing]
    if any(each.command.startswith(_COPIER) for each in writers):
        return "copying"
    if writers:
        return "in use"
    return "served" if server.serves(record) else "not served"


def _copied(image: Path) -> int | None:
    try:
        with ImageFile(
            Place.of(image), open_behind(image), format="qcow2", budget=RunBudget(), is_written=True
        ) as file:
            return file.size - lacking_bytes(file)
    except (SnapchainError, OSError):
        return None  # it is being written, or is gone


def _seconds_left(record: InstantRecord, copied: int | None, now: datetime) -> float | None:
    if record.copying_since is None or copied is None or copied <= record.copied_before:
        return None
    seconds = (now - record.copying_since).total_seconds()
    return (record.virtual_size - copied) * seconds / (copied - record.copied_before)
