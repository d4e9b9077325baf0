"""The table of requests: what a sender may ask for, which right and feature that needs, what answers it, and how long.

A new request is an entry of `frames.Kind`, its models in `messages` or `guest_messages`, a row of `REQUESTS` with a
function that answers it, and a function of `client.py` or `sender.py` that sends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.guest_messages import AskGuest, Handover, Move
from snapchain.replica.stream.messages import (
    LEAF_ENTRY_BYTES,
    LEAVES_A_FRAME,
    PROGRESS,
    Active,
    Ask,
    Cut,
    Fetch,
    HoldPoint,
    LayerOffer,
    Merge,
    Message,
    Open,
    PointOffer,
    ReleasePoint,
    WantLeaves,
)

KiB = 1024
MiB = 1024 * KiB


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
    SUMMARY = "summary"
    """The receiver answers ASK with each disk in short, and with what its files take."""
    FETCH_FROM = "fetch-from"
    """The receiver knows in FETCH where data are to begin."""
    GUEST_POINT = "guest-point"
    """The receiver keeps `instant` and `consistency` of points, and lists them for a sender that names it."""
    DROP_POINTS = "drop-points"
    """The receiver knows in MERGE the numbers of the points that go."""
    DROP_NEWEST = "drop-newest"
    """The receiver lets the newest point go, too, where MERGE says so."""
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
