"""What is in flight in guests: a small record for each operation, written before the act and removed after it.

    STATE/guests/thaw-web1-5f3a9c01.json         the guest may be frozen
    STATE/guests/snapshot-web1-0b7e11d2.json     overlays were made, and may be part of its chains

STATE is the directory of the key of this user's records (host/records.py): the same for root at a terminal and for
root's services.  A record says how the guest is reached and which QEMU it was, so a later run, or `doctor`, can judge
by the guest itself what became of the operation.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue

from snapchain.errors import NotFound, SnapchainError
from snapchain.guest.address import GuestAddress
from snapchain.host.private import PrivateDirectory, read_record, write_record
from snapchain.host.process_identity import Identity, boot_id, own_identity, still_runs
from snapchain.host.records import key_directory

if TYPE_CHECKING:
    from snapchain.guest.protocol import Guest

_CAP = 1 << 20
_SUFFIX = ".json"


class InFlight(BaseModel):
    """An operation in a guest. operation: a word, such as `thaw`, `snapshot`, `merge`; guest: its name

    domain, connect, qmp, agent: how it is reached, as `GuestAddress` has them
    process: (pid, start time) of its QEMU, None where that is unknown; writer: of the snapchain that is at work
    boot: the boot of this host in which both run
    details: of the operation; its module gives them a shape
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = 1
    operation: str = Field(pattern=r"^[a-z]+$")
    guest: str
    domain: str | None = None
    connect: str | None = None
    qmp: str | None = None
    agent: str | None = None
    process: tuple[int, int] | None = None
    boot: str
    writer: tuple[int, int]
    time: AwareDatetime
    details: dict[str, JsonValue] = {}

    @property
    def address(self) -> GuestAddress | None:
        """How the guest is opened again; None for one that has not come to this host yet."""
        if self.domain is None and self.qmp is None:
            return None
        return GuestAddress(
            domain=self.domain,
            connect=self.connect,
            qmp=None if self.qmp is None else Path(self.qmp),
            agent=None if self.agent is None else Path(self.agent),
            name=self.guest if self.qmp is not None else None,
        )

    @property
    def is_abandoned(self) -> bool:
        """Whether the snapchain that was at work is gone."""
        return not still_runs(self.writer, boot=self.boot)

    @property
    def qemu_runs(self) -> bool | None:
        """Whether the guest's QEMU still runs; None where it was not known."""
        return None if self.process is None else still_runs(self.process, boot=self.boot)


@dataclass(frozen=True, slots=True)
class Found:
    """A record and its file."""

    path: Path
    record: InFlight


def begun(guest: Guest, operation: str, **details: JsonValue) -> InFlight:
    """A record of an operation that this process is about to begin."""
    address = guest.address
    return InFlight(
        operation=operation,
        guest=guest.name,
        domain=address.domain,
        connect=address.connect,
        qmp=None if address.qmp is None else str(address.qmp.absolute()),
        agent=None if address.agent is None else str(address.agent.absolute()),
        process=guest.process(),
        boot=boot_id(),
        writer=own_identity(),
        time=datetime.now(UTC),
        details=details,
    )


def path_for(record: InFlight) -> Path:
    """An unused path."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", record.guest)[:100]
    return directory() / f"{record.operation}-{plain}-{secrets.token_hex(4)}{_SUFFIX}"


def write(record: InFlight, path: Path | None = None) -> Path:
    """Store a new record durably; its path. Raises what writing a small file raises."""
    path = path or path_for(record)
    write_record(path, record)
    return path


def replace(path: Path, record: InFlight) -> None:
    """Store it anew under its path, durably: the old or the new one is there at any moment."""
    write_record(path, record)


def remove(path: Path) -> None:
    """Idempotent."""
    try:
        with PrivateDirectory(path.parent) as opened:
            opened.remove(path.name)
    except NotFound:
        return


def find(*, guest: str | None = None, operation: str | None = None) -> tuple[list[Found], list[SnapchainError]]:
    """The records of this user, oldest first, of all guests or one; and what could not be read."""
    found: list[Found] = []
    faults: list[SnapchainError] = []
    for path in _paths():
        try:
            record = read_record(path, InFlight, cap=_CAP)
        except NotFound:  # its operation ended meanwhile
            continue
        except SnapchainError as fault:
            faults.append(fault)
            continue
        if guest in (None, record.guest) and operation in (None, record.operation):
            found.append(Found(path, record))
    return sorted(found, key=lambda each: each.record.time), faults


def abandoned(*, guest: str, process: Identity | None, operations: Sequence[str]) -> list[Found]:
    """Records of killed runs at this very guest: by its QEMU where that is known, else by its name."""
    found, _ = find()
    return [
        each
        for each in found
        if each.record.operation in operations
        and each.record.is_abandoned
        and (each.record.guest == guest or (process is not None and each.record.process == process))
    ]


def directory() -> Path:
    """Where the records are. Raises NotFound for a user without a home directory."""
    return key_directory() / "guests"


def _paths() -> Iterator[Path]:
    try:
        with PrivateDirectory(directory()) as opened:
            names = opened.names()
    except NotFound:
        return
    for name in sorted(names):
        if name.endswith(_SUFFIX) and not name.startswith("."):
            yield directory() / name
