"""How two sides begin: each says which versions and features it speaks, before anything that depends on them."""

from __future__ import annotations

from importlib.metadata import version

from snapchain.errors import Corrupt, Unsupported
from snapchain.replica.stream.frames import Frame, Kind
from snapchain.replica.stream.messages import VERSION, Hello, decode

ACTIVE_FEATURE = "active"
"""A receiver that understands ACTIVE, and answers it with READINESS."""
ASK_FEATURE = "ask"
"""A receiver that answers ASK."""
EPOCH_FEATURE = "epoch"
"""A receiver that heeds the epoch in OPEN."""
MERGE_FEATURE = "merge"
"""A receiver that merges the layers of a disk when it is told to, and makes senders wait meanwhile."""
HANDOVER_FEATURE = "handover"
"""A receiver that answers HANDOVER with HANDED."""
FETCH_FEATURE = "fetch"
"""A receiver that answers FETCH."""
NAMED_EPOCH_FEATURE = "named-epoch"
"""A receiver that lets an epoch rise by one alone, unless OPEN says that a human has named it."""
FEATURES: tuple[str, ...] = (
    ACTIVE_FEATURE, ASK_FEATURE, EPOCH_FEATURE, MERGE_FEATURE, HANDOVER_FEATURE, FETCH_FEATURE, NAMED_EPOCH_FEATURE,
)  # fmt: skip
"""Names of what was added to version 1 since. Names that a side does not know mean nothing to it."""


def hello(*, answers: bool) -> Hello:
    """What this side says first. answers: False where nobody listens, as in a stream that is saved."""
    return Hello(first=VERSION, last=VERSION, software=version("snapchain"), features=FEATURES, answers=answers)


def agree(frame: Frame, *, peer: str) -> Hello:
    """The other side's hello, when there is a version that both speak.

    Raises Unsupported when there is none, Corrupt when it said something else.
    """
    if frame.kind is not Kind.HELLO:
        raise Corrupt(f"it began with {frame.kind.name}, not with HELLO", subject=peer)
    said = decode(Hello, frame.body, subject=peer)
    if not said.first <= VERSION <= said.last:
        older, newer = ("this", "the other") if said.first > VERSION else ("the other", "this")
        software = ascii(said.software)[1:-1]
        raise Unsupported(
            f"no common version of the stream: here {VERSION}, there {said.first} to {said.last} ({software})",
            subject=peer,
            hint=f"{older} side is older than {newer}: bring it up to date",
        )
    return said
