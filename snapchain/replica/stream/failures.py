"""Errors that cross the wire: told by one side, raised again by the other as the same kind."""

from __future__ import annotations

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
from snapchain.host.retry import Lasting
from snapchain.replica.stream.messages import Failure

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
