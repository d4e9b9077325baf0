"""Messages about a whole guest: HANDOVER of its disks, GUEST for its state, and MOVE while it runs."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from snapchain.model.disk_name import LARGEST_EPOCH
from snapchain.model.guest_checks import GuestCheck, GuestChecks
from snapchain.model.guest_state import MOST_DISKS as MOST_TAKEN, GuestChange, GuestStanding
from snapchain.replica.stream.fields import Epoch, LayerId, Printable
from snapchain.replica.stream.messages import Active, Message

# --- HANDOVER

MOST_DISKS = 64
"""Of one guest: as many as virtio-scsi or a long row of virtio-blk has in earnest."""


class Step(StrEnum):
    """What a HANDOVER requests."""

    GIVE = "give"
    """From now on the replica's host is the master of these disks."""
    BACK = "back"
    """It shall not be; refused where a guest has written there."""
    LOOK = "look"
    """Whether it is."""


class HandedDisk(Message):
    """A disk of a handover.

    epoch: in which its master will write it then; overlay: what must stand ready for that; it names the newest layer
    """

    disk: str = Field(min_length=1, max_length=250)
    epoch: int = Field(ge=2, le=LARGEST_EPOCH)
    overlay: Active


class Handover(Message):
    """All disks of a guest, all or none. token: of this handover, the same in each repetition.

    by: the host that gives them, for the record of the guest's state; only for a receiver that keeps one
    """

    newer = frozenset({"by"})

    step: Step
    token: LayerId
    disks: tuple[HandedDisk, ...] = Field(min_length=1, max_length=MOST_DISKS)
    replica: str | None = Field(default=None, max_length=4096)
    by: str | None = Field(default=None, min_length=1, max_length=250)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len({each.disk for each in self.disks}) < len(self.disks):
            raise ValueError("a disk is named twice")
        return self


class Standing(Message):
    """How one disk stands after it. given: whether it was, by this token; epoch: of the disk; overlay: whole path."""

    disk: str = Field(min_length=1, max_length=250)
    given: bool
    epoch: Epoch
    overlay: str = Field(min_length=1, max_length=4500)


class Handed(Message):
    """In the order of the request."""

    disks: tuple[Standing, ...] = Field(max_length=MOST_DISKS)


# --- GUEST


class AskGuest(Message):
    """How a guest stands, one step of it to another state, or what came of a check of it.

    handed: for SWITCH, and for WITHDRAW after it, all disks of the guest, as in HANDOVER; replica: as in Open
    """

    guest: str = Field(min_length=1, max_length=250)
    replica: str | None = Field(default=None, max_length=4096)
    change: GuestChange | None = None
    check: GuestCheck | None = None
    handed: tuple[HandedDisk, ...] = Field(default=(), max_length=MOST_DISKS)

    @model_validator(mode="after")
    def _is_of_one_guest(self) -> Self:
        names = [each.disk for each in self.handed]
        if len(set(names)) < len(names) or not all(name.startswith(f"{self.guest}/") for name in names):
            raise ValueError("its disks are not those of the guest, each once")
        if any(each is not None and each.guest != self.guest for each in (self.change, self.check)):
            raise ValueError("the change or check is another guest's")
        if self.change is not None and self.check is not None:
            raise ValueError("it is a change or a check")
        return self


class Stands(Message):
    """How a guest stands. disks: those that were taken over by the request, each with its overlay; in its order

    checks: what came of its last checks
    """

    standing: GuestStanding
    checks: GuestChecks = GuestChecks()
    disks: tuple[Standing, ...] = Field(default=(), max_length=MOST_TAKEN)


# --- MOVE: a guest comes to the replica's host while it runs.

MOST_ARGUMENTS = 10_000
"""Of a QEMU's command line."""


class DomainPresence(StrEnum):
    """How libvirt on a host has a domain."""

    ABSENT = "absent"
    DEFINED = "defined"
    """It does not run; of one that comes by a migration: it has run, since libvirt defines it at the end."""
    INCOMING = "incoming"
    """Its memory is still on its way, or it is being started."""
    HERE = "here"
    """It runs, or is paused by somebody."""


