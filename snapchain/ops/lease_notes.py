"""What this host knows of the leases of its guests: a note in the directory of each watch that holds one.

A later run of the watch goes on by it.  Others see by it why a QEMU is stopped, and that a guest is not to be moved.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from snapchain.errors import SnapchainError
from snapchain.host import private
from snapchain.host.deadman import is_stopped
from snapchain.host.process_identity import Identity, still_runs
from snapchain.host.records import SYSTEM_STATE, state_dir
from snapchain.model.lease import Lease

NAME = "lease.json"
_FOLDER = "watch"
_CAP = 1 << 16


class LeaseNote(BaseModel):
    """One guest under a lease.

    guest, epoch: its name at the destinations, and in which epoch this host writes it: a stopped QEMU tells nothing
    destination: where the lease is recorded, as the watch names it
    process, boot: of the guest's QEMU, (0, 0) while it is off; guards: that may still live
    pausing: QEMU was asked, or is about to be asked, to pause the guest
    lease: that the destination may have recorded, None while the guards are only tried
    is_sure: whether it is known to have done so
    """

    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)

    version: Literal[2] = 2
    guest: str
    epoch: int
    destination: str
    process: Identity
    boot: str
    guards: tuple[Identity, ...] = ()
    pausing: bool = False
    lease: Lease | None = None
    is_sure: bool = False

    @property
    def is_there(self) -> bool:
        """Whether that QEMU still runs, stopped or not."""
        return still_runs(self.process, boot=self.boot)

    def describe(self) -> str:
        """Whether the guest runs, in a sentence."""
        length = "" if self.lease is None else f" of {self.lease.seconds} s"
        if is_stopped(self.process):
            return f"Its lease{length} was not renewed, or another host has it: the kernel has stopped its QEMU."
        return f"It runs under a lease{length}, which a watch renews."


def directories() -> list[Path]:
    """Of watches: those of the system, and those of this user. The one of root's own watches is the first."""
    system = os.geteuid() == 0 and not os.environ.get("XDG_STATE_HOME")
    places = [SYSTEM_STATE, state_dir()] if system else [state_dir(), SYSTEM_STATE]
    return [place / _FOLDER for place in dict.fromkeys(places)]


def read_note(path: Path) -> LeaseNote | None:
    """The note, None for one that cannot be read or understood."""
    try:
        return LeaseNote.model_validate_json(private.read_own(path, cap=_CAP))
    except (SnapchainError, ValidationError):
        return None


def notes_of(process: Identity | None) -> Iterator[tuple[Path, LeaseNote]]:
    """Of a QEMU of this host, as far as this user may know them."""
    for folder in directories() if process is not None else ():
        try:
            found = sorted(folder.glob(f"*/{NAME}"))
        except OSError:
            continue
        for path in found:
            if (note := read_note(path)) is not None and note.process == process and note.is_there:
                yield path, note


def note_of(process: Identity | None) -> LeaseNote | None:
    """One of them."""
    return next((note for _, note in notes_of(process)), None)
