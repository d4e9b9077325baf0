"""The note of an interrupted command in the directory that it works in: marked by its user, read by the next run."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from snapchain.errors import SnapchainError
from snapchain.host import records
from snapchain.host.directory import Directory
from snapchain.host.files import write_in
from snapchain.host.os_errors import os_errors

N = TypeVar("N", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class NoteFile(Generic[N]):
    """A note of this shape. name: in the directory; purpose: of its mark; cap: its largest size in bytes"""

    directory: Path
    name: str
    shape: type[N]
    purpose: str
    cap: int

    def read(self) -> N | None:
        """What is there; None for what cannot be understood, and for what another user may have written."""
        try:
            with Directory.open(self.directory) as directory:
                found = records.read(directory, self.name, purpose=self.purpose, key=records.own_key(), cap=self.cap)
                note = self.shape.model_validate_json(found.text)
        except (OSError, SnapchainError, ValidationError):
            return None
        return note if found.is_own else None

    def write(self, note: N) -> None:
        """Replace it, durably. Raises as writing a file."""
        with os_errors(self.directory), Directory.open(self.directory) as directory:
            inode = os.fstat(directory.fd).st_ino
            values = note.model_dump(mode="json")
            data = records.encode(values, purpose=self.purpose, place=inode, key=records.made_key())
            write_in(directory, self.name, data)

    def remove(self) -> None:
        """Remove it, unless it is not there."""
        with suppress(FileNotFoundError), os_errors(self.directory), Directory.open(self.directory) as directory:
            directory.remove(self.name)
            directory.sync()
