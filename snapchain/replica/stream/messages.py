"""Messages about disks, layers and points: what stands in each frame of the stream.

Those about a whole guest are in `guest_messages`. Models are checked as they are read: every field has a type and a
bound.
"""

from __future__ import annotations

import struct
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    field_validator,
    model_serializer,
)

from snapchain.errors import Corrupt
from snapchain.model.consistency import Consistency
from snapchain.model.content import SumText
from snapchain.model.disk_name import LARGEST_EPOCH
from snapchain.model.fingerprint import Fingerprint
from snapchain.model.freshness import MOST_OF_THE_FUTURE
from snapchain.model.inventory import MAX_LAYERS
from snapchain.model.retention import Policy
from snapchain.replica.stream.fields import (
    LARGEST_DISK,
    LARGEST_NUMBER,
    MAX_RUNS,
    MOST_HOLDS,
    MOST_POINTS,
    POINTS_AT_ONCE,
    Digest,
    Epoch,
    FileName,
    Instant,
    Label,
    LayerId,
    Moment,
    PointNumber,
    Printable,
    ShortKeys,
)

VERSION = 1
"""The one version of the stream that this program speaks."""


class Terse(BaseModel):
    """A model some of whose fields are only written where they differ from their defaults.

    newer: their names; programs from before them refuse them
    """

    newer: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        for name in self.newer:
            if getattr(self, name) == type(self).model_fields[name].default:
                fields.pop(name, None)
        return fields


class Message(Terse):
    """One message: exactly these fields."""

    # Built when they are needed: one stream speaks few of these.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


OF_GUEST_POINTS = frozenset({"holds", "instant", "consistency"})
"""Newer fields of a point."""


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

    newer = frozenset({"epoch", "by_name"})

    disk: str = Field(min_length=1, max_length=250)
    replica: str | None = Field(default=None, max_length=4096)
    look: bool = False
    epoch: Epoch = 1
    by_name: bool = False


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

    newer = frozenset({"instant", "consistency"})

    time: Moment
    labels: tuple[Label, ...] = Field(default=(), max_length=100)
    size: int = Field(ge=0, le=LARGEST_DISK)
    content_id: Digest
    instant: Instant | None = None
    consistency: Consistency | None = None


