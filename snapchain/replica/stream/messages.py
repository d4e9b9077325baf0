"""Every frame of the stream: its number, its longest body, what stands in it, and what answers it.

`REQUESTS`, at the end, is the one table of what a sender may ask for. A new request is an entry of `Kind`, its models
here, a row of `REQUESTS` with a function that answers it, and a function of `client.py` or `sender.py` that sends it.
Models are checked as they are read: every field has a type and a bound.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from snapchain.errors import Corrupt
from snapchain.model.consistency import Consistency
from snapchain.model.content import SumText
from snapchain.model.disk_name import LARGEST_EPOCH
from snapchain.model.fingerprint import SHORT_KEY_BYTES, Fingerprint
from snapchain.model.guest_checks import GuestCheck, GuestChecks
from snapchain.model.guest_state import MOST_DISKS as MOST_TAKEN, GuestChange, GuestStanding
from snapchain.model.inventory import MAX_LAYERS
from snapchain.model.retention import Policy
from snapchain.replica.names import is_layer_name


class Kind(IntEnum):
    """What a frame is; see docs/stream.md."""

    HELLO = 1
    OPEN = 2
    LAYER = 3
    MAP = 4
    DATA = 5
    MARK = 6
    END = 7
    POINT = 8
    STOP = 9
    BEAT = 10
    FAIL = 11
    CUT = 12
    ACTIVE = 13
    ASK = 14
    MERGE = 15
    HANDOVER = 16
    FETCH = 17
    LEAVES = 18
    HOLD = 19
    RELEASE = 20
    GUEST = 21
    MOVE = 24
    INVENTORY = 32
    ACK = 33
    STORED = 34
    DONE = 35
    READINESS = 36
    DISK = 37
    VERDICT = 38
    FINDING = 39
    PROGRESS = 40
    MERGED = 41
    HANDED = 42
    LEAF_HASHES = 43
    HELD = 44
    STANDING = 45
    MOVING = 48


KiB = 1024
MiB = 1024 * KiB

VERSION = 1
"""The one version of the stream that this program speaks."""
LARGEST_DISK = 1 << 56
"""Bytes; see docs/format.md: no signed offset may overflow with two of these added."""
MAX_RUNS = 1 << 22
"""Of a layer's map."""

LARGEST_NUMBER = 1 << 53
"""Of a point: what a program in any language counts exactly."""
MOST_POINTS = 30_000
"""Of one disk at a replica: one a night for 80 years. Of a whole answer, too: 6 KiB each until they are shown."""
POINTS_AT_ONCE = 256
"""In one DISK frame; each may have a hundred labels of a hundred characters."""
MOST_HOLDS = 100
"""Of one point."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
LayerId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Instant = LayerId
"""One for all points of a guest point."""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a label holds control characters")
    return text


def _file_name(text: str) -> str:
    if not is_layer_name(text):
        raise ValueError(f"a layer cannot be named {text!a}")
    return text


def _of_a_calendar(time: datetime) -> datetime:
    """In UTC. No time zone, and no rule that counts days, leaves the calendar from there."""
    try:
        time = time.astimezone(UTC)
    except OverflowError:
        raise ValueError("no calendar has this time") from None
    if not 1970 <= time.year <= 9990:
        raise ValueError("a time is from 1970 to 9990")
    return time


Label = Annotated[str, StringConstraints(min_length=1, max_length=100), AfterValidator(_printable)]
FileName = Annotated[str, StringConstraints(max_length=255), AfterValidator(_file_name)]
"""Of a layer at a replica: a name without a directory, plain in every shell and for QEMU."""
Epoch = Annotated[int, Field(ge=1, le=LARGEST_EPOCH)]
PointNumber = Annotated[int, Field(ge=1, le=LARGEST_NUMBER)]
Moment = Annotated[AwareDatetime, AfterValidator(_of_a_calendar)]
MOST_OLDER = 1 << 14
"""Files of one layer: one a night for 44 years."""
ShortKeys = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{16})*$", max_length=MOST_OLDER * SHORT_KEY_BYTES * 2)]
"""The base64 form of a content sum: 2048 bytes, u16 little endian a lane."""


POINT_OPTIONS = "holds", "instant", "consistency"
"""Fields of a point that are only written where they say something: programs from before them refuse them."""


def without_unset(fields: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The fields of a message, those of `names` that are empty or None left out."""
    return {name: value for name, value in fields.items() if value or name not in names}