class MovingDomain(Message):
    """A domain of libvirt. starts_with_host: it is started when its host boots"""

    name: Annotated[str, StringConstraints(min_length=1, max_length=1000), Printable]
    uuid: str = Field(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
    starts_with_host: bool = False


LARGEST_NVRAM = 64 << 20
MOST_NVRAM = 4
"""Files of firmware variables of one guest, and bytes of one."""


class MoveStep(StrEnum):
    """What a MOVE requests, in the order in which they come."""

    PREPARE = "prepare"
    """Lock the disks for the length of this stream, and make the directory for the guest's sockets."""
    START = "start"
    """Start QEMU, which then awaits memory and the writes of the disks."""
    GIVE = "give"
    """The memory has come: from now on this host is the master of the disks."""
    RUN = "run"
    """Let the guest run. Only after GIVE."""
    GIVE_AND_RUN = "give-and-run"
    """GIVE, and RUN at once."""
    END = "end"
    """Give the move up: end QEMU, and remove what was made for it. Refused once the guest may have run here."""
    LOOK = "look"


class Move(Message):
    """Steps of one move follow each other in one stream, up to STOP. GIVE, RUN, END and LOOK may also begin one.

    Where the stream ends otherwise, the receiver does what is right by its record: RUN after GIVE, else END.
    token: of the move; guest: its name here, by: the host that asks
    disks: all of the guest's, each below its name, and in the epoch in which its new master will write it
    exports: of the disks, in their order, their names in the guest
    nvram: for PREPARE, bytes of each file of firmware variables, whose content comes with the memory
    argv: of the QEMU to start; directory: in which it is started; qmp: the monitor among its sockets
    domain: of libvirt, which moves it: then there is no START, and GIVE records what libvirt has done
    """

    step: MoveStep
    token: LayerId
    replica: str | None = Field(default=None, max_length=4096)
    guest: Annotated[str, StringConstraints(min_length=1, max_length=250), Printable]
    by: Annotated[str, StringConstraints(min_length=1, max_length=250), Printable]
    disks: tuple[HandedDisk, ...] = Field(min_length=1, max_length=MOST_DISKS)
    exports: tuple[Annotated[str, StringConstraints(max_length=250)], ...] = Field(default=(), max_length=MOST_DISKS)
    nvram: tuple[Annotated[int, Field(gt=0, le=LARGEST_NVRAM)], ...] = Field(default=(), max_length=MOST_NVRAM)
    argv: tuple[Annotated[str, StringConstraints(max_length=65536)], ...] = Field(default=(), max_length=MOST_ARGUMENTS)
    directory: str | None = Field(default=None, max_length=4096)
    qmp: str | None = Field(default=None, max_length=4096)
    domain: MovingDomain | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = {each.disk for each in self.disks}
        if len(names) < len(self.disks) or len(self.exports) not in (0, len(self.disks)):
            raise ValueError("its disks do not fit together")
        if len({each.epoch for each in self.disks}) > 1 or not all(each.startswith(f"{self.guest}/") for each in names):
            raise ValueError("its disks are not those of one guest, in one epoch")
        if any("\0" in word for word in self.argv):
            raise ValueError("an argument has a NUL")
        return self


MOST_ENTRIES, LONGEST_KEY, LONGEST_VALUE = 2000, 250, 1000
"""Of the view of a machine."""


class Moving(Message):
    """How a move stands at the receiver.

    directory: for the guest's sockets; overlays: whole paths, in the order of the disks; "" where nothing is known
    nvram: whole paths of the files for its firmware variables, in the order of the request
    alive: whether the QEMU of this move runs; given: whether the guest was given to this host by this move
    ran: whether it may have run here; version: of QEMU, as 7.2; machine: its type
    view: in answer to START, what the guest would see of that machine (guest/machine_view.py)
    cpu: a digest of the processor's model and features; free: bytes of the replica's filesystem
    clock: of this host, in the middle of the work on the request, and
    resumed: when the guest went on; both in seconds since the epoch
    rehearsed: seconds of the work that a paused guest waits for, without its decisions; for LOOK in a move
    domain: how libvirt has it; libvirt: the socket of its daemon, host: that daemon's UUID of this host
    pause: seconds in which the guest did not run, by libvirt's own measure; memory: bytes that came, in how many rounds
    """

    directory: str = Field(default="", max_length=4096)
    overlays: tuple[Annotated[str, StringConstraints(max_length=4500)], ...] = Field(default=(), max_length=MOST_DISKS)
    nvram: tuple[Annotated[str, StringConstraints(max_length=4500)], ...] = Field(default=(), max_length=MOST_NVRAM)
    alive: bool
    given: bool
    ran: bool
    version: str | None = Field(default=None, max_length=100)
    machine: str | None = Field(default=None, max_length=200)
    view: dict[
        Annotated[str, StringConstraints(max_length=LONGEST_KEY)],
        Annotated[str, StringConstraints(max_length=LONGEST_VALUE)],
    ] = Field(default={}, max_length=MOST_ENTRIES)
    cpu: str = Field(default="", max_length=100)
    free: int = Field(default=0, ge=0, le=1 << 63)
    clock: float
    rehearsed: float = Field(default=0.0, ge=0)
    resumed: float | None = None
    domain: DomainPresence | None = None
    libvirt: str = Field(default="", max_length=4096)
    host: str = Field(default="", max_length=100)
    pause: float | None = None
    memory: int = Field(default=0, ge=0, le=1 << 63)
    rounds: int = Field(default=0, ge=0, le=1 << 31)
