"""A live move, whatever manages the guest: what is asked for, what was done, and the protocol of the two kinds.

live.py            the order of things: rounds, overlays, record, watchdog, and what is undone when it fails
live_qmp.py        of a bare QEMU: snapchain starts the other one, mirrors, and switches
live_libvirt.py    of a domain: libvirt does that
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from snapchain.guest import journal
from snapchain.guest.protocol import Guest, GuestDisk
from snapchain.model.events import OnEvent
from snapchain.ops.migrate.live_request import LiveDisk, LiveReport, LiveRequest, SettledMove
from snapchain.ops.migrate.live_settle import MoveRecord
from snapchain.ops.sync.request import SetReport
from snapchain.replica.endpoint import GuestEndpoint


@dataclass(frozen=True, slots=True)
class Asked:
    """Which guest moves where. token: of this move."""

    guest: Guest
    request: LiveRequest
    endpoint: GuestEndpoint
    token: str
    on_event: OnEvent


@dataclass(slots=True)
class Moved:
    """What was done, for the report. Bytes, bytes a second, seconds.

    qmp: the monitor of the guest there, where no libvirt has it
    """

    record: MoveRecord
    guest: str
    max_downtime: float
    qmp: str = ""
    overlays: tuple[str, ...] = ()
    fenced: list[tuple[Path, ...]] = field(default_factory=list)
    memory_bytes: int = 0
    memory_rounds: int = 0
    memory_rate: float = 0.0
    predicted: float = 0.0
    pause: float | None = None
    clock_ahead: float | None = None

    def report(self, shipped: SetReport, *, seconds: float) -> LiveReport:
        return LiveReport(
            guest=self.guest,
            destination=self.record.destination,
            token=self.record.token,
            qmp=self.qmp,
            disks=tuple(
                LiveDisk(
                    disk=each.mark.disk,
                    image=str(each.image),
                    epoch=each.mark.epoch,
                    overlay=overlay,
                    fenced=tuple(map(str, fenced)),
                )
                for each, overlay, fenced in zip(self.record.disks, self.overlays, self.fenced, strict=True)
            ),
            bytes_sent=sum(disk.bytes_sent for disk in shipped.disks),
            memory_bytes=self.memory_bytes,
            memory_rounds=self.memory_rounds,
            memory_rate=self.memory_rate,
            predicted_pause=self.predicted,
            pause=self.pause,
            pause_within=None if self.pause is None else self.pause <= self.max_downtime,
            max_downtime=self.max_downtime,
            clock_ahead=self.clock_ahead,
            seconds=seconds,
        )


class LiveKind(Protocol):
    """How the guest itself moves, once its disks are there. One instance a move."""

    def check(self, disks: Sequence[GuestDisk]) -> None:
        """Raises Unsupported, Busy or Conflict for what stands in the way of moving it; nothing was done yet."""
        ...

    def dirty_rate(self) -> float | None:
        """Bytes of memory a second that the guest dirties; None where that cannot be measured."""
        ...

    def begin(self, record: MoveRecord) -> MoveRecord:
        """The record with what this kind needs to undo the move, and a directory for its sockets, which is made."""
        ...

    def move(self, found: journal.Found, moved: Moved, shipped: SetReport) -> None:
        """Move the guest; at the end its record is gone. Where it raises, `settle` is called."""
        ...

    def settle(self, found: journal.Found) -> SettledMove:
        """End the move that was begun, after an error. found: its record as it is now. Raises as `live_settle`."""
        ...