class Message(BaseModel):
    """One message: exactly these fields."""

    # Built when they are needed: one stream speaks few of these.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Hello(Message):
    """first, last: the versions of the stream that the side speaks; answers: whether it listens to the other side.

    A later version may have more fields here: this message decides about the version.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)

    first: int = Field(ge=1, le=65535)
    last: int = Field(ge=1, le=65535)
    software: str = Field(max_length=100)
    features: tuple[Annotated[str, StringConstraints(max_length=40)], ...] = Field(default=(), max_length=32)
    answers: bool


class Open(Message):
    """Which disk, in which replica; no replica where the receiver's own user has named it.

    look: only the inventory is wanted; nothing is made or locked at the receiver
    epoch: in which the sender writes the disk; 1 goes without saying
    by_name: a human has named the epoch: it may skip some, and end a handover that nobody has used
    """

    disk: str = Field(min_length=1, max_length=250)
    replica: str | None = Field(default=None, max_length=4096)
    look: bool = False
    epoch: Epoch = 1
    by_name: bool = False

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A receiver without the feature does not know the field.
        fields: dict[str, Any] = handler(self)
        if fields.get("epoch") == 1:
            del fields["epoch"]
        if not fields.get("by_name"):
            fields.pop("by_name", None)
        return fields


class LayerOffer(Message):
    """A layer that is about to come.

    name: that the file should have; size: virtual, bytes; runs: of its map; parent: the layer that it lies on
    resume_at: guest offset from which on its data come, since what lies before is durable there
    """

    name: str = Field(min_length=1, max_length=255)
    size: int = Field(ge=0, le=LARGEST_DISK)
    cluster_size: int = Field(ge=512, le=2 * 1024 * 1024)
    extended_l2: bool
    parent: LayerId | None
    sources: tuple[Fingerprint, ...] = Field(max_length=2 * MAX_LAYERS)
    runs: int = Field(ge=0, le=MAX_RUNS)
    resume_at: int = Field(default=0, ge=0, le=LARGEST_DISK)


class Cut(Message):
    """The layers above `keep` are to be dropped, all of them where that is None."""

    keep: LayerId | None


class PointOffer(Message):
    """A point to publish: what the chain shows that is there now.

    instant, consistency: of the guest point that it belongs to; only to a receiver with `guest-point`
    """

    time: Moment
    labels: tuple[Label, ...] = Field(default=(), max_length=100)
    size: int = Field(ge=0, le=LARGEST_DISK)
    content_id: Digest
    instant: Instant | None = None
    consistency: Consistency | None = None

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(handler(self), POINT_OPTIONS)


class HeldLayer(Message):
    """A layer that is there. older: the files that it was made of below its `sources` (replica/catalogue.py)."""

    id: LayerId
    file: FileName
    size: int = Field(ge=0, le=LARGEST_DISK)
    content_id: Digest
    content_sum: SumText
    sources: tuple[Fingerprint, ...] = Field(max_length=2 * MAX_LAYERS)
    older: ShortKeys = ""

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Programs from before there was this know no such field, and it is seldom needed.
        fields: dict[str, Any] = handler(self)
        if not fields.get("older"):
            fields.pop("older", None)
        return fields


class Partial(Message):
    """A layer whose transfer was cut off: its data below guest offset `durable` are there.

    content_sum: what the sender had counted there, given back to it
    """

    layer: LayerId
    durable: int = Field(ge=0, le=LARGEST_DISK)
    content_sum: SumText


class Inventory(Message):
    """What a replica holds of a disk: layers root first."""

    disk: str = Field(max_length=250)
    epoch: Epoch
    layers: tuple[HeldLayer, ...] = Field(max_length=MAX_LAYERS)
    last_point: int = Field(ge=0, le=LARGEST_NUMBER)
    partial: Partial | None


class Stored(Message):
    """A layer is whole, proven, and part of the chain."""

    layer: LayerId
    file: FileName


class Done(Message):
    """All is durable. points: numbers of those that were published, ascending; layers: how many came."""

    points: tuple[PointNumber, ...] = Field(max_length=4 * MAX_LAYERS)
    layers: int = Field(ge=0, le=2 * MAX_LAYERS + 1)


class Active(Message):
    """An empty overlay on the newest layer, in which a live migration can put what a guest has not yet sealed.

    name: that its file should have; size: virtual, bytes; on: the layer that must be the newest there
    make: whether it is to be made, or only looked for; prove: whether all layers are to be read again
    """

    name: str = Field(min_length=1, max_length=255)
    size: int = Field(ge=0, le=LARGEST_DISK)
    cluster_size: int = Field(ge=512, le=2 * 1024 * 1024)
    extended_l2: bool
    on: LayerId
    make: bool
    prove: bool


class ActiveState(StrEnum):
    """What stands where the overlay should."""

    ABSENT = "absent"
    READY = "ready"
    """The empty overlay that was asked for."""
    STALE = "stale"
    """An empty overlay on a layer of this disk, but not the one that was asked for: it may be replaced."""
    FOREIGN = "foreign"
    """Something else, such as an overlay that a guest has written to."""


class Readiness(Message):
    """The answer to Active.

    directory: of the disk, absolute; file: the overlay's, from there; state: as it is now, after it was made
    proven: whether all layers were read again and show what the catalogue says; broken: files that do not
    """

    directory: str = Field(min_length=1, max_length=4096)
    file: str = Field(min_length=1, max_length=300)
    state: ActiveState
    proven: bool
    broken: tuple[FileName, ...] = Field(default=(), max_length=MAX_LAYERS)


class Ask(Message):
    """A question in the place of OPEN; nothing is made, locked or changed at the receiver.

    want: the points of disks; whether what is recorded of them is sound; whether the data are, too
    disk: None for all; replica: as in Open
    share: with `data`, the probability with which each layer is read; only for a receiver with the feature `sample`
    """

    want: Literal["points", "records", "data"]
    disk: str | None = Field(default=None, min_length=1, max_length=250)
    replica: str | None = Field(default=None, max_length=4096)
    share: float = Field(default=1.0, gt=0, le=1)

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A receiver without the feature does not know the field.
        fields: dict[str, Any] = handler(self)
        if fields.get("share") == 1.0:
            del fields["share"]
        return fields


class Hold(Message):
    """A reason to keep a point whatever the retention rules say. tag: names it, once a point; reason: for people."""

    tag: Annotated[str, StringConstraints(min_length=1, max_length=100), AfterValidator(_printable)]
    since: Moment
    reason: Annotated[str, StringConstraints(max_length=1000), AfterValidator(_printable)] = ""


class HeldPoint(Message):
    """A point of a disk. layers: length of the chain that gives it

    holds: only if the sender has `hold`; instant, consistency: only if it has `guest-point`
    """

    point: PointNumber
    time: Moment
    labels: tuple[Label, ...] = Field(default=(), max_length=100)
    size: int = Field(ge=0, le=LARGEST_DISK)
    content_id: Digest
    layers: int = Field(ge=1, le=MAX_LAYERS)
    holds: tuple[Hold, ...] = Field(default=(), max_length=MOST_HOLDS)
    instant: Instant | None = None
    consistency: Consistency | None = None

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(handler(self), POINT_OPTIONS)


class HeldDisk(Message):
    """A disk and some of its points, ascending; those that follow come in the next such frame of the same disk."""

    disk: str = Field(min_length=1, max_length=250)
    epoch: Epoch
    points: tuple[HeldPoint, ...] = Field(max_length=POINTS_AT_ONCE)


class Verdict(Message):
    """A disk was looked at. checked_bytes: of data that were read; its findings came before."""

    disk: str = Field(min_length=1, max_length=250)
    points: int = Field(ge=0, le=LARGEST_NUMBER)
    layers: int = Field(ge=0, le=MAX_LAYERS)
    checked_bytes: int = Field(ge=0, le=MAX_LAYERS * LARGEST_DISK)


class Finding(Message):
    """Something wrong with a disk. kind: as in errors.py; subject: its file; points: those that it affects."""

    disk: str = Field(min_length=1, max_length=250)
    kind: Annotated[str, StringConstraints(max_length=40)]
    subject: str | None = Field(default=None, max_length=1000)
    message: str = Field(max_length=4000)
    points: tuple[PointNumber, ...] = Field(default=(), max_length=100_000)


class Failure(Message):
    """An error, as far as it may cross: kind as in errors.py."""

    kind: Annotated[str, StringConstraints(max_length=40)]
    message: str = Field(max_length=4000)
    subject: str | None = Field(default=None, max_length=1000)
    hint: str | None = Field(default=None, max_length=1000)


M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """The body of its frame."""
    return message.model_dump_json().encode()


def decode(shape: type[M], body: bytes | memoryview, *, subject: str) -> M:
    """The message in a body. Raises Corrupt for one that does not fit the model."""
    try:
        return shape.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise Corrupt(
            f"its {shape.__name__.lower()} message is invalid: {ascii(place)[1:-1]}: {first['msg']}",
            subject=subject,
        ) from error


# --- FETCH


class Fetch(Message):
    """A point is wanted, in the place of OPEN; nothing is made or changed at the receiver.

    point: as in an address, None for the latest; chain: its layers as they are, else one that shows all of it
    look: no data, only what there is; plain: no compression, for two ends on one machine; replica: as in Open
    first_layer: number of the layer, from 0, with which data begin, and first_offset: the guest offset in it, a
        multiple of a leaf or behind the layer's end; only said to a side that names `fetch-from`
    """

    disk: str = Field(min_length=1, max_length=250)
    point: str | None = Field(default=None, min_length=1, max_length=250)
    replica: str | None = Field(default=None, max_length=4096)
    chain: bool = False
    look: bool = False
    plain: bool = False
    first_layer: int = Field(default=0, ge=0, le=MAX_LAYERS)
    first_offset: int = Field(default=0, ge=0, le=LARGEST_DISK)

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A receiver without the feature does not know the fields.
        fields: dict[str, Any] = handler(self)
        if not fields.get("first_layer") and not fields.get("first_offset"):
            fields.pop("first_layer", None)
            fields.pop("first_offset", None)
        return fields


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

    step: Step
    token: LayerId
    disks: tuple[HandedDisk, ...] = Field(min_length=1, max_length=MOST_DISKS)
    replica: str | None = Field(default=None, max_length=4096)
    by: str | None = Field(default=None, min_length=1, max_length=250)

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A receiver without the feature does not know the field.
        fields: dict[str, Any] = handler(self)
        if fields.get("by") is None:
            fields.pop("by", None)
        return fields

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
    """A domain of libvirt."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=1000), AfterValidator(_printable)]
    uuid: str = Field(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")


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
    guest: Annotated[str, StringConstraints(min_length=1, max_length=250), AfterValidator(_printable)]
    by: Annotated[str, StringConstraints(min_length=1, max_length=250), AfterValidator(_printable)]
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


class Moving(Message):
    """How a move stands at the receiver.

    directory: for the guest's sockets; overlays: whole paths, in the order of the disks; "" where nothing is known
    nvram: whole paths of the files for its firmware variables, in the order of the request
    alive: whether the QEMU of this move runs; given: whether the guest was given to this host by this move
    ran: whether it may have run here; version: of QEMU, as 7.2; machine: its type
    cpu: a digest of the processor's model and features; free: bytes of the replica's filesystem
    clock: of this host, in the middle of the work on the request, and
    resumed: when the guest went on; both in seconds since the epoch
    write: seconds that a small durable record took here, for LOOK during a move
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
    cpu: str = Field(default="", max_length=100)
    free: int = Field(default=0, ge=0, le=1 << 63)
    clock: float
    write: float = Field(default=0.0, ge=0)
    resumed: float | None = None
    domain: DomainPresence | None = None
    libvirt: str = Field(default="", max_length=4096)
    host: str = Field(default="", max_length=100)
    pause: float | None = None
    memory: int = Field(default=0, ge=0, le=1 << 63)
    rounds: int = Field(default=0, ge=0, le=1 << 31)


# --- MERGE

_LARGEST = MAX_LAYERS * LARGEST_DISK
Reason = Annotated[str, StringConstraints(max_length=1000)]


class _OfDisk(Message):
    disk: str = Field(min_length=1, max_length=250)
    replica: str | None = Field(default=None, max_length=4096)


_FIRST_RULES = {"last", "hourly", "daily", "weekly", "monthly", "yearly", "within", "labels"}
"""Rules that every version of the stream knows."""


class Merge(Policy, _OfDisk):
    """Merge the layers of a disk that no kept point needs. dry_run: only report what it would do.

    The rules are its own fields, of which one at least is set; within: as 1y5m7d2h
    drop: in their place, the numbers of the points that go; only for a receiver with the feature `drop-points`
    zone: whose calendar says what a day is; epoch: an older one than the disk's is refused, none is in all
    """

    zone: str = Field(min_length=1, max_length=100)
    epoch: int | None = Field(default=None, ge=1, le=LARGEST_EPOCH)
    dry_run: bool = False
    drop: tuple[PointNumber, ...] | None = Field(default=None, max_length=MOST_POINTS)

    @model_serializer(mode="wrap")
    def _without_newer_rules_that_are_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A peer that does not know such a rule would refuse its field.
        fields: dict[str, Any] = handler(self)
        unset = {name for name, rule in Policy.model_fields.items() if getattr(self, name) == rule.default}
        unset |= {"drop"} if self.drop is None else set()
        return {name: value for name, value in fields.items() if name in _FIRST_RULES or name not in unset}

    @field_validator("labels")
    @classmethod
    def _has_few_labels(cls, labels: frozenset[str]) -> frozenset[str]:
        if len(labels) > 100:
            raise ValueError("it has more than 100 labels")
        return labels


class DecidedPoint(Message):
    """What becomes of one point, and why."""

    point: PointNumber
    time: Moment
    labels: tuple[Label, ...] = Field(max_length=100)
    kept: bool
    reasons: tuple[Reason, ...] = Field(max_length=120)


class Staying(Message):
    """A layer that no kept point needs, and why it stays all the same."""

    file: FileName
    reason: Reason


class Outcome(Message):
    """What was done, or would be. Sizes in bytes.

    merges: files that become one, lowest first, each; strategy: of all merges, joined by '+', or none
    bytes_freed: allocated by the files less what they allocate afterwards; of a dry run, overwritten data that goes
    needs_bytes: room beside the layers, at most; free_bytes: room that there was
    """

    done: bool
    layers_before: int = Field(ge=0, le=MAX_LAYERS)
    layers_after: int = Field(ge=0, le=MAX_LAYERS)
    merges: tuple[tuple[FileName, ...], ...] = Field(max_length=MAX_LAYERS)
    staying: tuple[Staying, ...] = Field(max_length=MAX_LAYERS)
    strategy: Annotated[str, StringConstraints(pattern=r"^[a-z+-]{1,100}$")]
    bytes_moved: int = Field(ge=0, le=_LARGEST)
    bytes_freed: int = Field(ge=-_LARGEST, le=_LARGEST)
    needs_bytes: int = Field(ge=0, le=_LARGEST)
    free_bytes: int = Field(ge=0, le=1 << 63)


class Merged(Message):
    """Some points, ascending; the rest comes in the next such frame, and with the last the outcome."""

    disk: str = Field(min_length=1, max_length=250)
    points: tuple[DecidedPoint, ...] = Field(max_length=POINTS_AT_ONCE)
    outcome: Outcome | None = None


# --- HOLD and RELEASE


class HoldPoint(Message):
    """Keep a point whatever the rules say. point: as in an address, or null for the newest; replica: as in Open.

    A tag that the point has already keeps its date and gets this reason. dry_run: change nothing.
    """

    disk: str = Field(min_length=1, max_length=250)
    replica: str | None = Field(default=None, max_length=4096)
    point: str | None = Field(default=None, min_length=1, max_length=250)
    tag: Annotated[str, StringConstraints(min_length=1, max_length=100), AfterValidator(_printable)]
    reason: Annotated[str, StringConstraints(max_length=1000), AfterValidator(_printable)] = ""
    dry_run: bool = False


class ReleasePoint(Message):
    """Take the hold of this tag off a point. Fields as in HoldPoint."""

    disk: str = Field(min_length=1, max_length=250)
    replica: str | None = Field(default=None, max_length=4096)
    point: str | None = Field(default=None, min_length=1, max_length=250)
    tag: Annotated[str, StringConstraints(min_length=1, max_length=100), AfterValidator(_printable)]
    dry_run: bool = False


class Held(Message):
    """All holds that a point has after HOLD or RELEASE."""

    disk: str = Field(min_length=1, max_length=250)
    point: PointNumber
    holds: tuple[Hold, ...] = Field(max_length=MOST_HOLDS)


# --- LEAVES

LEAVES_A_FRAME = 1 << 14
LEAF_ENTRY_BYTES = 8 + 32
"""Of a LEAF_HASHES body: u64 leaf number, little endian, and its hash."""


class WantLeaves(Message):
    """The leaf hashes of the newest content are wanted. layer: the id of the newest layer, as the sender knows it."""

    layer: LayerId


# --- the table

PROGRESS = struct.Struct("<QQ")
"""Of a PROGRESS body: bytes done, and bytes in all."""


class Right(StrEnum):
    """What a peer may be allowed to do (permissions.py)."""

    SEND = "send"
    FETCH = "fetch"
    CUT = "cut"
    MERGE = "merge"
    HANDOVER = "handover"
    EPOCHS = "epochs"
    GUESTS = "guests"


class Feature(StrEnum):
    """What was added to version 1 since. A side ignores names that it does not know."""

    ACTIVE = "active"
    ASK = "ask"
    EPOCH = "epoch"
    """The receiver checks the epoch in OPEN."""
    MERGE = "merge"
    """Also: senders wait while layers are merged."""
    HANDOVER = "handover"
    FETCH = "fetch"
    NAMED_EPOCH = "named-epoch"
    """The receiver lets an epoch rise by one only, unless OPEN says that a human has named it."""
    LEAVES = "leaves"
    HOLD = "hold"
    """Also: the holds of points are listed."""
    SAMPLE = "sample"
    """The receiver knows the share in ASK."""
    FETCH_FROM = "fetch-from"
    """The receiver knows in FETCH where data are to begin."""
    GUEST_POINT = "guest-point"
    """The receiver keeps `instant` and `consistency` of points, and lists them for a sender that names it."""
    DROP_POINTS = "drop-points"
    """The receiver knows in MERGE the numbers of the points that go."""
    GUEST_STATE = "guest-state"
    """The receiver keeps the states of guests, and answers GUEST."""
    LEASE = "lease"
    """The receiver grants leases of guests."""
    MOVE = "move"
    """Guests can come to the receiver's host while they run."""
    PLACES = "places"
    """The receiver knows of a guest's other destinations, and names itself in STANDING."""


@dataclass(frozen=True, slots=True)
class Request:
    """A frame by which a sender asks the receiver for something.

    longest: bytes of its body
    handler: `module:function` of snapchain.replica that answers it, loaded when the first one comes
    responses: kinds that may come in answer, besides BEAT, FAIL and, at the end, DONE
    rights: one of them is needed; feature: that the receiver must have, None for those of the first version
    opens: stands in the place of OPEN and is the only request of its stream; else it follows OPEN
    after_look: may follow an OPEN that only looks
    """

    model: type[Message]
    longest: int
    handler: str
    responses: tuple[Kind, ...]
    rights: frozenset[Right]
    feature: Feature | None = None
    opens: bool = False
    after_look: bool = False


_SEND, _FETCH, _MERGE = frozenset({Right.SEND}), frozenset({Right.FETCH}), frozenset({Right.MERGE})

REQUESTS: Mapping[Kind, Request] = {
    Kind.OPEN: Request(Open, 16 * KiB, "receiver:transfer", (Kind.INVENTORY,), _SEND, opens=True),
    Kind.LAYER: Request(LayerOffer, 256 * KiB, "receiver:take_layer", (Kind.ACK, Kind.STORED), _SEND),
    Kind.POINT: Request(PointOffer, 64 * KiB, "receiver:publish_point", (), _SEND),
    Kind.CUT: Request(Cut, 4 * KiB, "receiver:cut_layers", (), frozenset({Right.CUT})),
    Kind.ACTIVE: Request(
        Active, 4 * KiB, "handover:answer_active", (Kind.READINESS,), _SEND, Feature.ACTIVE, after_look=True
    ),
    Kind.LEAVES: Request(
        WantLeaves,
        4 * KiB,
        "fetch_server:answer_leaves",
        (Kind.PROGRESS, Kind.LEAF_HASHES),
        _SEND,
        Feature.LEAVES,
        after_look=True,
    ),
    Kind.ASK: Request(
        Ask,
        16 * KiB,
        "status:answer",
        (Kind.DISK, Kind.PROGRESS, Kind.FINDING, Kind.VERDICT),
        _SEND | _FETCH,
        Feature.ASK,
        opens=True,
    ),
    Kind.FETCH: Request(
        Fetch,
        16 * KiB,
        "fetch_server:answer",
        (Kind.DISK, Kind.PROGRESS, Kind.LAYER, Kind.MAP, Kind.DATA, Kind.END),
        _FETCH,
        Feature.FETCH,
        opens=True,
    ),
    Kind.HANDOVER: Request(
        Handover,
        128 * KiB,
        "guest_handover:answer",
        (Kind.HANDED,),
        frozenset({Right.HANDOVER}),
        Feature.HANDOVER,
        opens=True,
    ),
    Kind.MOVE: Request(
        Move,
        4 * MiB,
        "guest_server:answer",
        (Kind.MOVING,),
        frozenset({Right.GUESTS}),
        Feature.MOVE,
        opens=True,
    ),
    Kind.MERGE: Request(
        Merge, 512 * KiB, "merging:answer", (Kind.PROGRESS, Kind.MERGED), _MERGE, Feature.MERGE, opens=True
    ),
    Kind.HOLD: Request(HoldPoint, 16 * KiB, "holds:hold", (Kind.HELD,), _SEND | _MERGE, Feature.HOLD, opens=True),
    Kind.RELEASE: Request(ReleasePoint, 16 * KiB, "holds:release", (Kind.HELD,), _MERGE, Feature.HOLD, opens=True),
    Kind.GUEST: Request(
        AskGuest,
        512 * KiB,
        "guest_states:answer",
        (Kind.STANDING,),
        _SEND | _FETCH | {Right.HANDOVER},
        Feature.GUEST_STATE,
        opens=True,
    ),
}
"""All that a sender may ask for. What is not here, and no part of a layer, is refused."""

_FROM_BOTH = {Kind.HELLO: 4 * KiB, Kind.BEAT: 0, Kind.FAIL: 16 * KiB}
_LAYER_PARTS = {Kind.MAP: 520 * KiB, Kind.DATA: 2120 * KiB, Kind.MARK: 8 + 2048, Kind.END: 32}
FROM_SENDER: Mapping[Kind, int] = {
    **_FROM_BOTH,
    **_LAYER_PARTS,
    Kind.STOP: 0,
    **{kind: request.longest for kind, request in REQUESTS.items()},
}
"""The longest body of each kind that a sender may send."""
FROM_RECEIVER: Mapping[Kind, int] = {
    **_FROM_BOTH,
    Kind.INVENTORY: 16 * MiB,
    Kind.ACK: 8,
    Kind.STORED: 4 * KiB,
    Kind.DONE: 16 * KiB,
    Kind.READINESS: 16 * KiB,
    Kind.DISK: 16 * MiB,
    Kind.VERDICT: 4 * KiB,
    Kind.FINDING: MiB,
    Kind.PROGRESS: PROGRESS.size,
    Kind.MERGED: 16 * MiB,
    Kind.HANDED: 512 * KiB,
    Kind.LEAF_HASHES: LEAVES_A_FRAME * LEAF_ENTRY_BYTES,
    Kind.HELD: 512 * KiB,
    Kind.STANDING: 6 * MiB,
    Kind.MOVING: 512 * KiB,
}
"""The same for a receiver."""
FROM_FETCH: Mapping[Kind, int] = {
    **_FROM_BOTH,
    **{kind: FROM_RECEIVER.get(kind, FROM_SENDER.get(kind, 0)) for kind in REQUESTS[Kind.FETCH].responses},
    Kind.DONE: FROM_RECEIVER[Kind.DONE],
    Kind.DISK: 64 * KiB,
}
"""The same for what answers FETCH: layers come from the receiver."""
