"""What this host knows of the leases of its guests: a note in the directory of each watch that holds one.

A later run of the watch goes on by it.  Others see by it why a QEMU is stopped, and that a guest is not to be moved.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from snapchain.errors import SnapchainError
from snapchain.host import private
from snapchain.host.deadman import is_stopped
from snapchain.host.process_identity import Identity, boot_id, identity
from snapchain.host.records import SYSTEM_STATE, state_dir
from snapchain.model.lease import Lease

NAME = "lease.json"
_FOLDER = "watch"
_CAP = 1 << 16


class LeaseNote(BaseModel):
    """One guest under a lease.

    rehearses: nothing is promised yet; process, boot: of the guest's QEMU; guards: that may still live
    guest, epoch: its name at the destinations, and in which epoch this host writes it: a stopped QEMU tells nothing
    pausing: QEMU was asked, or is about to be asked, to pause the guest
    lease: once it is recorded at both places; a later run with the same terms goes on with it
    """

    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)

    version: Literal[1] = 1
    rehearses: bool
    guest: str
    epoch: int
    process: Identity
    boot: str
    guards: tuple[Identity, ...] = ()
    pausing: bool = False
    lease: Lease | None = None

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
    """The note, where its QEMU still runs. None for one that cannot be read or understood."""
    try:
        note = LeaseNote.model_validate_json(private.read_own(path, cap=_CAP))
    except (SnapchainError, ValidationError):
        return None
    return note if note.boot == boot_id() and identity(note.process[0]) == note.process else None


def note_of(process: Identity | None) -> LeaseNote | None:
    """Of a QEMU of this host, as far as this user may know it."""
    if process is None:
        return None
    for folder in directories():
        try:
            found = sorted(folder.glob(f"*/{NAME}"))
        except OSError:
            continue
        for path in found:
            if (note := read_note(path)) is not None and note.process == process:
                return note
    return None