class HeldLayer(Message):
    """A layer that is there. older: the files that it was made of below its `sources` (replica/catalogue.py)."""

    newer = frozenset({"older"})

    id: LayerId
    file: FileName
    size: int = Field(ge=0, le=LARGEST_DISK)
    content_id: Digest
    content_sum: SumText
    sources: tuple[Fingerprint, ...] = Field(max_length=2 * MAX_LAYERS)
    older: ShortKeys = ""


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

    want: the points of disks; whether what is recorded of them is sound; whether the data are, too; or, from a receiver
        with the feature `summary`, each disk in short, or what its files take
    disk: None for all; replica: as in Open
    share: with `data`, the probability with which each layer is read; only for a receiver with the feature `sample`
    """

    newer = frozenset({"share"})

    want: Literal["points", "records", "data", "summary", "files"]
    disk: str | None = Field(default=None, min_length=1, max_length=250)
    replica: str | None = Field(default=None, max_length=4096)
    share: float = Field(default=1.0, gt=0, le=1)


class Hold(Message):
    """A reason to keep a point whatever the retention rules say. tag: names it, once a point; reason: for people."""

    tag: Annotated[str, StringConstraints(min_length=1, max_length=100), Printable]
    since: Moment
    reason: Annotated[str, StringConstraints(max_length=1000), Printable] = ""


class HeldPoint(Message):
    """A point of a disk. layers: length of the chain that gives it

    holds: only if the sender has `hold`; instant, consistency: only if it has `guest-point`
    """

    newer = OF_GUEST_POINTS

    point: PointNumber
    time: Moment
    labels: tuple[Label, ...] = Field(default=(), max_length=100)
    size: int = Field(ge=0, le=LARGEST_DISK)
    content_id: Digest
    layers: int = Field(ge=1, le=MAX_LAYERS)
    holds: tuple[Hold, ...] = Field(default=(), max_length=MOST_HOLDS)
    instant: Instant | None = None
    consistency: Consistency | None = None


class HeldDisk(Message):
    """A disk and some of its points, ascending; those that follow come in the next such frame of the same disk."""

    disk: str = Field(min_length=1, max_length=250)
    epoch: Epoch
    points: tuple[HeldPoint, ...] = Field(max_length=POINTS_AT_ONCE)


class BriefPoint(Message):
    """A point in short. size: virtual, bytes"""

    point: PointNumber
    time: Moment
    size: int = Field(ge=0, le=LARGEST_DISK)


class BriefDisk(Message):
    """A disk in short: the body of DISK where a summary was asked for.

    points, layers: how many; newest: the newest point that the receiver's clock does not call of the future, and the
        earliest of those that it does
    of_guest: whether a guest point or the state of a guest is recorded with it
    kind, message: of the error for which nothing else is known of it
    """

    disk: str = Field(min_length=1, max_length=250)
    epoch: int = Field(default=0, ge=0, le=LARGEST_EPOCH)
    points: int = Field(default=0, ge=0, le=LARGEST_NUMBER)
    layers: int = Field(default=0, ge=0, le=MAX_LAYERS)
    newest: tuple[BriefPoint, ...] = Field(default=(), max_length=MOST_OF_THE_FUTURE + 1)
    of_guest: bool = False
    kind: Annotated[str, StringConstraints(max_length=40)] | None = None
    message: str = Field(default="", max_length=4000)


class AddedPoint(Message):
    """A point, and the bytes of the files that it needs and no earlier point does."""

    point: PointNumber
    time: Moment
    added: int = Field(ge=0, le=MAX_LAYERS * LARGEST_DISK)


class DiskFiles(Message):
    """A disk and what its files take: the body of DISK where files were asked for; more points follow as in HeldDisk.

    files: layers; stored: bytes that they take, data: their DATA, other: of layers above the newest point
    kind, message: of the error for which nothing else is known of it
    """

    disk: str = Field(min_length=1, max_length=250)
    files: int = Field(default=0, ge=0, le=MAX_LAYERS)
    stored: int = Field(default=0, ge=0, le=MAX_LAYERS * LARGEST_DISK)
    data: int = Field(default=0, ge=0, le=MAX_LAYERS * LARGEST_DISK)
    other: int = Field(default=0, ge=0, le=MAX_LAYERS * LARGEST_DISK)
    points: tuple[AddedPoint, ...] = Field(default=(), max_length=POINTS_AT_ONCE)
    kind: Annotated[str, StringConstraints(max_length=40)] | None = None
    message: str = Field(default="", max_length=4000)


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
    newest: with `drop`, the last point may go too; only for a receiver with the feature `drop-newest`
    zone: whose calendar says what a day is; epoch: an older one than the disk's is refused, none is in all
    """

    newer = frozenset({*Policy.model_fields, "drop", "newest"}) - _FIRST_RULES

    zone: str = Field(min_length=1, max_length=100)
    epoch: int | None = Field(default=None, ge=1, le=LARGEST_EPOCH)
    dry_run: bool = False
    drop: tuple[PointNumber, ...] | None = Field(default=None, max_length=MOST_POINTS)
    newest: bool = False

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
    cut: how many uppermost layers are dropped, since the newest point is; only where MERGE allows that
    """

    newer = frozenset({"cut"})

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
    cut: int = Field(default=0, ge=0, le=MAX_LAYERS)


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
    tag: Annotated[str, StringConstraints(min_length=1, max_length=100), Printable]
    reason: Annotated[str, StringConstraints(max_length=1000), Printable] = ""
    dry_run: bool = False


class ReleasePoint(Message):
    """Take the hold of this tag off a point. Fields as in HoldPoint."""

    disk: str = Field(min_length=1, max_length=250)
    replica: str | None = Field(default=None, max_length=4096)
    point: str | None = Field(default=None, min_length=1, max_length=250)
    tag: Annotated[str, StringConstraints(min_length=1, max_length=100), Printable]
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


PROGRESS = struct.Struct("<QQ")
"""Of a PROGRESS body: bytes done, and bytes in all."""
