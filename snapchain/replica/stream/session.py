"""How two sides begin: each says which versions and features it speaks, before anything that depends on them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version

from snapchain.errors import (
    Busy,
    Conflict,
    Corrupt,
    Diverged,
    InvalidInput,
    NotFound,
    SnapchainError,
    Unavailable,
    Unsupported,
)
from snapchain.host.batches import Buffer
from snapchain.host.channel import Channel
from snapchain.host.retry import Lasting
from snapchain.replica.stream.frames import Frame, FrameWriter, Kind
from snapchain.replica.stream.messages import VERSION, Failure, Hello, decode

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


# --- errors that cross the wire: described by one side, raised by the other as the same kind

_KINDS: dict[str, type[SnapchainError]] = {
    error.kind: error for error in (InvalidInput, NotFound, Conflict, Diverged, Corrupt, Unsupported, Unavailable, Busy)
}


def told(error: BaseException) -> Failure:
    """What the other side is told of an error here."""
    if isinstance(error, SnapchainError):
        return Failure(
            kind=error.kind if error.kind in _KINDS else Unavailable.kind,
            message=error.message[:4000],
            subject=None if error.subject is None else error.subject[:1000],
            hint=None if error.hint is None else error.hint[:1000],
        )
    if isinstance(error, KeyboardInterrupt):
        return Failure(kind=Unavailable.kind, message="the other side was interrupted")
    return Failure(kind=Unavailable.kind, message=f"the other side broke: {type(error).__name__}")


def raised(failure: Failure, *, peer: str) -> SnapchainError:
    """The error here for one that the other side told; its words never reach a terminal as control characters."""
    kind = _KINDS.get(failure.kind, Unavailable)
    if kind is Unavailable and failure.subject is not None and failure.subject.startswith("/"):
        kind = Lasting  # a file over there, such as one for which there is no room
    subject = peer if failure.subject is None else f"{peer}: {printable(failure.subject)}"
    hint = None if failure.hint is None else printable(failure.hint)
    return kind(printable(failure.message), subject=subject, hint=hint)


def printable(text: str) -> str:
    """What a peer said, so that it may go to a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


# --- replies

BEAT_SECONDS = 10.0


class ReplyWriter(FrameWriter):
    """What this side says; several threads may. Nothing at all to a sender that does not listen."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._lock = threading.Lock()
        self.heard = False

    def send(self, kind: Kind, *body: Buffer) -> None:
        """Raises what Channel.write raises."""
        if self.heard:
            with self._lock:
                super().send(kind, *body)

    def say(self, kind: Kind, body: bytes = b"") -> None:
        """As `send`."""
        self.send(kind, body)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Say now and then that this side is alive."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT_SECONDS):
                with suppress(SnapchainError):
                    self.say(Kind.BEAT)

        thread = threading.Thread(target=beat, name="beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
