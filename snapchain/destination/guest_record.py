"""What a guest point stores beside its disks: how the guest is defined, and which points belong together.

The record of guest `web1` is the content of a small disk `web1/.guest`, one point of it for each guest point.  So it is
stored, encrypted, sent, held, verified and kept like any other disk, at every kind of destination, and an older
snapchain sees a disk.  All points of one guest point have the same `instant`; the record is published last, so a guest
point is there as a whole or not at all (docs/decisions/0119).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Base64Bytes, BaseModel, ConfigDict, Field, ValidationError

from snapchain.errors import Corrupt
from snapchain.model.consistency import Consistency

RECORD_DISK = ".guest"
LARGEST = 64 << 20
"""Bytes of a record, the state of a TPM and firmware variables included."""
_SECTOR = 512


def taken_for(record: GuestRecord, guest: str) -> GuestRecord:
    """A record of a guest that had another name, as one of `guest`: the names of its disks follow."""
    if record.guest == guest:
        return record
    old = f"{record.guest}/"

    def renamed(disk: str) -> str:
        return f"{guest}/{disk.removeprefix(old)}" if disk.startswith(old) else disk

    disks = tuple(each.model_copy(update={"disk": renamed(each.disk)}) for each in record.disks)
    return record.model_copy(update={"guest": guest, "disks": disks})


def record_disk(guest: str) -> str:
    """The name of the disk that holds the records of a guest."""
    return f"{guest}/{RECORD_DISK}"


def guest_of(disk: str) -> str | None:
    """The guest whose records a disk holds, None where it is an ordinary disk."""
    guest, _, last = disk.rpartition("/")
    return guest if guest and last == RECORD_DISK else None


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class RecordedDisk(_Part):
    """A disk of the guest. name: such as vda; disk: its name at the destination; path: of the active layer at the host

    virtual_size: bytes; content_id: of its point
    """

    name: str
    disk: str
    path: str
    virtual_size: int
    content_id: str


class RecordedFile(_Part):
    """A small file of the guest: firmware variables (nvram), the state of its TPM (tpm)."""

    role: Literal["nvram", "tpm"]
    name: str
    data: Base64Bytes


class GuestRecord(_Part):
    """A guest point. instant: 32 hex digits, as its disks' points have it

    live, inactive: domain XML; argv: QEMU's command line where there is no libvirt
    left_out: disks that were not taken, each with the reason
    media, immovable, unreadable: as guest.protocol.Definition has them
    """

    version: Literal[1] = 1
    guest: str
    instant: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    time: AwareDatetime
    consistency: Consistency
    host: str
    kind: Literal["libvirt", "qmp"]
    uuid: str | None = None
    machine: str | None = None
    macs: tuple[str, ...] = ()
    live: str | None = None
    inactive: str | None = None
    argv: tuple[str, ...] | None = None
    disks: tuple[RecordedDisk, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    files: tuple[RecordedFile, ...] = ()
    media: tuple[str, ...] = ()
    immovable: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """The content of its disk: JSON, filled up with blanks to whole sectors."""
        text = self.model_dump_json(indent=1).encode()
        return text.ljust(-(-len(text) // _SECTOR) * _SECTOR)


def decode(content: bytes, *, subject: object) -> GuestRecord:
    """A record as its disk holds it. Raises Corrupt, naming `subject`."""
    try:
        return GuestRecord.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Corrupt(f"it is no record of a guest: {where}: {first['msg']}", subject=subject) from error
