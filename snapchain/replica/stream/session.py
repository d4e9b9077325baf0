"""One end of a stream: how both sides begin, read the next frame, and fail.

Each side first says HELLO: which versions and features it knows, before anything that depends on them. `ClientSession`
sends requests, `ServerSession` answers them; which requests there are is the table in `requests`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
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
from snapchain.replica.stream.frames import Frame, FrameReader, FrameWriter, Kind
from snapchain.replica.stream.messages import VERSION, Done, Failure, Hello, M, Message, decode, encode
from snapchain.replica.stream.requests import FROM_RECEIVER, FROM_SENDER, REQUESTS, Feature

FEATURES: tuple[str, ...] = tuple(Feature)
"""Of this side."""
MOST_BYTES = 16 << 20
"""Of all responses to one request, PROGRESS not counted. In memory they take ten times as much."""
BEAT_SECONDS = 10.0
ONE_DISK = "name one disk: DEST::DISK; if you did, the other host sends more than a disk can have: check it"
OnBeat = Callable[[], None]


def _ignore() -> None:
    """For callers that do not want to know that the other side is alive."""


class Session:
    """One end: it reads frames of the other and checks them. features: that the other side has named."""

    def __init__(self, channel: Channel, allowed: Mapping[Kind, int]) -> None:
        self.channel, self.peer = channel, channel.peer
        self.reader = FrameReader(channel, allowed)
        self.features: frozenset[str] = frozenset()

    def next(self, on_beat: OnBeat = _ignore) -> Frame:
        """The next frame but BEAT. Raises the error that the other side reports, and as `FrameReader.read`."""
        while True:
            frame = self.reader.read()
            if frame.kind is Kind.FAIL:
                raise self.failure(frame)
            if frame.kind is not Kind.BEAT:
                return frame
            on_beat()

    def expect(self, kind: Kind) -> Frame:
        """The next frame, which must be of this kind. Raises Corrupt, and as `next`."""
        frame = self.next()
        if frame.kind is not kind:
            raise self.unexpected(frame)
        return frame

    def decode(self, model: type[M], frame: Frame) -> M:
        """The message in a frame. Raises Corrupt."""
        return decode(model, frame.body, subject=self.peer)

    def failure(self, frame: Frame) -> SnapchainError:
        """The error that a FAIL frame describes."""
        return error_of(self.decode(Failure, frame), peer=self.peer)

    def unexpected(self, frame: Frame) -> Corrupt:
        """The error for a frame that may not come now."""
        return Corrupt(f"{frame.kind.name} has no place here in the stream", subject=self.peer)

    def agree(self, frame: Frame) -> Hello:
        """The other side's HELLO, if both speak a common version.

        Raises Unsupported if there is none, Corrupt for any other frame.
        """
        if frame.kind is not Kind.HELLO:
            raise Corrupt(f"it began with {frame.kind.name}, not with HELLO", subject=self.peer)
        hello = self.decode(Hello, frame)
        if not hello.first <= VERSION <= hello.last:
            older, newer = ("this", "the other") if hello.first > VERSION else ("the other", "this")
            software = ascii(hello.software)[1:-1]
            raise Unsupported(
                f"no common version of the stream: here {VERSION}, there {hello.first} to {hello.last} ({software})",
                subject=self.peer,
                hint=f"{older} side is older than {newer}: upgrade it",
            )
        self.features = frozenset(hello.features)
        return hello


class ClientSession(Session):
    """The side that asks. allowed: frames that the server may send, each with its longest body."""

    def __init__(self, channel: Channel, allowed: Mapping[Kind, int] = FROM_RECEIVER) -> None:
        super().__init__(channel, allowed)
        self.writer = FrameWriter(channel)
        self._is_begun = False

    def begin(self) -> None:
        """Exchange HELLO, once. Raises Unsupported, and what the other side refuses with."""
        if self._is_begun:
            return
        self._is_begun = True
        self.writer.send(Kind.HELLO, encode(hello(answers=True)))
        self.agree(self.next())

    def require(self, feature: Feature | None) -> None:
        """Raises Unsupported if the other side lacks the feature."""
        if feature is not None and feature not in self.features:
            raise Unsupported(
                f"the snapchain on the other host is too old: it does not support {feature.value!r}",
                subject=self.peer,
                hint="upgrade it there",
            )

    def ask(self, kind: Kind, request: Message, *, feature: Feature | None = None) -> None:
        """Begin, and send a request in the place of OPEN. Raises as `begin` and `require`."""
        self.begin()
        self.require(feature)
        self.request(kind, request)

    def request(self, kind: Kind, request: Message) -> None:
        """Send a request in the place of OPEN, after `begin`. Raises as `require`."""
        self.require(REQUESTS[kind].feature)
        self.writer.send(kind, encode(request))

    def responses(
        self, kind: Kind, request: Message, on_beat: OnBeat = _ignore, *, feature: Feature | None = None
    ) -> Iterator[Frame]:
        """Ask, and give every frame that answers, up to DONE.

        on_beat: called for each BEAT; feature: what the other side must support besides the request
        Raises as `ask` and `next`, and Corrupt for more than MOST_BYTES.
        """
        self.ask(kind, request, feature=feature)
        left = MOST_BYTES
        while (frame := self.next(on_beat)).kind is not Kind.DONE:
            if frame.kind not in REQUESTS[kind].responses:
                raise self.unexpected(frame)
            left -= 0 if frame.kind is Kind.PROGRESS else len(frame.body)
            if left < 0:
                raise Corrupt(f"its answer has more than {MOST_BYTES} bytes", subject=self.peer, hint=ONE_DISK)
            yield frame


class ServerSession(Session):
    """The side that answers; several threads may. It sends nothing to a client that does not listen."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel, FROM_SENDER)
        self.writer = ReplyWriter(channel)

    def begin(self) -> bool:
        """Exchange HELLO; whether the client listens. Raises Unsupported, which the client is told of, and Corrupt."""
        frame = self.reader.read()
        try:
            listens = self.agree(frame).answers
        except SnapchainError:
            # The client may well listen: it learns which versions are known here.
            self.writer.is_heard = True
            with suppress(SnapchainError):
                self.writer.send(Kind.HELLO, encode(hello(answers=True)))
            raise
        self.writer.is_heard = listens
        self.writer.send(Kind.HELLO, encode(hello(answers=True)))
        return listens

    def reply(self, kind: Kind, message: Message | bytes = b"") -> None:
        """Send a response. Raises as Channel.write."""
        self.writer.send(kind, message if isinstance(message, bytes) else encode(message))

    def done(self, points: tuple[int, ...] = (), layers: int = 0) -> None:
        """Send DONE, the last response."""
        self.reply(Kind.DONE, Done(points=points, layers=layers))

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Send BEAT now and then while the block runs."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT_SECONDS):
                with suppress(SnapchainError):
                    self.writer.send(Kind.BEAT)

        thread = threading.Thread(target=beat, name="beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


class ReplyWriter(FrameWriter):
    """A FrameWriter for several threads. is_heard: whether the other side listens; else nothing is sent."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._lock = threading.Lock()
        self.is_heard = False

    def send(self, kind: Kind, *body: Buffer) -> None:
        """Raises as Channel.write."""
        if self.is_heard:
            with self._lock:
                super().send(kind, *body)


def hello(*, answers: bool) -> Hello:
    """The HELLO of this side. answers: False where nobody listens, as in a stream that is saved."""
    return Hello(first=VERSION, last=VERSION, software=version("snapchain"), features=FEATURES, answers=answers)


# --- errors that cross the wire: described by one side, raised by the other as the same kind

_KINDS: dict[str, type[SnapchainError]] = {
    error.kind: error for error in (InvalidInput, NotFound, Conflict, Diverged, Corrupt, Unsupported, Unavailable, Busy)
}


def describe(error: BaseException) -> Failure:
    """The FAIL message for an error of this side."""
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


def error_of(failure: Failure, *, peer: str) -> SnapchainError:
    """The error that the other side describes; its text never reaches a terminal with control characters."""
    kind = _KINDS.get(failure.kind, Unavailable)
    if kind is Unavailable and failure.subject is not None and failure.subject.startswith("/"):
        kind = Lasting  # a file of the other host, such as on a full disk
    subject = peer if failure.subject is None else f"{peer}: {printable(failure.subject)}"
    hint = None if failure.hint is None else printable(failure.hint)
    return kind(printable(failure.message), subject=subject, hint=hint)


def printable(text: str) -> str:
    """Text of a peer, without characters that a terminal would act upon."""
    return "".join(character if character.isprintable() else "?" for character in text)
