"""What a capture makes in a guest and on this host, by name: noted in the journal before any of it is made.

Names in the guest: `sc-<p|c|a|s>-<id>-<number of the disk>`, throttle group `sc-t-<id>`, export `sc-e-<id>-<number>`;
bitmaps as guest/capture.py has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from snapchain.guest.capture import PREFIX


class Monitor(Protocol):
    """QEMU's monitor."""

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None, /) -> Any:
        """What a command returns. Raises a SnapchainError with QEMU's words, Unavailable where the answer is lost."""
        ...


class DiskInFlight(BaseModel):
    """device: QOM path that has the property `drive`; root: node that it reads; active: format node of the bitmaps."""

    model_config = ConfigDict(frozen=True)

    name: str
    device: str
    root: str
    active: str


class CaptureInFlight(BaseModel):
    """What a capture makes: in the guest, and on this host. directory: private, with scratch files and socket."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    directory: str
    disks: tuple[DiskInFlight, ...]

    def node(self, role: Literal["p", "c", "a", "s"], number: int) -> str:
        """The name of a node of ours."""
        return f"sc-{role}-{self.id}-{number}"

    def export(self, number: int) -> str:
        """The id and the name of the export of a disk."""
        return f"sc-e-{self.id}-{number}"

    def later(self, number: int) -> str:
        """Of the export that shows what was written since the instant, and of the bitmap copy that does."""
        return f"{self.copies}late-{number}"

    @property
    def copies(self) -> str:
        """How the names of all copies of bitmaps begin."""
        return f"{PREFIX}copy-{self.id}-"

    @property
    def new_bitmap(self) -> str:
        """The name of the bitmaps that begin with this capture, until they get one of their own."""
        return f"{PREFIX}new-{self.id}"

    @property
    def exports(self) -> list[str]:
        """Of all disks."""
        return [name for number in range(len(self.disks)) for name in (self.export(number), self.later(number))]

    @property
    def group(self) -> str:
        """The throttle group of the pass-throughs; it has no limits."""
        return f"sc-t-{self.id}"

    @property
    def socket(self) -> Path:
        """Of the NBD server."""
        return Path(self.directory) / "nbd"
