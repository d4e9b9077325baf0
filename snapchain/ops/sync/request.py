"""What may be asked of `sync`, and what it says: values only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pydantic import BaseModel, ConfigDict

from snapchain.errors import InvalidInput
from snapchain.model.convergence import Rules, Verdict
from snapchain.ops.ship.request import LayerPlan, ShipRequest
from snapchain.ops.sync.virsh import Guest


class Proof(Enum):
    """How a layer that is there already is known to be equal."""

    RECORDED = "recorded"
    """By the content id that it showed when it came."""
    READ = "read"
    """By reading it again, on both sides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncRequest:
    """What is to be made ready where.

    send: as of `send`, with Scope.SEALED and Files.EACH; rounds: of sealing, at most, None for those of the rules
    target_downtime: seconds; without it and without rounds nothing is sealed; guest: for the commands that follow
    overlay_name: file name of the overlay at the destination; None: the image's
    rest: bytes that may be left, whatever the rate: one that was measured over few bytes is mostly latency
    """

    send: ShipRequest
    rounds: int | None = None
    target_downtime: float | None = None
    proof: Proof = Proof.RECORDED
    guest: Guest | None = None
    overlay_name: str | None = None
    rest: int = 0

    def check(self) -> None:
        """Raises InvalidInput for numbers that mean nothing."""
        self.send.check()
        if self.rounds is not None and self.rounds < 1:
            raise InvalidInput("--rounds must be at least 1", subject=str(self.rounds))
        if self.target_downtime is not None and not 0 < self.target_downtime < float("inf"):
            raise InvalidInput("--target-downtime is a number of seconds above 0", subject=str(self.target_downtime))

    @property
    def seals(self) -> bool:
        """Whether anything may be sealed."""
        return self.rounds is not None or self.target_downtime is not None

    def is_met(self, left: int, predicted: float | None) -> bool | None:
        """Whether the downtime is met; None where none was named. predicted: seconds for the bytes that are left"""
        if self.target_downtime is None:
            return None
        return left <= self.rest or (predicted is not None and predicted <= self.target_downtime)

    @property
    def rules(self) -> Rules:
        """Of convergence."""
        return Rules() if self.rounds is None else Rules(rounds=self.rounds)


class LayerThere(BaseModel):
    """A layer at the replica. path: over there; source: the file here that it is, None for what is no single file."""

    model_config = ConfigDict(frozen=True)

    path: str
    source: str | None
    virtual_size: int
    content_id: str


class Destination(BaseModel):
    """How the destination stands.

    ready: all that is sealed is there, and the overlay; missing: why not, as sentences; layers: root first
    layers_to_send, bytes_to_send: sealed here and not there; overlay: its path, None where no layer is there yet
    names: paths by which a guest's definition may name the image here
    commands: for a shell on this host, in order, the last one migrates; none without a domain, a target and an URI
    """

    model_config = ConfigDict(frozen=True)

    disk: str
    destination: str
    image: str
    ready: bool
    missing: tuple[str, ...]
    layers: tuple[LayerThere, ...]
    layers_to_send: tuple[LayerPlan, ...]
    bytes_to_send: int
    bytes_left: int
    virtual_size: int
    overlay: str | None
    proof: Proof
    names: tuple[str, ...]
    commands: tuple[str, ...]

    @property
    def virsh_command(self) -> str | None:
        """The one that migrates."""
        return self.commands[-1] if self.commands else None


class Round(BaseModel):
    """One round of seal and ship; number 0 ships what was sealed before.

    sealed: the file; data_bytes: of the maps that were sent; bytes_sent: on the wire; seconds: of all of it
    rate: data bytes a second while they went over, None where none did
    bytes_left: in the active top, after it; dirty_rate: bytes a second that came into the top meanwhile
    """

    model_config = ConfigDict(frozen=True)

    number: int
    sealed: str | None
    layers_sent: int
    data_bytes: int
    bytes_sent: int
    seconds: float
    rate: float | None
    bytes_left: int
    dirty_rate: float | None
    predicted_cutover_seconds: float | None


class SyncReport(BaseModel):
    """What `sync` did, and what is left.

    point: the newest that was published, None where nothing was sent; bytes_left: DATA of the active top
    wire_bytes_left: the same as it would be compressed; rate: data bytes a second, of the round that moved most
    predicted_cutover_seconds: bytes_left at that rate; these three are None where nothing was measured
    outcome: why no further round was made, None where none was asked for; on_target: whether the downtime is met
    """

    model_config = ConfigDict(frozen=True)

    image: str
    destination: str
    disk: str
    ready: bool
    missing: tuple[str, ...]
    point: int | None
    layers_sent: int
    layers_present: int
    data_bytes: int
    bytes_sent: int
    bytes_left: int
    wire_bytes_left: int | None
    rate: float | None
    predicted_cutover_seconds: float | None
    target_downtime: float | None
    on_target: bool | None
    outcome: Verdict | None
    rounds: tuple[Round, ...]
    layers: tuple[LayerThere, ...]
    overlay: str | None
    proof: Proof
    commands: tuple[str, ...]
    virsh_command: str | None
    seconds: float


class SetDestination(BaseModel):
    """How a destination stands for all disks of a guest. ready: for all; commands: that move them together."""

    model_config = ConfigDict(frozen=True)

    destination: str
    ready: bool
    disks: tuple[Destination, ...]
    bytes_left: int
    commands: tuple[str, ...]


class SetReport(BaseModel):
    """What `sync` did with the disks of one guest. ready: all of them; the rest as of one disk, of all together."""

    model_config = ConfigDict(frozen=True)

    destination: str
    ready: bool
    disks: tuple[SyncReport, ...]
    bytes_left: int
    rate: float | None
    predicted_cutover_seconds: float | None
    target_downtime: float | None
    on_target: bool | None
    outcome: Verdict | None
    commands: tuple[str, ...]
    virsh_command: str | None
    seconds: float
